"""An answer to "why?": what is so, since when, by which numbers, and what a person can do about it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

from tolaria.telemetry.words import short_path
from tolaria.view.course import Event
from tolaria.view.lookout import View
from tolaria.view.values import mapping, whole


class Urgency(IntEnum):
    """How soon somebody should look, the smaller the sooner."""

    BROKEN = 0
    WAITING = 1
    WORSE = 2
    NOTE = 3


STYLE_OF = {Urgency.BROKEN: "bad", Urgency.WAITING: "warn", Urgency.WORSE: "warn", Urgency.NOTE: ""}
"""By the names of `tolaria.view.sections`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """``since``: the step from which it is so. ``now``: it is so at this moment; else it was.

    ``facts``: sentences with numbers. ``do``: what to do; further lines of it are commands to type.
    """

    topic: str
    what: str
    urgency: Urgency
    since: int | None = None
    now: bool = True
    facts: tuple[str, ...] = field(default=())
    do: str = ""


Rule: TypeAlias = Callable[[View], list[Answer]]
"""Looks at a run and answers, or has nothing to say. Pure."""


def step_of(event: Event) -> int:
    """The step that an event tells of."""
    return whole(event.get("step"))


def setting(view: View, section: str, key: str, default: float) -> float:
    """A number of the run's configuration; ``default`` where it is not told."""
    value = mapping(view.config.get(section)).get(key, default)
    return float(value) if isinstance(value, (int, float)) else default


def is_recent(view: View, event: Event, boundaries: int = 2) -> bool:
    """Whether an event is of this start and no older than so many boundaries."""
    course = view.course
    told = whole(event.get("wall_ns"))
    measured = course.boundaries
    after = measured[-boundaries - 1].wall_ns if len(measured) > boundaries else 0
    return told >= max(course.started_ns, after)


def boundaries(count: int) -> str:
    """ "1 boundary", "3 boundaries"."""
    return f"{count:,} boundar" + ("y" if count == 1 else "ies")


def path_of(view: View) -> str:
    """The run as a person would type it."""
    return short_path(view.now.path)


def resume_command(view: View) -> str:
    """The command that goes on with the run."""
    ranks, path = view.now.world_size or 1, path_of(view)
    start = f"torchrun --nproc_per_node={ranks} -m" if ranks > 1 else "python -m"
    return f"{start} tolaria.launch --config {path}/config.toml --resume {path}"
