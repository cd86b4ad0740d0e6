"""Runs that something goes wrong in, for test_recovery.py: in the data or in the memory of one rank.

A fault strikes once, at a step of this rank; when the run comes by that step again, it is not there any more. What a
job returns says whether it struck.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.dist import jobs_resume as jobs
from tests.dist.jobs_resume import Points, indices_of_step, own_rank
from tolaria import build
from tolaria.alarm import Alarm
from tolaria.comeback import Comeback
from tolaria.config import Config, PrecisionConfig
from tolaria.config_recovery import RecoveryConfig
from tolaria.errors import TolariaError
from tolaria.kasmina.slot import Slot
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.journal import Journal
from tolaria.recovery.page import Page
from tolaria.recovery.snapshots import copy_back
from tolaria.recovery.timeline import Return
from tolaria.mode import Mode
from tolaria.state import TrainState
from tolaria.task import Task
from tolaria.telemetry.lines import LineFile
from tolaria.telemetry.summary import RunSummary

RECOVERY = RecoveryConfig(
    snapshot_steps=4, spike_window=10, spike_min_losses=3, drift_steps=2, attempt_steps=100, prepare_ms=5000,
    commit_ms=5000, confirm_ms=5000, command_boundaries=3,
)  # fmt: skip


@dataclass
class Fault:
    """One bit, one number, or one stream of random numbers that goes wrong. ``what``: see `strike`."""

    what: str
    step: int
    rank: int | None = None
    name: str = ""
    times: int = 1
    struck: int = 0

    def strike(self, state: TrainState) -> None:
        """Strike if it is time: after the step counted ``step``, on ``rank`` (None: on all)."""
        if state.step != self.step or self.struck >= self.times or self.rank not in (None, own_rank()):
            return
        self.struck += 1
        tensors = state.tensors()
        if self.what == "flip":
            flip_bit(next(t for n, t in sorted(tensors.items()) if n.startswith(self.name)))
        elif self.what == "blow":
            for name, tensor in tensors.items():
                if name.startswith(self.name):
                    tensor.neg_().mul_(40)
        elif self.what == "draw":
            torch.rand(1)
        elif self.what == "sampler":
            state.sampler.cursor += 1
        elif self.what == "lr":
            state.lr.set_scale("host", 0.5, state.step)
        elif self.what == "decay":
            state.optimizer.param_groups[0]["weight_decay"] = 0.3
        elif self.what == "scaler":
            state.scaler.update(new_scale=2.0**40)
        elif self.what == "no page":
            (page,) = Path(self.name).glob("tolaria-*-page")
            page.unlink()
        elif self.what == "mode":
            state.mode = Mode(conservative=True, reason="out of step")
        else:
            raise AssertionError(self.what)


def flip_bit(tensor: Tensor) -> None:
    """Flip the lowest bit of the first element."""
    flat = tensor.detach().reshape(-1)[:1].view(torch.uint8)
    flat[0] ^= 1


def recovery_config(
    folder: str, recovery: dict[str, Any] | None = None, amp: Literal["bf16", "fp16"] = "bf16", **config: Any
) -> Config:
    """`jobs_resume.make_config` with snapshots every four steps and short windows."""
    made = jobs.make_config(folder, **config)
    precision = PrecisionConfig(amp=amp)
    return replace(made, recovery=replace(RECOVERY, **(recovery or {})), precision=precision)


class BadPoints(Points):
    """Points of which certain reads are spoiled: multiplied, or not a number, as often as ``times`` says."""

    def __init__(self, bad: Sequence[tuple[list[int], float]], times: int = 1000) -> None:
        super().__init__(jobs.TRAIN_SAMPLES, seed=1)
        self.bad = bad
        self.times = times
        self.struck = 0

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        items = super().__getitems__(indices)
        for spoiled, factor in self.bad:
            if indices == spoiled and self.struck < self.times:
                self.struck += 1
                items = [(x * factor, y) for x, y in items]
        return items


def run(
    folder: str,
    *,
    faults: Sequence[dict[str, Any]] = (),
    bad_steps: Sequence[int] = (),
    bad_factor: float = 1e4,
    bad_rank: int | None = None,
    bad_times: int = 1000,
    returns: Sequence[dict[str, Any]] = (),
    open_host: bool = False,
    slow: str = "",
    alarms: Sequence[dict[str, Any]] = (),
    **config: Any,
) -> dict[str, Any]:
    """Train with these faults. ``returns``: what the run is to do by itself at a step, as a return there would."""
    planned = [Fault(**fault) for fault in faults]
    spoiled = bad_steps if bad_rank in (None, own_rank()) else ()
    data = BadPoints([(indices_of_step(step), bad_factor) for step in spoiled], bad_times)
    after_step = TrainState.after_step

    def struck(state: TrainState, *, taken: bool) -> bool:
        ended = after_step(state, taken=taken)
        for fault in planned:
            fault.strike(state)
        return ended

    def make_task() -> Task:
        task = jobs.make_task()
        return replace(task, train=data, model=OpenHost() if open_host else task.model)

    error = ""
    summary: RunSummary | None = None
    take_effects = Comeback.take_effects
    to_come = list(returns)

    def scripted(self: Comeback) -> bool | None:
        taken = take(self.state, to_come)
        ended = take_effects(self)
        return False if taken else ended

    patches = (patch.object(TrainState, "after_step", struck), patch.object(Comeback, "take_effects", scripted))
    with patches[0], patches[1], slowed(slow) as slowed_times, alarmed(alarms) as acknowledged:
        try:
            summary = build.train(recovery_config(folder, **config), task=make_task)
        except TolariaError as raised:
            error = f"{type(raised).__name__}: {raised}"
    return {
        "struck": [fault.struck for fault in planned], "bad": data.struck, "error": error,
        "slowed": len(slowed_times), "acknowledged": acknowledged, **told(summary),
    }  # fmt: skip


@contextmanager
def alarmed(alarms: Sequence[dict[str, Any]]) -> Iterator[list[tuple[str, int]]]:
    """Raise an emergency on one rank before one step; ``clear_s``: take it back everywhere after so long.

    ``late_s``: let the other rank wait so long in its collective before. Gives the other's phase and step when it had
    acknowledged the alarm and this rank had not gone on.
    """
    acknowledged: list[tuple[str, int]] = []
    plan = next((plan for plan in alarms if plan["rank"] == own_rank()), None)
    if plan is None:
        yield acknowledged
        return
    level, raised = Alarm.level, list[bool]()

    def raising(self: Alarm) -> int:
        if self.events.step == plan["step"] and not raised:
            raised.append(True)
            time.sleep(plan.get("late_s", 0.0))
            self.page.raise_level(plan["level"], "planted")
            if "late_s" in plan and isinstance(self.page, Page):
                token, end = self.page.token(), time.monotonic() + 20
                while (line := self.page.rank_line(1 - own_rank())).ack < token and time.monotonic() < end:
                    time.sleep(0.002)
                acknowledged.extend([(line.phase.name, line.step)] if line.ack >= token else [])
            if "clear_s" in plan:
                threading.Timer(plan["clear_s"], lambda: self.page.clear(everywhere=True)).start()
        return level(self)

    with patch.object(Alarm, "level", raising):
        yield acknowledged
    assert raised


@contextmanager
def slowed(phase: str) -> Iterator[list[float]]:
    """Make something slow on rank 1: a phase of a fast return; the disk under checkpoints, under telemetry; data.

    Gives a list with one entry for each time.
    """
    times: list[float] = []
    if not phase or own_rank() != 1:
        yield times
        return
    wait = 0.6

    def late(original: Callable[..., Any], wait: float = wait) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(wait)
            times.append(wait)
            return original(*args, **kwargs)

        return call

    slow = {
        "prepare_ms": lambda: patch.object(Journal, "went_back", late(Journal.went_back)),
        "commit_ms": lambda: patch("tolaria.rollback.copy_back", late(copy_back)),
        "disk": lambda: patch.object(FileOps, "write", late(FileOps.write, 0.2)),
        "sink": lambda: patch.object(LineFile, "_put", late(LineFile._put, 0.2)),
        "data": lambda: patch.object(BadPoints, "__getitems__", late(BadPoints.__getitems__, 0.03)),
    }
    with slow[phase]():
        yield times


def take(state: TrainState, returns: list[dict[str, Any]]) -> bool:
    """Do at a step, once, what a return to it would have decided; whether there was any."""
    due = [planned for planned in returns if state.step == planned["step"]]
    for planned in due:
        returns.remove(planned)
        state.sampler.skip([(epoch, start, end) for epoch, start, end in planned["skip"]])
        state.mode = Mode(conservative=True, reason=planned["reason"])
    return bool(due)


class OpenHost(nn.Module):
    """Layers without bounds: inputs that are too large by far make a loss that is too large by far."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(jobs.FEATURES, jobs.WIDTH)
        self.first = Slot("first")
        self.dropout = nn.Dropout(0.2)
        self.middle = nn.Linear(jobs.WIDTH, jobs.WIDTH)
        self.head = nn.Linear(jobs.WIDTH, jobs.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, FEATURES) -> logits (batch, CLASSES)."""
        h = self.dropout(self.first(torch.relu(self.inlet(x))))
        logits: Tensor = self.head(torch.relu(self.middle(h)))
        return logits


def told(summary: RunSummary | None) -> dict[str, Any]:
    """What the tests ask of a run, on one rank."""
    if summary is None:
        return {"outcome": "raised"}
    return {
        "outcome": summary.outcome,
        "digest": summary.state_digest[own_rank()],
        "steps": summary.steps,
        "mode": summary.mode,
        "skipped": summary.counters["skipped_steps"],
        "incidents": [[i.cause, i.step, i.to_step, i.source, i.samples_left_out] for i in summary.incidents],
        "stages": {seed.slot: seed.stage for seed in summary.seeds},
    }


class SpoiledIndices(jobs.Indices):
    """Sample i is i, with a target that is added to its loss: a million in one read."""

    def __init__(self, spoiled: list[int]) -> None:
        super().__init__(jobs.TRAIN_SAMPLES)
        self.spoiled = spoiled
        self.struck = 0

    def __getitems__(self, indices: list[int]) -> list[tuple[int, int]]:
        bad = indices == self.spoiled
        self.struck += bad
        return [(i, 1_000_000 if bad else 1) for i in indices]


def plus_target(outputs: Tensor, targets: Tensor) -> Tensor:
    """The model's output and the target, (batch,)."""
    return outputs + targets


def count_samples_with_spike(folder: str, *, bad_step: int) -> dict[str, Any]:
    """`jobs_resume.count_samples` over two epochs, of which one step's loss of rank 1 is a spike."""
    data = SpoiledIndices(indices_of_step(bad_step) if own_rank() == 1 else [])
    model = jobs.Counts(jobs.TRAIN_SAMPLES)
    config = jobs.count_config(folder, epochs=2)

    def make_task() -> Task:
        validation = jobs.Indices(3)
        return Task(model=model, loss=plus_target, train=data, validation=validation, accuracy=jobs.own_output)

    summary = build.train(replace(config, recovery=RECOVERY), task=make_task)
    return {"seen": [-v for v in model.seen.tolist()], "struck": data.struck, "incidents": told(summary)["incidents"]}
