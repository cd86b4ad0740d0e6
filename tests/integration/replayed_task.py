"""The task of `tests.faults.held_task` with two samples that are no numbers, whenever and however often they are read.

In the order of run seed 0 with 8 samples a step, steps 46 and 47 read one each; nowhere else do two such steps follow.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.faults import held_task
from tests.faults.held_task import HeldData
from tolaria import Task

BAD_SAMPLES = (29, 44)


class TwoBad(Dataset[Any]):
    """Gives whole batches, as the data that it is made from."""

    def __init__(self, data: HeldData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        inputs, targets = self.data.__getitems__(indices)
        bad = torch.tensor([index in BAD_SAMPLES for index in indices])
        return inputs.masked_fill(bad[:, None], float("nan")), targets


def make_task(**held: Any) -> Task:
    """Arguments as those of `held_task.make_task`."""
    task = held_task.make_task(**held)
    assert isinstance(task.train, HeldData)
    return replace(task, train=TwoBad(task.train))
