"""Numbers over the steps of a run that may have gone back. Pure.

---o---o---o---x---x          a return to an earlier step starts another course: what lies behind its beginning
       |                      was left (x), and is no part of the line that leads to the end (o)
       +---o---o---o
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

MOST = 8000
"""Points of a piece of a curve that are kept as they are."""


class Point(NamedTuple):
    """A value after so many steps; NaN where it was no number."""

    step: int
    value: float


@dataclass
class Curve:
    """Values in the order in which they were written; 16 bytes a point. ``wall_ns`` is not kept: the order says it."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> None:
        """One more value."""
        self.steps.append(step)
        self.values.append(value if math.isfinite(value) else math.nan)

    def __len__(self) -> int:
        return len(self.steps)

    def points(self, start: int, end: int) -> list[Point]:
        """Those from the ``start``-th on, before the ``end``-th; of many the least and the greatest of each stretch."""
        found = (Point(self.steps[i], self.values[i]) for i in range(start, end))
        if end - start <= MOST:
            return list(found)
        return list(_reduced(found, self.steps[start], (self.steps[end - 1] - self.steps[start]) / (MOST // 2)))


class Courses(NamedTuple):
    """``kept``: the line that leads to the end, its steps rising. ``left``: what each return left, each with the point
    of the kept line from which it goes off, where there is one."""

    kept: list[Point]
    left: list[list[Point]]


def kept_pieces(steps: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, kept, end) of each piece between two returns: of start..end the indices below ``kept`` are kept."""
    starts = [0, *(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])] if len(steps) else []
    ends = [*starts[1:], len(steps)][: len(starts)]
    found, limit = [], math.inf
    for start, end in zip(reversed(starts), reversed(ends), strict=True):
        kept = start
        while kept < end and steps[kept] < limit:
            kept += 1
        found.append((start, kept, end))
        limit = min(limit, steps[start])
    yield from reversed(found)


def courses(curve: Curve) -> Courses:
    """The line that leads to the end, and what was left."""
    kept: list[Point] = []
    left = []
    for start, stop, end in kept_pieces(curve.steps):
        kept += curve.points(start, stop)
        if stop < end:
            left.append(kept[-1:] + curve.points(stop, end))
    return Courses(kept, left)


def thinned(points: Sequence[Point], first: int, last: int, buckets: int) -> list[Point]:
    """At most two points for each of so many equal parts of the steps ``first`` to ``last``: the least, the greatest.

    A peak of one step is kept however long the run. A part in which nothing was a number gives one that is none.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    return list(_reduced(points, first, max(1, last - first) / buckets))


def _reduced(points: Iterable[Point], first: int, width: float) -> Iterator[Point]:
    """One stretch of ``width`` steps after the other, in memory for one of them."""
    for _, stretch in groupby(points, key=lambda point: int((point.step - first) / width)):
        yield from _extremes(list(stretch))


def _extremes(points: Sequence[Point]) -> list[Point]:
    numbers = [point for point in points if not math.isnan(point.value)]
    if not numbers:
        return [points[0]]
    low, high = min(numbers, key=lambda p: p.value), max(numbers, key=lambda p: p.value)
    if low.value == high.value:
        return [low]
    return [low, high] if low.step < high.step else [high, low]
