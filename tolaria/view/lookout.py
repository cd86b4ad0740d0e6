"""A look at a run: its files read, on from where the last look ended, and put together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tolaria.errors import RunDirError
from tolaria.view.course import Course, CourseReader
from tolaria.view.files import RunFiles
from tolaria.view.now import Now, describe
from tolaria.view.ranks import Seen, look_at_page
from tolaria.view.standing import is_alive
from tolaria.view.steps import StepPoint, StepsReader
from tolaria.view.tail import Tail

Read = TypeVar("Read")


class Lookout:
    """Looks at one run again and again, reading on where it left off. Local, reads only."""

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self._course = CourseReader(Tail(files.path / "events.jsonl"))
        self._steps = StepsReader(Tail(files.path / "metrics.jsonl"))
        self._config: dict[str, Any] = {}

    def look(self) -> "View":
        """All that can be known now. Raises RunDirError for files that cannot be read."""
        files, course, steps = self.files, self._course.read(), self._steps.read()
        # Of what cannot be read, or is half written at this moment, the rest is seen all the same, and why not all.
        status, damage = _readable(files.status, None)
        summary, no_summary = _readable(files.summary, None)
        self._config, no_config = _readable(files.config, self._config)
        config, damage = self._config, damage or no_summary or no_config
        alive = is_alive(files, status)
        seen = look_at_page(files) if files.alive else None
        now = describe(files, course, steps, status=status, summary=summary, config=config, alive=alive, seen=seen)
        return View(now=now, course=course, steps=steps, config=config, summary=summary, seen=seen, damage=damage)


def _readable(read: Callable[[], Read], otherwise: Read) -> tuple[Read, str]:
    try:
        return read(), ""
    except RunDirError as error:
        return otherwise, str(error)


@dataclass(frozen=True, kw_only=True)
class View:
    """One look at a run: the moment, and the course that led to it. ``damage``: which file cannot be read, and why."""

    now: Now
    course: Course
    steps: list[StepPoint]
    config: Mapping[str, Any]
    summary: Mapping[str, Any] | None = None
    seen: Seen | None = None
    damage: str = ""


def look(files: RunFiles) -> View:
    """One look at a run."""
    return Lookout(files).look()
