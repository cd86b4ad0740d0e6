"""Loader processes that die or hang, killed and stopped for real, below the loader that a run uses."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tolaria import Task
from tolaria.config import DataConfig
from tolaria.data import Loader
from tolaria.errors import TaskError

SAMPLES = 24
PLAN = [([i, i + 1], [1.0, 1.0]) for i in range(0, SAMPLES, 2)]


class Faulty(Dataset[tuple[Tensor, Tensor]]):
    """Sample i is i. The process that loads sample ``at`` gets a signal, the first ``times`` times."""

    def __init__(self, folder: Path, number: int, at: int, times: int) -> None:
        self.folder, self.number, self.at, self.times = folder, number, at, times

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at and len(self.struck()) < self.times:
            (self.folder / f"struck-{os.getpid()}").touch()
            os.kill(os.getpid(), self.number)
        return torch.tensor([float(index)]), torch.zeros(())

    def struck(self) -> list[Path]:
        return list(self.folder.glob("struck-*"))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[list[float], list[dict[str, Any]], Faulty]]:
    def run(number: int, *, times: int = 1) -> tuple[list[float], list[dict[str, Any]], Faulty]:
        data, told = Faulty(tmp_path, number, 10, times), list[dict[str, Any]]()
        task = Task(model=nn.Linear(1, 1), loss=_zero, accuracy=_zero, train=data, validation=data)
        config = DataConfig(num_workers=2, timeout_s=1.5)
        loader = Loader(task, config, torch.device("cpu"), lambda kind, level, **more: told.append(more))
        seen = [x for batch in loader.batches(data, PLAN) for x in batch.inputs[:, 0].tolist()]
        return seen, told, data

    return run


def _zero(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.zeros(len(outputs))


@pytest.mark.parametrize(("number", "why"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "no batch within 1.5 s")])
def test_every_batch_comes_once_although_a_loader_process_is_lost(
    load: Callable[..., tuple[Sequence[float], list[dict[str, Any]], Faulty]], number: int, why: str
) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    seen, told, data = load(number)
    assert len(data.struck()) == 1
    assert seen == list(map(float, range(SAMPLES)))
    (event,) = told
    # Sample 10 is in batch 5; batches in flight when the process was lost are loaded again.
    assert why in event["reason"] and event["batch"] <= 5
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_processes_that_are_lost_every_time_are_an_error_of_the_task(load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="a loader process died, 4 times in one pass"):
        load(signal.SIGKILL, times=99)
    assert len(list(tmp_path.glob("struck-*"))) == 4
