"""Axes of the pictures: where a number lies, and which numbers are written along them. Pure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tolaria.telemetry.words import large


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high``, mapped to 0..1; on a ``log`` axis both are above 0."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; 0..1 within the axis."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers along the axis, at most so many but always two or more."""
        if self.log:
            return _log_ticks(self.low, self.high, most)
        step = _round_step((self.high - self.low) / max(1, most - 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def steps_axis(end: int) -> Axis:
    """From the start of a run to its end."""
    return Axis(0, max(1, end))


def value_axis(values: Iterable[float], *, may_log: bool = True, floor: float | None = None) -> Axis:
    """The axis for these values: logarithmic where they are positive and span more than a factor of 30.

    ``floor``: a value that is to be on the axis.
    """
    numbers = [value for value in values if math.isfinite(value)]
    if not numbers:
        return Axis(0, 1)
    low, high = min(numbers), max(numbers)
    if may_log and low > 0 and high / low > 30:
        return Axis(low / 1.15, high * 1.15, log=True)
    if floor is not None:
        low = min(low, floor)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low if low == floor else low - room, high + room)


def figure(value: float) -> str:
    """A number for an axis or a table: 0.02, 4e-05, 1,200, 1.35 M."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e5:
        return large(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.2g}"


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if 2 <= len(found) <= most:
            return found
    powers = [10.0**d for d in decades if low <= 10.0**d <= high]
    return powers[:: max(1, -(-len(powers) // most))] if len(powers) > 1 else [low, high]
