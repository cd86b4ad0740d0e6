"""Handwritten digits with a bad storage: now and then one rank gets batches that are far too large, or not numbers."""

import os
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from tolaria.errors import TaskError
from tolaria.task import Task
from tolaria.tasks import digits


class PoisonedDigits(Dataset[Any]):
    """The training images; batches are counted as this process reads them, and some come out spoiled, once."""

    def __init__(self, clean: digits.Digits, factors: dict[int, float]) -> None:
        self.clean = clean
        self.factors = factors
        self.batches = 0

    def __len__(self) -> int:
        return len(self.clean)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = self.clean.__getitems__(indices)
        if len(indices) > 1 and indices != list(range(indices[0], indices[0] + len(indices))):
            # Batches that try a new structure take the first images in order; training shuffles them.
            self.batches += 1
            return images * self.factors.get(self.batches, 1.0), labels
        return images, labels


def make_task(width: int = 2, rank: int = 1, huge: str = "", nan: str = "", factor: float = 1e4) -> Task:
    """The digits task with spoiled batches on one rank (without torchrun: in the one process).

    ``huge``, ``nan``: numbers of batches, parted by spaces, that come multiplied by ``factor`` or as no numbers; they
    count from 1 as that process reads them.
    """
    task = digits.make_task(width)
    here = os.environ.get("RANK")
    factors = dict.fromkeys(_numbers("huge", huge), factor) | dict.fromkeys(_numbers("nan", nan), float("nan"))
    bad = factors if here is None or int(here) == rank else {}
    return replace(task, train=PoisonedDigits(task.train, bad))  # type: ignore[arg-type]


def _numbers(key: str, text: str) -> list[int]:
    words = str(text).split()
    if not all(word.isdecimal() for word in words):
        raise TaskError(f"task.args.{key}={text!r}: expected numbers of batches, such as '150 151'")
    return [int(word) for word in words]
