"""Curves as text. Pure: points in, lines of characters out.

A braille character is a cell of 2 x 4 dots, so that a curve of 40 columns has 80 points; where the terminal has none,
a cell is one of the plain characters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tolaria.telemetry.words import number

Points: TypeAlias = Sequence[tuple[float, float]]

BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of each dot, by row and column within a cell."""

MARK = "o"
LABEL = 7
SPIKE = 10.0
"""A value of so many times the median around it is always drawn."""

LOG_FROM = 30.0
"""Values that span more than this factor are drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Scale:
    """From values to [0, 1]."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        if self.logarithmic:
            return _share(math.log(max(value, self.low)), math.log(self.low), math.log(self.high))
        return _share(value, self.low, self.high)

    def at(self, share: float) -> float:
        """The value at a share."""
        if self.logarithmic:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


def scale_of(values: Sequence[float], *, low: float | None = None, high: float | None = None) -> Scale:
    """A scale that holds the finite ones of these values; ``low`` and ``high``: ends that are given."""
    finite = [value for value in values if math.isfinite(value)]
    bottom = min(finite, default=0.0) if low is None else low
    top = max(finite, default=1.0) if high is None else high
    if bottom > 0 and low is None and top > LOG_FROM * bottom:
        return Scale(bottom, top, logarithmic=True)
    if top <= bottom:
        margin = abs(bottom) * 0.1 or 0.5
        return Scale(bottom - margin, top + margin)
    return Scale(bottom, top)


def draw(
    line: Points, marks: Points, *, width: int, height: int, plain: bool = False,
    low: float | None = None, high: float | None = None, label: str = "",
) -> list[str]:  # fmt: skip
    """``height`` lines of ``width`` characters: a curve and single marks over it, values at the left, steps below.

    ``line`` and ``marks``: (step, value), values that are not finite are left out. ``label``: what is drawn, in the
    last line with the steps. Without points the field is empty and says so.
    """
    line = [(x, y) for x, y in line if math.isfinite(y)]
    marks = [(x, y) for x, y in marks if math.isfinite(y)]
    columns, rows = max(4, width - LABEL - 2), max(1, height - 1)
    steps = [x for x, _ in (*line, *marks)]
    if not steps:
        middle = [f"{label}: nothing told yet".center(width)[:width]]
        return [" " * width] * (rows // 2) + middle + [" " * width] * (height - rows // 2 - 1)
    scale = scale_of([y for _, y in (*line, *marks)], low=low, high=high)
    first, last = min(steps), max(steps)
    field = [[" "] * columns for _ in range(rows)]
    draw_line = _draw_plain if plain else _draw_braille
    draw_line(field, [(_share(x, first, last), scale.place(y)) for x, y in line])
    every = max(1, math.ceil(4 * len(marks) / columns))
    for x, y in marks[(len(marks) - 1) % every :: every]:  # the last one is always there
        column = round(_share(x, first, last) * (columns - 1))
        row = rows - 1 - round(scale.place(y) * (rows - 1))
        field[min(max(row, 0), rows - 1)][column] = MARK
    side = "|" if plain else "│"
    lines = [f"{_value_at(scale, row, rows):>{LABEL}} {side}{''.join(cells)}" for row, cells in enumerate(field)]
    return [*lines, _below(first, last, label, width)]


def _value_at(scale: Scale, row: int, rows: int) -> str:
    """The label of a row: top, middle, bottom have one."""
    wanted = {0, rows - 1} | ({rows // 2} if rows >= 5 else set())
    return number(scale.at((rows - 1 - row) / max(1, rows - 1))) if row in wanted else ""


def _below(first: float, last: float, label: str, width: int) -> str:
    left, right = f"{' ' * (LABEL + 2)}{first:,.0f}", f"{last:,.0f}"
    room = width - len(left) - len(right)
    label = label if len(label) + 2 <= room else label.partition(",")[0]
    return f"{left}{label:^{max(0, room)}}{right}" if len(label) + 2 <= room else f"{left}{' ' * max(1, room)}{right}"


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def _draw_braille(field: list[list[str]], points: Points) -> None:
    rows, columns = len(field) * 4, len(field[0]) * 2
    bits: dict[tuple[int, int], int] = {}
    for x, y in _connected(points, columns, rows):
        cell = (y // 4, x // 2)
        bits[cell] = bits.get(cell, 0) | DOTS[y % 4][x % 2]
    for (row, column), found in bits.items():
        field[row][column] = chr(BRAILLE + found)


def _draw_plain(field: list[list[str]], points: Points) -> None:
    for x, y in _connected(points, len(field[0]), len(field)):
        field[y][x] = "."


def _connected(points: Points, columns: int, rows: int) -> list[tuple[int, int]]:
    """The dots of a line through points in [0, 1]; rows count from the top. Every column has its lowest and highest."""
    found: list[tuple[int, int]] = []
    before: tuple[int, int] | None = None
    for share_x, share_y in points:
        x, y = round(share_x * (columns - 1)), rows - 1 - round(share_y * (rows - 1))
        if before is None:
            found.append((x, y))
        else:
            length = max(abs(x - before[0]), abs(y - before[1]), 1)
            for part in range(1, length + 1):
                across = before[0] + round((x - before[0]) * part / length)
                found.append((across, before[1] + round((y - before[1]) * part / length)))
        before = (x, y)
    return found


def thinned(points: Points, most: int) -> Points:
    """At most about ``most`` points: the median of every stretch, and its highest where that is a spike.

    A loss of thousands of steps drawn as it is would be a cloud; its course is what is looked for.
    """
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = sorted(points[start : start + size], key=lambda point: point[1])
        middle, highest = stretch[len(stretch) // 2], stretch[-1]
        found = {(points[start][0], middle[1])}
        if highest[1] > SPIKE * max(middle[1], 0.0):
            found.add(highest)
        kept += sorted(found)
    return kept
