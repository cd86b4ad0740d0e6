"""Runs that are stopped and continued, for test_resume.py; under two ranks as jobs, in one process called directly.

The task draws random numbers wherever a run can: in the data (torch, numpy, Python), in the host's dropout and in
the seed's; and it keeps running statistics in both.
"""

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tolaria import build
from tolaria.config import (
    CheckpointConfig,
    CompileConfig,
    Config,
    DistConfig,
    KasminaConfig,
    LogConfig,
    LRConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    TamiyoConfig,
    TrainConfig,
)
from tolaria.config_aggregate import AggregateConfig
from tolaria.data import EpochSampler
from tolaria.kasmina.blueprints import register_blueprint
from tolaria.kasmina.slot import Slot
from tolaria.recovery.fsops import FileOps
from tolaria.task import Task

SEED = 5
FEATURES, WIDTH, CLASSES = 4, 6, 3
TRAIN_SAMPLES, VALIDATION_SAMPLES = 37, 10
BATCH = 4
BOUNDARY_STEPS = 3
CHECKPOINT_THREAD = "tolaria-checkpoint"
DISTRIBUTED = DistConfig(device="cpu", timeout_s=40, control_timeout_s=40, threads=1)
SILENT = LogConfig(progress="off")


class NoisySeed(nn.Module):
    """A seed with running statistics and dropout of its own, not zero at its start."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(shape[-1])
        self.inner = nn.Linear(shape[-1], 5)
        self.dropout = nn.Dropout(0.3)
        self.outer = nn.Linear(5, shape[-1])

    def forward(self, h: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        f: Tensor = self.outer(self.dropout(torch.tanh(self.inner(self.norm(h)))))
        return f


class NoisyHost(nn.Module):
    """Two layers with a slot each, batch norm and dropout between them."""

    def __init__(self, width: int, first_slot: str) -> None:
        super().__init__()
        self.inlet = nn.Linear(FEATURES, width)
        self.first = Slot(first_slot)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.4)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, FEATURES) -> logits (batch, CLASSES)."""
        h = self.dropout(self.norm(self.first(torch.tanh(self.inlet(x)))))
        logits: Tensor = self.head(torch.relu(self.middle(h)))
        return logits


Watch = Callable[[list[int]], None]


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Points of fixed classes, moved a little at random whenever they are read; ``watch`` is told what is read."""

    def __init__(self, count: int, *, seed: int, watch: Watch = lambda indices: None) -> None:
        self.points = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
        self.classes = (self.points[:, 0] * self.points[:, 1] > 0).long() + (self.points[:, 2] > 1).long()
        self.watch = watch

    def __len__(self) -> int:
        return len(self.points)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        self.watch(indices)
        return [self[i] for i in indices]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = torch.randn(FEATURES) + float(np.random.rand()) + random.random()
        return self.points[index] + 0.1 * shift, self.classes[index]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """One loss per sample, (batch,)."""
    return functional.cross_entropy(logits, targets, reduction="none")


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit is the target's, (batch,)."""
    return (logits.argmax(1) == targets).float()


def make_task(*, width: int = WIDTH, first_slot: str = "first", watch: Watch = lambda indices: None) -> Task:
    """Two slots: ``first_slot`` in the model, "second" attached by path."""
    register_blueprint("noisy", NoisySeed, ranks=[1])
    return Task(
        model=NoisyHost(width, first_slot),
        loss=cross_entropy,
        train=Points(TRAIN_SAMPLES, seed=1, watch=watch),
        validation=Points(VALIDATION_SAMPLES, seed=2),
        accuracy=accuracy,
        slots={"second": "middle"},
    )


def run_config(folder: str, *, resume: bool, accept_changes: bool = False) -> RunConfig:
    """A run in ``folder``: a new one, or the one that is there."""
    return RunConfig(
        seed=SEED, dir="" if resume else folder, resume=folder if resume else "no", accept_changes=accept_changes
    )


def make_config(
    folder: str,
    *,
    script: str = "",
    resume: bool = False,
    accept_changes: bool = False,
    steps: int = 27,
    compiled: bool = False,
    optimizer: str = "adamw",
    accumulation: int = 1,
    mode: str = "sum",
) -> Config:
    """bf16, a boundary and a checkpoint every three steps, gates that open for every seed that was measured."""
    policy = TamiyoConfig(policy=f"script:{script}" if script else "none", deadline_ms=15_000)
    gates = KasminaConfig(
        gradient_window=2, blend_steps=4, max_loss_ratio=1e9, min_contribution=-1e9, output_ratio=1e9
    )  # fmt: skip
    return Config(
        run=run_config(folder, resume=resume, accept_changes=accept_changes),
        train=TrainConfig(
            epochs=100, max_steps=steps, batch_size=BATCH, accumulation=accumulation, boundary_steps=BOUNDARY_STEPS
        ),
        precision=PrecisionConfig(amp="bf16"),
        compile=CompileConfig(enabled=compiled, cache="torch"),  # compiling everything anew takes minutes
        optim=OptimConfig(name=optimizer, lr=0.02),
        lr=LRConfig(policy="cosine", warmup_steps=4, seed_warmup_steps=5),
        kasmina=gates,
        aggregate=AggregateConfig(mode=mode, attribution="kasmina"),  # type: ignore[arg-type]
        tamiyo=policy,
        checkpoint=CheckpointConfig(every=1, keep=3),
        dist=DISTRIBUTED,
        log=SILENT,
    )


def own_rank() -> int:
    """This process's rank, 0 without others."""
    return int(os.environ.get("RANK", "0"))


def indices_of_step(step: int, samples: int = TRAIN_SAMPLES, accumulation: int = 1) -> list[int]:
    """What this rank reads first for an optimizer step; the first step is 1."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    sampler = EpochSampler(
        samples, seed=SEED, rank=own_rank(), world_size=world_size, batch_size=BATCH, accumulation=accumulation
    )
    sampler.epoch, position = divmod(step - 1, sampler.steps_per_epoch)
    indices, _ = sampler.remaining()[position * accumulation]
    return indices


class StopAt:
    """Sends this process SIGTERM when it reads certain samples."""

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def __call__(self, indices: list[int]) -> None:
        """A dataset's watch."""
        if indices == self.indices:
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    folder: str, *, stop_step: int = 0, stop_rank: int = 0, task: dict[str, Any] | None = None, **config: Any
) -> dict[str, Any]:
    """Train. With ``stop_step`` the process of ``stop_rank`` alone gets SIGTERM while it reads that step's samples."""
    watch: Watch = lambda indices: None  # noqa: E731
    if stop_step and own_rank() == stop_rank:
        watch = StopAt(indices_of_step(stop_step, accumulation=config.get("accumulation", 1)))
    with torch._inductor.config.patch(compile_threads=1):  # no processes of the compiler's own
        summary = build.train(make_config(folder, **config), task=lambda: make_task(watch=watch, **(task or {})))
    return {
        "outcome": summary.outcome,
        "steps": summary.steps,
        "digest": summary.state_digest[own_rank()],
        "stages": {seed.slot: seed.stage for seed in summary.seeds},
        "alphas": {seed.slot: seed.alpha for seed in summary.seeds},
        "lives": [[s.command_id, s.stage, s.born_step, s.ended_step, s.contribution, s.contribution_noise, s.train_flops]
                  for s in summary.seeds],
    }  # fmt: skip


# Which samples were seen: each has a parameter of its own, from which its weight in the loss is subtracted.


class Counts(nn.Module):
    """``model(indices)``: the parameters of these samples, which are their losses."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(samples))

    def forward(self, indices: Tensor) -> Tensor:
        """(batch,) -> (batch,)."""
        return self.seen[indices]


class Indices(Dataset[tuple[int, int]]):
    """Sample i is i; ``watch`` is told what is read."""

    def __init__(self, samples: int, watch: Watch = lambda indices: None) -> None:
        self.samples = samples
        self.watch = watch

    def __len__(self) -> int:
        return self.samples

    def __getitems__(self, indices: list[int]) -> list[tuple[int, int]]:
        self.watch(indices)
        return [self[i] for i in indices]

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, 0


def own_output(outputs: Tensor, targets: Tensor) -> Tensor:
    """The model's output is the loss, and the accuracy too."""
    return outputs


def count_config(folder: str, *, resume: bool = False, epochs: int = 1) -> Config:
    """Plain SGD with rate 1 and nothing else."""
    return Config(
        run=run_config(folder, resume=resume, accept_changes=resume),
        train=TrainConfig(epochs=epochs, batch_size=BATCH, clip_norm=0),
        precision=PrecisionConfig(amp="off"),
        compile=CompileConfig(enabled=False),
        optim=OptimConfig(name="sgd", lr=1.0, momentum=0, weight_decay=0),
        lr=LRConfig(policy="constant"),
        tamiyo=TamiyoConfig(policy="none"),
        dist=DISTRIBUTED,
        log=SILENT,
    )


def count_samples(folder: str, *, resume: bool = False, stop_step: int = 0) -> list[float]:
    """Train one epoch by plain SGD with rate 1. Minus the parameters is, by sample, the weight it was seen with."""
    watch = StopAt(indices_of_step(stop_step)) if stop_step else lambda indices: None
    model = Counts(TRAIN_SAMPLES)
    config = count_config(folder, resume=resume)

    def make_counting_task() -> Task:
        return Task(
            model=model, loss=own_output, train=Indices(TRAIN_SAMPLES, watch), validation=Indices(3),
            accuracy=own_output,
        )  # fmt: skip

    build.train(config, task=make_counting_task)
    return [-value for value in model.seen.tolist()]


# A disk that is full for a while.


class Between:
    """Calls ``begin`` while one step's samples are read and ``end`` at a later one's, each with no save under way."""

    def __init__(self, first_step: int, begin: Callable[[], None], last_step: int, end: Callable[[], None]) -> None:
        self.actions = [(indices_of_step(first_step), begin), (indices_of_step(last_step), end)]

    def __call__(self, indices: list[int]) -> None:
        """A dataset's watch."""
        for at, action in self.actions:
            if indices == at:
                wait_for_checkpoint()
                action()


def wait_for_checkpoint(deadline_s: float = 20.0) -> None:
    """Until this process writes no checkpoint."""
    end = time.monotonic() + deadline_s
    while any(thread.name == CHECKPOINT_THREAD for thread in threading.enumerate()):
        assert time.monotonic() < end, "the checkpoint is still being written"
        time.sleep(0.005)


class FullDisk(FileOps):
    """No space for new files while ``full``."""

    full = False
    refused = 0

    def allocate(self, fd: int, size: int) -> None:
        """Reserve space, or not."""
        if FullDisk.full:
            FullDisk.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(fd, size)


def train_on_full_disk(folder: str, *, first_step: int, last_step: int, steps: int) -> dict[str, Any]:
    """Train while rank 1 alone cannot write new files from one step to another."""
    FullDisk.full, FullDisk.refused = False, 0

    def set_full(full: bool) -> None:
        FullDisk.full = full and own_rank() == 1

    # The other rank waits for its writer as well, or the save at the next boundary might find it busy.
    watch = Between(first_step, lambda: set_full(True), last_step, lambda: set_full(False))
    with patch("tolaria.outfit.FileOps", FullDisk):
        summary = build.train(make_config(folder, steps=steps), task=lambda: make_task(watch=watch))
    return {
        "outcome": summary.outcome, "digest": summary.state_digest[own_rank()], "refused": FullDisk.refused,
        "counters": summary.counters,
    }  # fmt: skip


def ballast(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """What fills the file system of ``folder`` to the last byte, and what makes room again."""
    file = folder / "ballast"

    def fill() -> None:
        with file.open("wb", buffering=0) as out:
            try:
                while out.write(bytes(65536)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017 - the loop has no other end

    return fill, file.unlink
