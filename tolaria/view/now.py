"""A run as it is at one moment: what status.json says, and where there is none, or not all, what the files tell.

status.json     the present, about a second old           the first to be asked
events.jsonl    boundaries, commands, what happened       a run of an older version has only these
metrics.jsonl   loss and rate of steps
summary.json    how it ended
the page        what every rank of this machine is doing
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tolaria.view.course import Asked, Checkpoint, Course, root_cause
from tolaria.view.files import RunFiles
from tolaria.view.ranks import Seen
from tolaria.view.standing import GOING, State, state_of
from tolaria.view.steps import StepPoint, pace
from tolaria.view.values import mapping, numbers, real, rows, text, whole


@dataclass(frozen=True, kw_only=True)
class Score:
    """A validation over all ranks; ``noise``: the standard error of the loss."""

    step: int
    loss: float | None
    accuracy: float | None
    noise: float | None = None


@dataclass(frozen=True, kw_only=True)
class RankPace:
    """Milliseconds a step of one rank: its own work, waiting for others, waiting for data; None: not told."""

    rank: int
    own_ms: float | None
    wait_ms: float | None = None
    data_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class SeedNow:
    """One slot and what grows there."""

    slot: str
    stage: str
    blueprint: str = ""
    alpha: float | None = None
    parameters: int | None = None
    contribution: float | None = None
    contribution_noise: float | None = None
    breaker: str = ""


@dataclass(frozen=True, kw_only=True)
class Now:
    """A run at one moment. None and empty: not told. ``wall_ns``: when it was looked at; ``told_ns``: the newest word
    of the run itself. ``goodput``: seconds by what they went to. ``reason``: why it is in this state, where told."""

    path: str
    name: str
    state: State
    alive: bool
    wall_ns: int
    told_ns: int
    started_ns: int
    host: str = ""
    pid: int | None = None
    activity: str = ""
    reason: str = ""
    device: str = ""
    world_size: int | None = None
    policy: str = ""
    policy_breaker: str = ""
    policy_reason: str = ""
    step: int = 0
    max_steps: int | None = None
    epoch: int = 0
    epochs: int | None = None
    steps_per_epoch: int | None = None
    boundary: int = 0
    eta_s: float | None = None
    seconds: float | None = None
    train_loss: float | None = None
    samples_per_s: float | None = None
    step_ms: float | None = None
    lr: Mapping[str, float]
    validation: Score | None = None
    best: Score | None = None
    conservative: bool = False
    mode_reason: str = ""
    emergency_level: int = 0
    emergency_reason: str = ""
    ranks: tuple[RankPace, ...] = ()
    seeds: tuple[SeedNow, ...] = ()
    commands: tuple[Asked, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    memory_mb: Mapping[str, float]
    goodput: Mapping[str, float]
    counters: Mapping[str, float]


def describe(
    files: RunFiles, course: Course, steps: list[StepPoint], *, status: Mapping[str, Any] | None,
    summary: Mapping[str, Any] | None, config: Mapping[str, Any], alive: bool, seen: Seen | None,
) -> Now:  # fmt: skip
    """Put together what the files say. ``status`` of an earlier start than the last is left aside."""
    if status is not None and whole(status.get("wall_ns")) < course.started_ns:
        status = None
    told = dict(status or {})
    phases = [doing.phase for doing in seen.ranks] if seen is not None else []
    state = state_of(course, alive=alive, status=status, summary=summary, phases=phases)
    ended = summary if state not in GOING and state not in ("killed", "failed") else None
    train, tamiyo = mapping(config.get("train")), mapping(config.get("tamiyo"))
    last = course.boundaries[-1] if course.boundaries else None
    mode, emergency, policy = mapping(told.get("mode")), mapping(told.get("emergency")), mapping(told.get("policy"))
    step = whole(told.get("step"), max(course.step, steps[-1].step if steps else 0))
    if seen is not None and seen.ranks:
        step = max(step, *(doing.step for doing in seen.ranks))
    per_epoch = whole(told.get("steps_per_epoch")) or None
    conservative = bool(mode["conservative"]) if "conservative" in mode else _conservative(course)
    return Now(
        path=str(files.path), name=text(told.get("name")) or text(mapping(config.get("run")).get("name")) or files.name,
        state=state, alive=alive, wall_ns=time.time_ns(), told_ns=_told_ns(course, steps, told),
        started_ns=whole(told.get("started_ns")) or _first_ns(course), host=text(told.get("host")) or files.host,
        pid=files.holder or (whole(told.get("pid")) or None), activity=text(told.get("activity")),
        reason=_reason(state, course, told), device=text(told.get("device")) or _of_start(course, "device"),
        world_size=whole(told.get("world_size")) or course.world_size,
        policy=text(tamiyo.get("endpoint")) or text(tamiyo.get("policy")) or text(policy.get("source")),
        policy_breaker=text(policy.get("breaker")) or text(course.last.get("policy_failed", {}).get("breaker")),
        policy_reason=text(policy.get("reason")), step=step,
        max_steps=whole(told.get("max_steps")) or whole(train.get("max_steps")) or None,
        epoch=whole(told.get("epoch"), last.epoch if last else 0),
        epochs=whole(told.get("epochs")) or whole(train.get("epochs")) or None, steps_per_epoch=per_epoch,
        boundary=whole(told.get("boundary"), last.boundary if last else 0),
        eta_s=_eta(told, course, whole(train.get("epochs"))) if alive else None,
        seconds=real(ended.get("seconds")) if ended else None,
        train_loss=real(told.get("train_loss")) if status is not None else (last.train_loss if last else None),
        samples_per_s=real(told.get("samples_per_s")), step_ms=real(told.get("step_ms")) or pace(steps),
        lr=numbers(told.get("lr")) or ({"host": steps[-1].lr} if steps and steps[-1].lr is not None else {}),
        validation=_score(told.get("validation")) or _last_score(course),
        best=_score(told.get("best")) or _best(course),
        conservative=conservative, mode_reason=text(mode.get("reason")) or _mode_reason(course) * conservative,
        emergency_level=max(whole(emergency.get("level")), seen.level if seen else 0),
        emergency_reason=(seen.reason if seen and seen.level else "") or text(emergency.get("reason")),
        ranks=_ranks(told, course), seeds=_seeds(told, course, summary if ended else None),
        commands=tuple(course.commands.values()), checkpoints=_checkpoints(files, told, course),
        memory_mb=numbers(told.get("memory")), goodput=numbers(told.get("goodput") or (ended or {}).get("goodput")),
        counters=numbers(told.get("counters")) or numbers((ended or {}).get("counters")),
    )  # fmt: skip


def _first_ns(course: Course) -> int:
    return whole(course.starts[0].get("wall_ns")) if course.starts else 0


def _of_start(course: Course, key: str) -> str:
    return text(course.starts[-1].get(key)) if course.starts else ""


def _told_ns(course: Course, steps: list[StepPoint], told: Mapping[str, Any]) -> int:
    last = [whole(event.get("wall_ns")) for event in course.last.values()]
    return max([whole(told.get("wall_ns")), steps[-1].wall_ns if steps else 0, *last])


def _reason(state: State, course: Course, told: Mapping[str, Any]) -> str:
    """Why it is in this state, in the words of the event that brought it there."""
    kind = {"unstable": "gave_up", "halted": "halted"}.get(state, "")
    if state == "paused" and course.paused is not None:
        who, why = text(course.paused.get("who")), text(course.paused.get("why")) or text(course.paused.get("reason"))
        return f"by {who}" * bool(who) + ", " * bool(who and why) + why
    if state == "failed" and (cause := root_cause(course.of_kind("run_failed", this_start=True))) is not None:
        return f"{text(cause.get('error'))}: {text(cause.get('reason'))}"
    if kind in course.last:
        return text(course.last[kind].get("reason"))
    return text(told.get("reason"))


def _conservative(course: Course) -> bool:
    changed = course.last.get("mode_changed")
    last = course.boundaries[-1] if course.boundaries else None
    if changed is not None and (last is None or whole(changed.get("wall_ns")) > last.wall_ns):
        return changed.get("mode") == "conservative"
    return last is not None and last.mode == "conservative"


def _mode_reason(course: Course) -> str:
    changed = course.last.get("mode_changed", {})
    if changed.get("mode") == "conservative":
        return text(changed.get("reason"))
    return text(course.last.get("went_back", {}).get("reason"))


def _eta(told: Mapping[str, Any], course: Course, epochs: int) -> float | None:
    """As told, or from the pace of the last epochs."""
    if "eta_s" in told:
        return real(told["eta_s"])
    recent = course.boundaries[-6:]
    if len(recent) < 2 or recent[-1].epoch <= recent[0].epoch or epochs <= 0:
        return None
    each = (recent[-1].wall_ns - recent[0].wall_ns) / 1e9 / (recent[-1].epoch - recent[0].epoch)
    return max(0.0, each * (epochs - recent[-1].epoch))


def _score(told: object) -> Score | None:
    found = mapping(told)
    if not found:
        return None
    return Score(
        step=whole(found.get("step")), loss=real(found.get("loss")), accuracy=real(found.get("accuracy")),
        noise=real(found.get("noise")),
    )  # fmt: skip


def _last_score(course: Course) -> Score | None:
    if not course.boundaries:
        return None
    last = course.boundaries[-1]
    return Score(step=last.step, loss=last.val_loss, accuracy=last.val_accuracy, noise=last.val_noise)


def _best(course: Course) -> Score | None:
    known = [point for point in course.boundaries if point.val_accuracy is not None]
    if not known:
        return None
    best = max(known, key=lambda point: (point.val_accuracy or 0.0, -point.step))
    return Score(step=best.step, loss=best.val_loss, accuracy=best.val_accuracy, noise=best.val_noise)


def _ranks(told: Mapping[str, Any], course: Course) -> tuple[RankPace, ...]:
    found = [
        RankPace(rank=whole(row.get("rank")), own_ms=real(row.get("own_ms")), wait_ms=real(row.get("wait_ms")),
                 data_ms=real(row.get("data_ms")))
        for row in rows(told.get("ranks"))
    ]  # fmt: skip
    if not found and course.boundaries:
        found = [RankPace(rank=rank, own_ms=own) for rank, own in enumerate(course.boundaries[-1].own_ms)]
    return tuple(sorted(found, key=lambda row: row.rank))


def _seeds(told: Mapping[str, Any], course: Course, summary: Mapping[str, Any] | None) -> tuple[SeedNow, ...]:
    source = rows(told.get("seeds")) or rows((summary or {}).get("seeds"))
    living = [row for row in source if row.get("ended_step") is None] or source
    if living:
        return tuple(_seed(row) for row in living)
    stages = course.boundaries[-1].seeds if course.boundaries else {}
    return tuple(
        _seed({**(course.seeds.get(slot, {}) if stage == "FOSSILIZED" else {}), "slot": slot, "stage": stage})
        for slot, stage in stages.items()
    )


def _seed(row: Mapping[str, Any]) -> SeedNow:
    return SeedNow(
        slot=text(row.get("slot")), stage=text(row.get("stage")), blueprint=text(row.get("blueprint")),
        alpha=real(row.get("alpha")), parameters=whole(row.get("parameters")) or None,
        contribution=real(row.get("contribution")), contribution_noise=real(row.get("contribution_noise")),
        breaker=text(row.get("breaker")),
    )  # fmt: skip


def _checkpoints(files: RunFiles, told: Mapping[str, Any], course: Course) -> tuple[Checkpoint, ...]:
    """The ladder, oldest first: those that are still there."""
    found = [
        Checkpoint(name=text(row.get("name")), step=whole(row.get("step")), good=bool(row.get("good")))
        for row in rows(told.get("checkpoints"))
    ] or list(course.checkpoints.values())
    try:
        # By number: c7 for c7-s154. One that was found damaged has another name.
        there = {
            path.name.partition("-")[0]: path.name for path in (files.path / "ckpt").iterdir() if path.suffix == ""
        }
    except OSError:
        return tuple(found)  # told is better than nothing
    kept = [replace(saved, name=there[number]) for saved in found if (number := saved.name.partition("-")[0]) in there]
    return tuple(sorted(kept, key=lambda saved: saved.step))
