"""Policies and a task for recorded runs that go wrong on purpose."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.utils.data import Dataset

from tests.faults import held_task
from tolaria import Task
from tolaria.leyline.types import Command, FieldReport, SystemState
from tolaria.tamiyo.policy import Policy, boundary_of

SILENT_FROM, SILENT_UNTIL = 2, 6
SLOW_S = 0.04


class Silent(Policy):
    """Says nothing in time at some boundaries."""

    version = "silent-1"

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        if SILENT_FROM <= boundary_of(state) < SILENT_UNTIL:
            time.sleep(3)
        return []


class SlowOnRank1(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches of another data set; rank 1 waits for them."""

    def __init__(self, inner: held_task.HeldData) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        if os.environ.get("RANK") == "1":
            time.sleep(SLOW_S)
        return self.inner.__getitems__(indices)


def make_slow_task() -> Task:
    """The held task, with a rank whose data is slow."""
    task = held_task.make_task()
    assert isinstance(task.train, held_task.HeldData)
    return replace(task, train=SlowOnRank1(task.train))
