"""A task of a few hundred parameters whose loading of a chosen batch waits for the test, or raises.

The test aims its faults with it: between ``reached-RANK`` and ``go`` in the folder ``hold_dir`` a rank is in the
middle of an epoch, whatever the speed of the machine. A rank that starts again counts anew, and finds ``go``.
"""

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tolaria import Task

SAMPLES = 80
FEATURES = 6
CLASSES = 3
SLOT_PATH = "hidden"
BATCH_DELAY_S = 0.005


class HeldData(Dataset[tuple[Tensor, Tensor]]):
    """Gives whole batches; ``hold_at`` waits for ``go``, ``raise_at`` raises on rank 1, ``nan`` are bad there."""

    def __init__(self, inputs: Tensor, targets: Tensor, hold_dir: str, hold_at: int, raise_at: int, nan: range) -> None:
        # A start after a death reads other batches under the same numbers.
        self.nan = nan if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" else range(0)
        self.inputs, self.targets = inputs, targets
        self.hold_dir = Path(hold_dir) if hold_dir else None
        self.hold_at = hold_at
        self.raise_at = raise_at
        self.rank = int(os.environ.get("RANK", "0"))
        self.batches = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        # Trial batches of new structures take the first samples in order; those of training are shuffled.
        if indices != [i % len(self) for i in range(len(indices))] and len(set(indices)) > 1:
            self.batches += 1
            self._meet_fault()
        time.sleep(BATCH_DELAY_S)
        chosen = torch.tensor(indices)
        factor = float("nan") if self.batches in self.nan and self.rank == 1 else 1.0
        return self.inputs[chosen] * factor, self.targets[chosen]

    def _meet_fault(self) -> None:
        if self.batches == self.raise_at and self.rank == 1:
            raise OSError(f"sample store gone at batch {self.batches}")
        if self.batches == self.hold_at and self.hold_dir is not None:
            (self.hold_dir / f"reached-{self.rank}").touch()
            while not (self.hold_dir / "go").exists():
                time.sleep(0.005)


class Host(nn.Module):
    """Two layers with dropout, so that a lost random state shows in the digest."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh())
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(self.hidden(inputs)))
        return logits


def make_task(hold_dir: str = "", hold_at: int = 0, raise_at: int = 0, nan_from: int = 0, nan_to: int = 0) -> Task:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES + 20, FEATURES, generator=generator)
    targets = (inputs[:, 0] * inputs[:, 1]).sign().long() + 1
    validation = torch.utils.data.TensorDataset(inputs[SAMPLES:], targets[SAMPLES:])
    return Task(
        model=Host(),
        loss=lambda outputs, wanted: nn.functional.cross_entropy(outputs, wanted, reduction="none"),
        accuracy=lambda outputs, wanted: (outputs.argmax(1) == wanted).float(),
        train=HeldData(inputs[:SAMPLES], targets[:SAMPLES], hold_dir, hold_at, raise_at, range(nan_from, nan_to)),
        validation=validation,
        collate=collate,
        slots={"mid": SLOT_PATH},
    )


def collate(batch: tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Batches of `HeldData` are whole; the validation set gives single samples."""
    if isinstance(batch, tuple):
        return batch
    return torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])
