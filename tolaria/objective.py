"""The function that is trained: model and loss in one module, which is what gets compiled and wrapped by DDP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.errors import TaskError
from tolaria.kasmina.slot import Slot
from tolaria.task import Task


@dataclass(frozen=True)
class Batch:
    """One microbatch on the device. ``weights``: shape (batch,), float32; 0 for samples that only fill up.

    ``seed_ids``: which seed each sample belongs to, shape (batch,), int64, as `tolaria.Task` defines them; None where
    the data does not say. ``seeds_present``: the ids of the samples that count, known without asking the device.
    """

    inputs: Any
    targets: Any
    weights: Tensor
    seed_ids: Tensor | None = None
    seeds_present: tuple[int, ...] = ()


def per_sample(values: Any, batch: int, what: str) -> Tensor:
    """A tensor of shape (batch, ...) averaged to (batch,) in float32. Raises TaskError for anything else."""
    if not isinstance(values, Tensor):
        raise TaskError(f"{what} returned {type(values).__name__}; expected a tensor with one value per sample")
    if values.dim() == 0 or values.shape[0] != batch:
        raise TaskError(
            f"{what} returned shape {tuple(values.shape)} for a batch of {batch}; expected one value per sample, "
            f'shape ({batch},) or ({batch}, ...), for example F.cross_entropy(..., reduction="none")'
        )
    return values.float().flatten(1).mean(1) if values.dim() > 1 else values.float()


class Objective(nn.Module):
    """Weighted loss of one microbatch: ``sum_i weights[i] * loss_i``, a 0-D float32 tensor.

    Not ``summed``, it is the vector of ``weights[i] * loss_i``, shape (batch,), from which a gradient of some of the
    samples can be asked for. The slots hang here as well as in the model, so that the seeds of attached slots are part
    of this module.
    """

    def __init__(self, task: Task, slots: Mapping[str, Slot], *, summed: bool = True) -> None:
        super().__init__()
        self.summed = summed
        self.model = task.model
        self.slots = nn.ModuleList(slots.values())
        self.loss = task.loss

    def forward(self, inputs: Any, targets: Any, weights: Tensor) -> Tensor:
        """``inputs`` and ``targets`` as the task's collate made them; ``weights``: (batch,), float32."""
        losses = self.loss(self.model(inputs), targets)
        each = per_sample(losses, weights.shape[0], "the task's loss")
        # A dot product is half the operations of a product and its sum: 20 microseconds of an eager step.
        return torch.dot(each, weights) if self.summed else each * weights


def weighted_values(task: Task, outputs: Any, batch: Batch) -> dict[str, Tensor]:
    """Validation values of one batch times its weights: "loss", "accuracy" and the task's metrics, (batch,) float64."""
    functions = {"loss": task.loss, "accuracy": task.accuracy, **task.metrics}
    count = batch.weights.shape[0]
    values = {name: per_sample(f(outputs, batch.targets), count, f"the task's {name}") for name, f in functions.items()}
    # A filled-up sample has weight 0, but 0 * inf is NaN: leave it out instead of multiplying.
    real = batch.weights > 0
    return {name: torch.where(real, v * batch.weights, torch.zeros_like(v)).double() for name, v in values.items()}
