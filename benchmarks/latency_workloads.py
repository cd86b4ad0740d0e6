"""What the sides of step_latency.py train: three models on random data, and the gate that lets a side run for a while.

Every side reads the same data set through a DataLoader of its own. The data set asks the gate before each microbatch,
so that a side stands still, in every rank, until the driver gives it the next block of steps; nothing else in a side
knows that it is measured.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tolaria.task import Task
from tolaria.tasks.stdlib_gpt import ByteGPT

EPOCH_SAMPLES = 1_000_000
"""More than any measurement reads: no side comes to the end of an epoch."""
POOL = 1024


class Timer:
    """`tolaria.phases.Phases` that add up the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """One phase."""
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started  # type: ignore[assignment]


class Gate:
    """Lets one rank read so many microbatches at a time, and times them."""

    def __init__(self, driver: Connection, free: int, timer: Timer | None = None) -> None:
        """``free``: microbatches that are read without asking: warm-up. ``timer``: what to send beside the time."""
        self._driver = driver
        self._left = free
        self._timer = timer
        self._started = time.perf_counter()

    def ask(self) -> None:
        """Called before each microbatch."""
        if self._left:
            self._left -= 1
            return
        asked = time.perf_counter()
        elapsed = asked - self._started
        phases = dict(self._timer.seconds) if self._timer is not None else {}
        self._driver.send((elapsed, phases))
        self._left = self._driver.recv() - 1
        if self._timer is not None:
            self._timer.seconds.clear()
            # The phase that this waiting is a part of is not over yet.
            self._timer.seconds["data"] = asked - time.perf_counter()  # type: ignore[assignment]
        self._started = time.perf_counter()


class GatedData(Dataset[Any]):
    """Random samples, ``inputs[i], targets[i]``, read in batches."""

    def __init__(self, inputs: Tensor, targets: Tensor, size: int, gate: Gate | None = None) -> None:
        self.inputs = inputs
        self.targets = targets
        self.size = size
        self.gate = gate

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        if self.gate is not None:
            self.gate.ask()
        chosen = torch.tensor(indices) % len(self.inputs)
        return self.inputs[chosen], self.targets[chosen]


class Perceptron(nn.Module):
    """Three linear layers."""

    def __init__(self, features: int = 64, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features) -> logits (batch, classes)."""
        x = functional.relu(self.first(x))
        logits: Tensor = self.last(functional.relu(self.second(x)))
        return logits


class ConvNet(nn.Module):
    """Three convolutions with group norm, pooled."""

    def __init__(self, channels: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(
            nn.GroupNorm(4, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(4, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        )  # fmt: skip
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) -> logits (batch, classes)."""
        logits: Tensor = self.head(functional.relu(self.body(self.stem(x))).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Workload:
    """One problem. ``slot``: the path in the model where a seed of ``blueprint`` is grown, ``shape`` what flows there,
    of one sample; ``block``: steps of a turn."""

    name: str
    make_model: Callable[[], nn.Module]
    make_data: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    slot: str
    shape: tuple[int, ...]
    blueprint: str
    block: int

    def task(self, gate: Gate | None, *, slots: bool = False) -> Task:
        """The problem as Tolaria takes it; the other sides take model and data out of it."""
        torch.manual_seed(0)
        inputs, targets = self.make_data()
        return Task(
            model=self.make_model(),
            loss=losses,
            train=GatedData(inputs, targets, EPOCH_SAMPLES, gate),
            validation=GatedData(inputs, targets, self.batch),
            accuracy=accuracy,
            slots={"grown": self.slot} if slots else {},
            collate=as_it_is,
        )


def as_it_is(batch: Any) -> Any:
    """The data set gives whole batches."""
    return batch


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample (and token)."""
    flat = functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of a hand-written loop: its mean, which is one operation less."""
    return functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the class was guessed."""
    return (logits.argmax(-1) == targets).float()


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(256, (POOL, 64)), torch.randint(256, (POOL, 64))


def _features(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(POOL, *shape), torch.randint(10, (POOL,)))


def _gpt() -> nn.Module:
    return ByteGPT(layers=4, features=128, heads=4, context=64)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("mlp", Perceptron, _features(64), 32, "second", (128,), "residual_mlp", block=150),
        Workload("cnn", ConvNet, _features(3, 16, 16), 32, "stem", (32, 16, 16), "conv_residual", block=8),
        Workload("gpt", _gpt, _tokens, 8, "blocks.1", (64, 128), "residual_mlp", block=4),
    )
}
