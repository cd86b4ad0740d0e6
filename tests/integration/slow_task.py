"""Digits, from a storage that takes its time on one rank."""

import os
import time
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from tolaria import Task
from tolaria.tasks import digits


class Slow(Dataset[Any]):
    """Each batch takes ``delay_s`` longer."""

    def __init__(self, data: Any, delay_s: float) -> None:
        self.data = data
        self.delay_s = delay_s

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> Any:
        time.sleep(self.delay_s)
        return self.data.__getitems__(indices)


def make_task(rank: int = 0, delay_s: float = 0.05) -> Task:
    task = digits.make_task()
    if os.environ.get("RANK", "0") != str(rank):
        return task
    return replace(task, train=Slow(task.train, delay_s))
