"""The numbers of steps, for a curve: read on in metrics.jsonl, thinned out where there are too many to be seen."""

from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from tolaria.view.tail import Tail
from tolaria.view.values import real, whole

MAX_POINTS = 8192


class StepPoint(NamedTuple):
    """One line of metrics.jsonl. ``loss``: of the step, None where it was not told or not finite."""

    step: int
    wall_ns: int
    loss: float | None
    lr: float | None


class StepsReader:
    """The steps on the run's course so far. A line that goes back in step takes those behind it off."""

    def __init__(self, tail: Tail) -> None:
        self.points: list[StepPoint] = []
        self._tail = tail

    def read(self) -> list[StepPoint]:
        """The points up to now, by step."""
        for record in self._tail.new():
            if "step" in record:
                self.take(record)
        return self.points

    def take(self, record: dict[str, Any]) -> None:
        """One more line."""
        step = whole(record["step"])
        while self.points and self.points[-1].step >= step:
            self.points.pop()
        loss = real(record.get("loss", record.get("loss_rank0")))
        self.points.append(StepPoint(step, whole(record.get("wall_ns")), loss, real(record.get("lr"))))
        if len(self.points) > MAX_POINTS:
            # The last points stay: the present speed is read off them.
            self.points = self.points[: -MAX_POINTS // 8 : 2] + self.points[-MAX_POINTS // 8 :]


def pace(points: list[StepPoint], last: int = 8) -> float | None:
    """Milliseconds a step at the end of the course, by the wall clock; None where too little is known.

    The median over the last lines, so that neither a boundary nor a restart between two of them moves it.
    """
    recent = points[-last:]
    each = [(b.wall_ns - a.wall_ns) / 1e6 / (b.step - a.step) for a, b in pairwise(recent) if b.step > a.step]
    return median(each) if each else None
