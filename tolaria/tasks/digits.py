"""Handwritten digits (scikit-learn's 8x8 images, 10 classes) on a convolutional host that is too small on purpose."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tolaria.errors import TaskError
from tolaria.task import Task

VALIDATION_SHARE = 0.25
SPLIT_SEED = 0
PIXEL_MEAN, PIXEL_STD = 4.88, 6.02
"""Of all pixels of the data set, whose values go from 0 to 16."""


class Digits(Dataset[Any]):
    """Images, float32 (1, 8, 8), and labels, int64; batches are cut out of two tensors."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices)
        return self.images[rows], self.labels[rows]


class SmallConvNet(nn.Module):
    """Two 3x3 convolutions of a few channels and a linear layer over 2x2 averages: (batch, 1, 8, 8) -> (batch, 10)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GELU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU())
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 1, 8, 8) -> (batch, 10) logits."""
        h = self.stem(images)  # (batch, width, 4, 4)
        h = self.body(h)  # (batch, width, 4, 4)
        logits: Tensor = self.head(self.pool(h).flatten(1))
        return logits


def load_split() -> tuple[Digits, Digits]:
    """Training and validation set: 1,347 and 450 images, every class in the same shares, the same split always."""
    images, labels = load_digits(return_X_y=True)
    rows = train_test_split(range(len(labels)), test_size=VALIDATION_SHARE, stratify=labels, random_state=SPLIT_SEED)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    pixels = (pixels - PIXEL_MEAN) / PIXEL_STD
    classes = torch.tensor(labels, dtype=torch.int64)
    train, validation = (Digits(pixels[part], classes[part]) for part in rows)
    return train, validation


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per image in nats, float32 (batch,)."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the largest logit is the label's, else 0; float32 (batch,)."""
    return (logits.argmax(dim=1) == labels).float()


def make_task(width: int = 2) -> Task:
    """The task; ``width`` is the host's number of channels. Slots: early (after the stem) and late (after the body)."""
    if width < 1:
        raise TaskError(f"task.args.width={width}: expected 1 or more channels")
    train, validation = load_split()
    return Task(
        model=SmallConvNet(width),
        loss=loss,
        train=train,
        validation=validation,
        accuracy=accuracy,
        slots={"early": "stem", "late": "body"},
        collate=_already_batched,
    )


def _already_batched(batch: Any) -> Any:
    return batch
