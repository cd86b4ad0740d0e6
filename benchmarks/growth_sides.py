"""One run of growth.py: a side of a problem, trained, with everything that it computed counted.

Operations are counted where they happen, by torch's FlopCounterMode: the first step of every structure runs under it,
forward, backward and shadow branches with what they really do, and every later step of that structure adds the same.
Boundaries are counted whole; what all sides do alike, one validation of the model, is taken off, and what the grown
side does beyond that (counterfactual validations, measuring signals) stays and is charged to it.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from growth_problems import PROBLEMS, Problem, score, with_seeds
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tolaria import build
from tolaria.data import dataset_size
from tolaria.measure import Evaluator, Report
from tolaria.step import StepResult, TrainStep
from tolaria.task import Task

SIDES = ("small", "grown", "large", "small, same FLOPs", "large, same FLOPs")


@dataclass(frozen=True)
class Point:
    """A boundary: operations so far, and the loss on the policy's validation and on the report split."""

    step: int
    flops: float
    policy_loss: float
    report_loss: float


@dataclass(frozen=True)
class Result:
    """One run. Losses in nats per sample or byte; ``flops``: all that training took, of which ``extra_flops`` went
    into measuring seeds; ``kept``: slot -> blueprint of the seeds in the model at the end."""

    problem: str
    side: str
    run_seed: int
    report_loss: float
    report_accuracy: float
    parameters: int
    steps: int
    flops: float
    extra_flops: float
    seconds: float
    kept: dict[str, str]
    points: list[Point] = field(default_factory=list)
    story: list[str] = field(default_factory=list)


class Meter:
    """Operations of one run, and its points."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.training = 0.0
        self.extra = 0.0
        self.points: list[Point] = []
        self._step_flops: dict[Any, int] = {}

    def step(self, parts: TrainStep, group: Sequence[Any], run: Any) -> StepResult:
        """Run one optimizer step, counting it if its structure is new."""
        kasmina = parts.state.kasmina
        learning = tuple(seed.slot for seed in kasmina.learning_seeds())
        shadows = tuple((seed.slot, seed.blueprint) for seed in kasmina.shadow_seeds())
        key = (kasmina.structure(), learning, shadows, tuple(len(batch.weights) for batch in group))
        if key in self._step_flops:
            result: StepResult = run()
        else:
            with counting() as counter:
                result = run()
            self._step_flops[key] = counter.get_total_flops()
        self.training += self._step_flops[key]
        return result

    def boundary(self, parts: Evaluator, run: Any) -> Report:
        """Measure one boundary and score the report split, which nothing else gets to know."""
        with counting() as counter:
            report: Report = run()
        with counting() as plain:
            loss, _ = score(parts.task, self.problem.report)
        per_sample = plain.get_total_flops() / len(self.problem.report)
        batch = self.problem.config.data.validation_batch_size
        filled_up = -(-dataset_size(parts.task.validation, "validation") // batch) * batch
        self.extra += counter.get_total_flops() - per_sample * filled_up
        self.points.append(Point(parts.state.step, self.training + self.extra, report.val_loss, loss))
        return report


def counting() -> FlopCounterMode:
    """torch's counter, with the CPU's kernel of attention, which it does not know."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    mapping = {attention: forward, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def run_side(
    problem: Problem, side: str, run_seed: int, *, kept: dict[str, str] | None = None, flops: float | None = None
) -> Result:
    """Train one side. ``kept``: the seeds that "large" has from the start; ``flops``: what a run may take, about."""
    config = replace(problem.config, run=replace(problem.config.run, seed=run_seed))
    if side != "grown":
        config = replace(config, tamiyo=replace(config.tamiyo, policy="none", args={}))
    made: list[Task] = []

    def make_task() -> Task:
        made.append(with_seeds(problem.make(), kept) if kept else problem.make())
        return made[0]

    if flops is not None:
        steps = max(1, round(flops / step_flops(problem, kept)))
        config = replace(config, train=replace(config.train, max_steps=steps, epochs=1_000_000))
    meter = Meter(problem)

    class CountedStep(TrainStep):
        def __call__(self, group: Any, close_fence: Any) -> StepResult:
            return meter.step(self, group, lambda: super(CountedStep, self).__call__(group, close_fence))

    class CountedEvaluator(Evaluator):
        def measure(self, *args: Any, **kwargs: Any) -> Report:
            return meter.boundary(self, lambda: super(CountedEvaluator, self).measure(*args, **kwargs))

    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, root=folder), task=replace(config.task, args={}))
        start = time.perf_counter()
        with patch.multiple(build, TrainStep=CountedStep, Evaluator=CountedEvaluator):
            summary = build.train(config, task=make_task)
        seconds = time.perf_counter() - start
    loss, accuracy = score(made[0], problem.report)
    return Result(
        problem.name, side, run_seed, loss, accuracy, summary.parameters_end, summary.steps,
        meter.training + meter.extra, meter.extra, seconds,
        {s.slot: s.blueprint for s in summary.seeds if s.stage == "FOSSILIZED"}, meter.points,
        [f"step {c.step}: {c.what}: {c.reason} ({c.outcome}; {c.effect})" for c in summary.commands],
    )  # fmt: skip


def step_flops(problem: Problem, kept: dict[str, str] | None) -> int:
    """Operations of one optimizer step of the host, with the seeds of ``kept`` in it."""
    task = with_seeds(problem.make(), kept) if kept else problem.make()
    inputs, targets = task.train.__getitems__(list(range(problem.config.train.batch_size)))  # type: ignore[attr-defined]
    with counting() as counter:
        task.loss(task.model(inputs), targets).mean().backward()
    return int(counter.get_total_flops())


def run_all(name: str, run_seed: int, flags: Sequence[str], sides: Sequence[str] = SIDES) -> list[Result]:
    """The sides of one problem and run seed, one after the other. Runs in a process of its own."""
    torch.set_num_threads(1)
    problem = PROBLEMS[name](flags)
    results: dict[str, Result] = {}
    for side in sides:
        grown = results.get("grown")
        kept = grown.kept if grown is not None and side.startswith("large") else None
        flops = grown.flops if grown is not None and side.endswith("same FLOPs") else None
        results[side] = run_side(problem, side, run_seed, kept=kept, flops=flops)
        print(line(results[side]), flush=True)
    return list(results.values())


def line(r: Result) -> str:
    """One run in one line."""
    return (f"{r.problem:<7} seed {r.run_seed:<4} {r.side:<18} report loss {r.report_loss:.4f}  "
            f"accuracy {r.report_accuracy:6.1%}  {r.parameters:>7,} parameters  {r.steps:>6,} steps  "
            f"{r.flops / 1e9:9.2f} GFLOP  {r.seconds:6.1f} s  {_words(r.kept)}")  # fmt: skip


def _words(kept: dict[str, str]) -> str:
    return ", ".join(f"{slot}: {blueprint}" for slot, blueprint in kept.items())
