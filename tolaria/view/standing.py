"""In what state a run is: what its status, its summary and its events say, held against who holds its lock."""

import socket
import time
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeAlias

from tolaria.view.course import Course
from tolaria.view.files import RunFiles
from tolaria.view.values import text, whole

State: TypeAlias = Literal[
    "starting", "running", "paused", "halted", "finished", "stopped", "unstable", "failed", "killed", "unknown"
]

GOING: frozenset[str] = frozenset({"starting", "running", "paused", "halted"})
"""States of a run that somebody is training; with no process behind them they are "killed"."""

FRESH_S = 15.0
"""A status that another machine wrote so lately is taken for a sign of life: its lock cannot be asked from here."""

AFTER_THE_END = frozenset({"run_ended", "run_failed"})


def is_alive(files: RunFiles, status: Mapping[str, Any] | None, *, now_ns: int | None = None) -> bool:
    """Whether the run is being trained: its lock is held here, or its status is fresh and from another machine."""
    if files.alive:
        return True
    written = whole(status.get("wall_ns")) if status else 0
    elsewhere = bool(files.host) and files.host != socket.gethostname()
    going = status is not None and text(status.get("state")) in GOING
    return elsewhere and going and (time.time_ns() if now_ns is None else now_ns) - written < FRESH_S * 1e9


def state_of(
    course: Course, *, alive: bool, status: Mapping[str, Any] | None, summary: Mapping[str, Any] | None,
    phases: Collection[str] = (),
) -> State:  # fmt: skip
    """The state of a run. Pure. ``phases``: what its ranks are doing, where they can be seen.

    A run of another version that tells no status is judged by its events alone; "unknown" is one that has told nothing.
    """
    told = text(status.get("state")) if status else ""
    this_start = status is not None and whole(status.get("wall_ns")) >= course.started_ns
    if alive:
        if len(set(phases)) == 1 and (seen := next(iter(phases))) in ("paused", "halted"):
            return seen  # type: ignore[return-value]
        if this_start and told in GOING:
            return told  # type: ignore[return-value]
        return _going(course)
    return _ended(course, told if this_start else "", summary)


def _going(course: Course) -> State:
    if not course.starts or course.since_start["run_failed"] or course.since_start["run_ended"]:
        return "starting"
    if course.since_start["halted"] and _later(course, "halted", "halt_cleared"):
        return "halted"
    return "paused" if course.paused is not None else "running"


def _ended(course: Course, told: str, summary: Mapping[str, Any] | None) -> State:
    if course.since_start["run_ended"]:
        outcome = text(course.last["run_ended"].get("outcome"))
    elif course.since_start["run_failed"]:
        outcome = "failed"
    elif told and told not in GOING:
        outcome = told
    elif course.starts or told:
        outcome = "killed"
    else:
        outcome = text(summary.get("outcome")) if summary else "unknown"
    return outcome if outcome in _ENDS else "unknown"  # type: ignore[return-value]


_ENDS = frozenset({"finished", "stopped", "unstable", "halted", "failed", "killed"})


def _later(course: Course, kind: str, than: str) -> bool:
    """Whether the last event of a kind is of this start, and later than the last of another kind."""
    last, other = course.last.get(kind), course.last.get(than)
    if last is None or whole(last.get("wall_ns")) < course.started_ns:
        return False
    return other is None or whole(other.get("wall_ns")) < whole(last.get("wall_ns"))
