"""Jobs for test_growth.py: growth on real ranks. Each runs on every rank and returns what that rank saw."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.rig import Rig, alone, host_momentum, make_task, same_bits, tiny_config, way
from tolaria import build
from tolaria.config import CheckpointConfig, Config, DistConfig, LogConfig, RunConfig, TamiyoConfig, TrainConfig
from tolaria.config_aggregate import AggregateConfig
from tolaria.coordinator.plan import Outcome
from tolaria.dist import init_world
from tolaria.kasmina.blueprints import LowRank, register_blueprint
from tolaria.leyline.types import Command, SeedStage
from tolaria.tamiyo import policy as do


@contextmanager
def joined(config: Config | None = None, **task_args: Any) -> Iterator[Rig]:
    """A rig over all ranks."""
    world = init_world(device="cpu", timeout_s=30, control_timeout_s=30)
    with (
        tempfile.TemporaryDirectory() as folder,
        Rig.build(Path(folder), world=world, config=config, **task_args) as rig,
    ):
        yield rig
    world.close()


def digests(rig: Rig) -> list[str]:
    """The state digest of every rank."""
    return [digest.hex() for digest in rig.world.peers.gather_digests(rig.state.digest())]


def in_mode(mode: str, config: Config) -> Config:
    """The configuration with an ``aggregate.mode`` in which the samples are dealt to the seeds."""
    return replace(config, aggregate=AggregateConfig(mode=mode, attribution="kasmina"))  # type: ignore[arg-type]


def must(rig: Rig, *commands: Command) -> None:
    """A boundary whose commands are all applied."""
    applied = rig.boundary(*commands)
    assert all(outcome.applied for outcome in applied.outcomes), applied.outcomes


# Two ranks against one process


def against_one_process() -> dict[str, Any]:
    """The same run on all ranks and in one process with batches as large as theirs together, compared."""
    with joined(tiny_config(batch_size=4, accumulation=2)) as rig, tempfile.TemporaryDirectory() as folder:
        config = tiny_config(batch_size=4 * rig.world.world_size, accumulation=2)
        with Rig.build(Path(folder), world=alone(), config=config) as single:
            distances = [_distance(rig, single)]
            for each in (rig, single):
                each.train(10)
            distances.append(_distance(rig, single))
            for each in (rig, single):
                each.grow("early", SeedStage.FOSSILIZED)
                each.grow("late", SeedStage.BLENDING)
            distances.append(_distance(rig, single))
        return {
            "distances": distances,
            "filled": rig.state.sampler.num_samples % rig.state.sampler.group_size,
            "epochs": rig.state.sampler.epoch,
            "digests": digests(rig),
        }


def _distance(one: Rig, other: Rig) -> float:
    """Largest difference of any tensor of two runs, optimizer state included, relative to its largest value."""
    first, second = one.state.tensors(), other.state.tensors()
    assert first.keys() == second.keys()
    worst = 0.0
    for name, tensor in first.items():
        a, b = tensor.double(), second[name].double()
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)))
    return worst


# A whole run


def whole_run(folder: str, script: str, steps: int) -> dict[str, Any]:
    """`tolaria.build.train` with a scripted policy."""
    base = tiny_config()
    config = Config(
        run=RunConfig(name="grown", dir=f"{folder}/run", seed=11),
        train=TrainConfig(epochs=10_000, max_steps=steps, batch_size=4, boundary_steps=10),
        precision=base.precision,
        compile=base.compile,
        optim=base.optim,
        lr=base.lr,
        kasmina=base.kasmina,
        tamiyo=TamiyoConfig(policy=f"script:{script}"),
        checkpoint=CheckpointConfig(every=0),
        dist=DistConfig(device="cpu", timeout_s=30, control_timeout_s=30, threads=1),
        log=LogConfig(progress="off"),
    )
    summary = build.train(config, task=partial(make_task, dropout=0.1, batch_norm=True))
    return {
        "steps": summary.steps,
        "digests": summary.state_digest,
        "commands": [record.what for record in summary.commands],
        "refused": [(record.what, record.effect) for record in summary.commands if record.outcome == "refused"],
        "stages": {seed.slot: seed.stage for seed in summary.seeds},
        "parameters": [summary.parameters_start, summary.parameters_end],
    }


# Every command: momentum, digests, collectives


def walk(signal: str, mode: str = "sum") -> dict[str, Any]:
    """One seed to FOSSILIZED with fine-tuning, another one to BLENDING and culled; what each command left behind."""
    commands = [
        do.germinate("early", "residual_mlp"),
        do.start_training("early"),
        do.germinate("late", "residual_mlp"),
        do.start_training("late"),
        do.start_grafting("early"),
        do.start_grafting("late"),
        do.stabilize("early"),
        do.cull("late"),
        do.evaluate("early"),
        do.fine_tune("early"),
        do.fossilize("early"),
    ]
    with joined(in_mode(mode, tiny_config(signal=signal, output_ratio=1e6))) as rig:
        rig.train(4)
        told: list[dict[str, Any]] = []
        for command in commands:
            rig.state.boundary += 1
            rig.state.kasmina.tick(rig.state.left_overs)
            rig.boundary()
            before = host_momentum(rig.state)
            applied = rig.apply(command)
            after = host_momentum(rig.state)
            unequal = [n for n in before if n not in after or not same_bits(before[n], after[n])]
            in_the_first_step = collectives(rig)
            rig.train(3)  # DDP settles its buckets in the second step after it was made
            told.append({
                "command": applied.outcomes[0].code,
                "moments": len(before),
                "unequal": unequal + sorted(after.keys() - before.keys()),
                "equal_ranks": len(set(digests(rig))) == 1,
                "expected": {"gloo:all_reduce": 1 + bool(rig.replica.shadows)},
                "first": in_the_first_step,
                "settled": collectives(rig),
            })  # fmt: skip
        return {"told": told, "stages": [s.stage.name for s in rig.state.kasmina.seeds.values()]}


def collectives(rig: Rig) -> dict[str, int]:
    """The collectives of the next step, by name."""
    return collectives_of(partial(rig.train, 1))


def collectives_of(work: Callable[[], object]) -> dict[str, int]:
    """The collectives of something, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
        # gloo's own thread notes the end of a collective, a little after the ranks have gone on.
        time.sleep(0.05)
    return dict(Counter(event.name for event in seen.events() if event.name.startswith("gloo:")))


def wrapping() -> dict[str, Any]:
    """The collectives of making a wrapper, at the start and later; then a step."""
    with joined() as rig:
        rig.train(2)
        found = {
            "later": collectives_of(partial(rig.replica.rebuild, afresh=True)),
            "first": collectives_of(partial(rig.replica.rebuild, first=True)),
        }
        rig.train(3)
        return {**found, "digests": digests(rig)}


# Faults on one rank


class Faulty(nn.Module):
    """A low-rank seed that fails where it is told to, on the last rank only."""

    armed = ""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        if self.armed == "build":
            raise RuntimeError("injected: cannot be built")
        self.seed = LowRank(shape)
        if self.armed == "weights":
            nn.init.ones_(self.seed.down.weight)
        if self.armed == "regroup":
            self.count = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.armed == "device":
            raise torch.OutOfMemoryError("injected: no room on the device")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """What Kasmina calls when the stage changes."""
        if self.armed == "settle":
            Faulty.armed = ""  # once: the way back must not fail as well
            raise RuntimeError("injected: cannot be settled")
        return super().requires_grad_(requires_grad)

    def forward(self, h: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        if self.armed == "forward" and self.training and torch.is_grad_enabled():
            raise RuntimeError("injected: cannot be run")
        f: Tensor = self.seed(h)
        return f


def fault_on_one_rank(fault: str, at: str, signal: str, mode: str = "sum") -> dict[str, Any]:
    """Command a seed up to the stage ``at``; at that command the last rank fails. Then train on.

    An untouched twin of the run takes the same steps and boundaries without that command.
    """
    register_blueprint("faulty", Faulty)
    with (
        joined(in_mode(mode, tiny_config(signal=signal))) as rig,
        tempfile.TemporaryDirectory() as folder,
        Rig.build(Path(folder), world=rig.world, config=rig.config) as twin,
    ):
        command = _walk_together((rig, twin), at)
        rig.boundary()
        before = digests(rig)
        outcome = _apply_with_fault(rig, command, fault)
        after = digests(rig)
        twin.boundary()
        for each in (rig, twin):
            each.train(5)
        trained = {"with": digests(rig), "without": digests(twin), "collectives": collectives(rig)}
        again = rig.boundary(command).outcomes[0]  # now that the fault is gone
        rig.train(3)
        return {
            "outcome": [outcome.code, outcome.reason],
            "refused": not outcome.applied,
            "before": before,
            "after": after,
            **trained,
            "again": again.applied,
            "end": digests(rig),
        }


def _walk_together(rigs: tuple[Rig, Rig], at: str) -> Command:
    """Bring both to the stage before ``at``; the command that leads there."""
    for each in rigs:
        each.train(3)
    for stage, command in way("early", "faulty"):
        if stage.name == at:
            return command
        for each in rigs:
            must(each, command)
            each.train(4)
    raise AssertionError(f"no way to {at}")


def _apply_with_fault(rig: Rig, command: Command, fault: str) -> Outcome:
    Faulty.armed = fault if rig.world.global_rank == rig.world.world_size - 1 else ""
    try:
        return rig.apply(command).outcomes[0]
    finally:
        Faulty.armed = ""
