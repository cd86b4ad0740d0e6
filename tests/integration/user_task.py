"""What a user brings: a plain torch.nn.TransformerEncoder, a module of their own to grow in it, and mistakes.

Is the larger half of a sequence's numbers in front? (batch, 6, 3) -> one of two classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from tolaria import Slot, Task, register_blueprint

TOKENS, INPUTS, FEATURES = 6, 3, 8
SLOT_PATH = "encoder.layers.0"
SAMPLES, VALIDATION_SAMPLES = 40, 10


class Gate(nn.Module):
    """A module that comes from the user alone: the features scaled by what the token itself says."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inlet = nn.Linear(shape[-1], 4)
        self.outlet = nn.Linear(4, shape[-1])
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.tanh(self.outlet(torch.relu(self.inlet(h))))


class Classifier(nn.Module):
    """A TransformerEncoder between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, FEATURES)
        layer = nn.TransformerEncoderLayer(FEATURES, nhead=2, dim_feedforward=16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(x)).mean(1))
        return logits


def make_task(mistake: str = "") -> Task:
    """The task, or the task with one of MISTAKES."""
    register_blueprint("user_gate", Gate, ranks=(2,), summary="the test's own")
    task = Task(
        model=Classifier(),
        loss=per_sample_loss,
        accuracy=per_sample_accuracy,
        train=samples(SAMPLES, seed=1),
        validation=samples(VALIDATION_SAMPLES, seed=2),
    )
    return MISTAKES[mistake](task) if mistake else task


def per_sample_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="none")


def per_sample_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(1) == targets).float()


def samples(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, TOKENS, INPUTS, generator=torch.Generator().manual_seed(seed))
    front, back = x[:, : TOKENS // 2].sum((1, 2)), x[:, TOKENS // 2 :].sum((1, 2))
    return TensorDataset(x, (front > back).long())


# Mistakes


class Broken(Dataset[Any]):
    """Cannot read its second sample."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        if index:
            raise OSError(f"sample {index} cannot be read")
        return torch.zeros(TOKENS, INPUTS), torch.tensor(0)


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def raising(task: Task) -> Task:
    raise ValueError("the file with the samples\nis not there")


def of(**changes: Any) -> Callable[[Task], Task]:
    return lambda task: replace(task, **changes)


def with_model(build: Callable[[], nn.Module], **changes: Any) -> Callable[[Task], Task]:
    return lambda task: replace(task, model=build(), **changes)


def frozen(task: Task) -> Task:
    task.model.requires_grad_(False)
    return task


def with_idle_layer(task: Task) -> Task:
    task.model.idle = nn.Linear(2, 2)
    return task


def twins() -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(TOKENS * INPUTS, 4), Slot("here"), nn.Linear(4, 2), Slot("here"))
    return nn.Sequential(*layers)


def batch_only(items: Sequence[Any]) -> Tensor:
    return torch.stack([x for x, _ in items])


def metric_named(name: str) -> Callable[[Task], Task]:
    return of(metrics={name: per_sample_accuracy})


MISTAKES: dict[str, Callable[[Task], Any]] = {
    "raises": raising,
    "returns_model": lambda task: task.model,
    "returns_nothing": lambda task: None,
    "loss_mean": of(loss=functional.cross_entropy),
    "loss_number": of(loss=lambda logits, targets: 1.0),
    "loss_raises": of(loss=lambda logits, targets: functional.cross_entropy(logits, targets.float(), reduction="none")),
    "accuracy_mean": of(accuracy=lambda logits, targets: (logits.argmax(1) == targets).float().mean()),
    "accuracy_raises": of(accuracy=lambda logits, targets: logits.nothing),
    "metric_reserved": metric_named("loss"),
    "metric_unsendable": metric_named("top 5 %"),
    "metrics_many": of(metrics={f"metric-{i}": per_sample_accuracy for i in range(201)}),
    "slot_nowhere": of(slots={"mid": "encoder.layer.0"}),
    "slot_tuple": of(slots={"mid": "encoder.layers.0.self_attn"}),
    "slot_unused": with_model(lambda: with_spare(Classifier()), slots={"mid": "spare"}),
    "slot_unsendable": of(slots={"größe": SLOT_PATH}),
    "two_slots": with_model(twins),
    "frozen": frozen,
    "idle_layer": with_idle_layer,
    "model_mismatch": with_model(lambda: nn.Linear(INPUTS + 1, 2)),
    "train_empty": of(train=TensorDataset(torch.zeros(0, TOKENS, INPUTS), torch.zeros(0, dtype=torch.long))),
    "validation_empty": of(validation=TensorDataset(torch.zeros(0, TOKENS, INPUTS), torch.zeros(0, dtype=torch.long))),
    "train_endless": of(train=Endless()),
    "train_broken": of(train=Broken()),
    "validation_broken": of(validation=Broken()),
    "collate_tensor": of(collate=batch_only),
    "optimizer_unknown": of(optimizer={"speed": 3}),
    "optimizer_value": of(optimizer={"lr": -1.0}),
}


def with_spare(model: nn.Module) -> nn.Module:
    model.spare = nn.Identity()
    return model
