"""Recorded runs (tests/record_runs.py) as they could be seen at some moment of their course."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.record_runs import RECORDED
from tolaria.telemetry.events import read_events
from tolaria.telemetry.metrics import read_metrics
from tolaria.view.course import Course
from tolaria.view.files import RunFiles
from tolaria.view.lookout import View
from tolaria.view.now import describe
from tolaria.view.ranks import Seen
from tolaria.view.steps import StepsReader
from tolaria.view.tail import Tail


def recorded(name: str) -> RunFiles:
    """The files of a recorded run, which has ended."""
    return RunFiles(RECORDED / name)


def copied(name: str, folder: Path) -> Path:
    """A run directory of a test's own, with what was recorded."""
    return Path(shutil.copytree(RECORDED / name, folder / name))


def events_of(name: str) -> list[dict[str, Any]]:
    """All that was told, by every rank."""
    return list(read_events(RECORDED / name / "events.jsonl"))


def moment(
    name: str, kind: str, number: int = 1, *, further: int = 0, alive: bool = True,
    status: Mapping[str, Any] | None = None, seen: Seen | None = None,
) -> View:  # fmt: skip
    """The run right after rank 0, or the watchdog, told its ``number``-th event of a kind, and ``further`` events.

    ``alive``: as if it were still being trained. ``status``: what status.json says at this moment.
    """
    files, course, left, past = recorded(name), Course(), number, -1
    for event in events_of(name):
        course.take(event)
        left -= event["kind"] == kind and event["rank"] < 1
        past += left <= 0
        if past == further:
            break
    assert past == further, f"{name}: {number} events {kind}, and {further} more"
    last = max(event["wall_ns"] for event in course.last.values())
    steps = StepsReader(Tail(Path("/nonexistent")))
    for line in read_metrics(files.path / "metrics.jsonl"):
        if line["wall_ns"] <= last:
            steps.take(line)
    told = {**status, "wall_ns": last + 1} if status is not None else None
    now = describe(
        files, course, steps.points, status=told, summary=None, config=files.config(), alive=alive, seen=seen
    )
    return View(now=now, course=course, steps=steps.points, config=files.config(), seen=seen)


def status_document(**changes: Any) -> dict[str, Any]:
    """A status.json of every key, as a run of two ranks writes it."""
    document: dict[str, Any] = json.loads((RECORDED / "status.json").read_text())
    return {**document, **changes}
