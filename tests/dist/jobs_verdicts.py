"""Steps and structures in which one rank fares worse than the other, for test_verdicts.py."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.profiler import ProfilerActivity, profile

from tests.dist.jobs_resume import TRAIN_SAMPLES, Points, indices_of_step, make_config, make_task, own_rank
from tests.rig import Rig, tiny_config
from tolaria import build
from tolaria.dist import init_world
from tolaria.telemetry.summary import RunSummary


class Poisoned(Points):
    """Points of which the first is not a number when certain samples are read together."""

    def __init__(self, bad: Sequence[list[int]]) -> None:
        super().__init__(TRAIN_SAMPLES, seed=1)
        self.bad = bad

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        items = super().__getitems__(indices)
        if indices in self.bad:
            items[0] = (torch.full_like(items[0][0], float("nan")), items[0][1])
        return items


def told(summary: RunSummary) -> dict[str, Any]:
    """What the tests ask of a run, on one rank."""
    return {
        "outcome": summary.outcome,
        "digest": summary.state_digest[own_rank()],
        "skipped": summary.counters["skipped_steps"],
        "loss": summary.final.loss if summary.final is not None else None,
        "stages": {seed.slot: seed.stage for seed in summary.seeds},
    }


def train_with_bad_batches(folder: str, *, bad_rank: int, bad_steps: Sequence[int], **config: Any) -> dict[str, Any]:
    """Train; on one rank the batches of some steps hold a NaN."""
    bad = [indices_of_step(step) for step in bad_steps] if own_rank() == bad_rank else []
    task = replace(make_task(), train=Poisoned(bad))
    return told(build.train(make_config(folder, **config), task=lambda: task))


class FailingCompiler:
    """Stands in for inductor: compiles ``good`` graphs, and fails from then on."""

    def __init__(self, good: int) -> None:
        self.good = good
        self.asked = 0

    def __call__(self, graph: Any, inputs: Any, **_: Any) -> Any:
        """What dynamo calls for each graph."""
        self.asked += 1
        if self.asked > self.good:
            raise OSError("this rank's compiler is broken")
        return aot_eager(graph, inputs)


def train_with_broken_compiler(folder: str, *, bad_rank: int, good: int, **config: Any) -> dict[str, Any]:
    """Train compiled; on one rank the compiler fails after some graphs."""
    compiler = FailingCompiler(good if own_rank() == bad_rank else 1000)
    with patch("torch._inductor.compile_fx.compile_fx", compiler):
        summary = build.train(make_config(folder, compiled=True, **config), task=make_task)
    return {**told(summary), "asked": compiler.asked}


def count_reductions(accumulation: int) -> int:
    """All-reduces of one optimizer step."""
    world = init_world(device="cpu", timeout_s=40, control_timeout_s=40)
    config = tiny_config(accumulation=accumulation)
    with tempfile.TemporaryDirectory() as folder, Rig.build(Path(folder), world=world, config=config) as rig:
        rig.train(3)  # DDP settles its buckets in the first two
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            rig.train()
    world.close()
    return sum(event.count for event in recorded.key_averages() if event.key == "c10d::allreduce_")
