"""What does it cost to know whose gradients are whose?

A byte-level GPT (4 blocks, a slot after each) with 0, 1, 2 and 4 BLENDING seeds, to which its samples are dealt. One
optimizer step of each mode, sides in turns, as a ratio to `sum` with the same seeds: the median over the turns, with
the quartiles, and how many backward passes a step has. In one process, or under torchrun over all its ranks.

    python benchmarks/aggregate.py              256 features, 40 turns
    python benchmarks/aggregate.py --quick      64 features, 8 turns
    python benchmarks/aggregate.py --compiled   compiled steps (minutes for the graphs)
    torchrun --nproc_per_node=2 benchmarks/aggregate.py
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tolaria.config import CompileConfig, Config, KasminaConfig, PrecisionConfig, TrainConfig
from tolaria.config_aggregate import AggregateConfig
from tolaria.data import Loader
from tolaria.dist import World, init_world
from tolaria.fence import Verdict
from tolaria.leyline.types import Command
from tolaria.objective import Batch
from tolaria.replica import Replica
from tolaria.setup import build_state
from tolaria.state import TrainState
from tolaria.step import TrainStep
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity
from tolaria.task import Task
from tolaria.tasks import stdlib_gpt
from tolaria.telemetry.events import EventLog

MODES = ("sum", "weighted", "pcgrad")
SEEDS = (0, 1, 2, 4)
LAYERS = 4


@dataclass
class Side:
    """One mode, ready to take steps on one group of microbatches over and over."""

    mode: str
    state: TrainState
    replica: Replica
    step: TrainStep
    group: list[Batch]

    def take(self) -> float:
        """One step; its seconds."""
        if self.replica.world.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.step(self.group, lambda: Verdict(stop_signal=0, level=0))
        if self.replica.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def grow(self, slot: str) -> None:
        """A seed in a slot, up to BLENDING, in as many steps as the gates ask for."""
        for number, command in enumerate(
            (do.germinate(slot, "low_rank"), do.start_training(slot), do.start_grafting(slot))
        ):
            self.take()
            self.state.kasmina.read_norms()
            self._apply(with_identity(command, f"{slot}-{number}", issued_by="benchmark", issued_at_ns=1))
            self.replica.warm_up(lambda _size: self.group[0])

    def _apply(self, command: Command) -> None:
        kasmina = self.state.kasmina
        kasmina.apply(kasmina.plan(command))
        self.state.regroup()
        self.replica.rebuild()

    def backwards(self) -> int:
        """Backward passes of one step."""
        calls = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                return function(*args, **kwargs)

            return call

        autograd = torch.autograd
        with (
            patch.object(autograd, "backward", counted(autograd.backward)),
            patch.object(autograd, "grad", counted(autograd.grad)),
        ):
            self.take()
        return calls


def make_task(features: int) -> Task:
    """The GPT with a slot after each block."""
    task = stdlib_gpt.make_task(layers=LAYERS, features=features, context=64, max_train_bytes=100_000)
    return replace(task, slots={f"slot{i}": f"blocks.{i}" for i in range(LAYERS)})


@contextmanager
def sides(world: World, features: int, batch_size: int, *, compiled: bool) -> Iterator[list[Side]]:
    """One side for each mode, all with the same weights and data."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            config = Config(
                train=TrainConfig(batch_size=batch_size),
                precision=PrecisionConfig(amp="bf16" if world.device.type == "cuda" else "off"),
                compile=CompileConfig(enabled=compiled),
                kasmina=KasminaConfig(gradient_window=1, blend_steps=1_000_000),
                aggregate=AggregateConfig(mode=mode, attribution="kasmina"),  # type: ignore[arg-type]
            )
            torch.manual_seed(0)
            task = make_task(features)
            loader = Loader(task, config.data, world.device, emit=lambda *_, **__: None)
            state, _ = build_state(config, task, world, loader)
            events = EventLog(Path(folder) / f"{mode}.jsonl", world.global_rank, run_id="benchmark")
            replica = Replica(state, world, config, events)
            replica.rebuild(first=True)
            group = list(loader.batches(task.train, state.sampler.remaining()[:1]))
            replica.warm_up(lambda _size, first=group[0]: first)
            step = TrainStep(state, replica, events, debug=False)
            made.append(Side(mode, state, replica, step, group))
        yield made
        for side in made:
            side.replica.close()
            side.step.events.close()


def measure(made: list[Side], turns: int) -> dict[str, list[float]]:
    """Seconds of a step of each side, turn by turn."""
    seconds: dict[str, list[float]] = {side.mode: [] for side in made}
    for turn in range(turns + 2):
        for side in made if turn % 2 else reversed(made):
            taken = side.take()
            if turn >= 2:
                seconds[side.mode].append(taken)
    return seconds


def main() -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 features, 8 turns")
    parser.add_argument("--compiled", action="store_true", help="compile the steps")
    options = parser.parse_args()
    features, turns, batch_size = (64, 8, 8) if options.quick else (256, 40, 8)
    torch.set_num_threads(1)
    world = init_world()

    def say(text: str) -> None:
        if world.is_coordinator:
            print(text, flush=True)

    say(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {world.device}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {world.world_size} ranks of one thread, "
        f"{'compiled' if options.compiled else 'eager'}, batch {batch_size} x 64 bytes a rank"
    )
    with sides(world, features, batch_size, compiled=options.compiled) as made:
        say(f"{sum(p.numel() for p in made[0].state.host_parameters.values()):,} parameters of the host\n")
        say(f"{'seeds':>5}  {'mode':<9}{'ms a step':>10}{'ratio to sum':>14}{'quartiles':>15}{'backward passes':>17}")
        grown = 0
        for seeds in SEEDS:
            for slot in range(grown, seeds):
                for side in made:
                    side.grow(f"slot{slot}")
            grown = seeds
            seconds = measure(made, turns)
            for side in made:
                pairs = zip(seconds[side.mode], seconds["sum"], strict=True)
                low, middle, high = statistics.quantiles([own / plain for own, plain in pairs], n=4)
                say(
                    f"{seeds:>5}  {side.mode:<9}{statistics.median(seconds[side.mode]) * 1e3:>10.1f}{middle:>14.2f}"
                    f"{f'{low:.2f} - {high:.2f}':>15}{side.backwards():>17}"
                )
    world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
