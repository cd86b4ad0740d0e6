"""Does a noisy loss still fall? Pure statistics over the validation losses of consecutive boundaries.

A line is fitted by least squares; how far the losses scatter around it tells how far its slope can be trusted
(Student's t, since the scatter is estimated from the same few losses). One noisy boundary widens the error of the slope
along with moving it, so that it decides nothing by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

FEWEST = 4
"""Losses below which no trend is judged: two degrees of freedom remain for the scatter."""


class Course(Enum):
    """What can be said of a loss."""

    FALLING = "falls"
    LEVEL = "is level"
    UNCLEAR = "is unclear"


@dataclass(frozen=True)
class Trend:
    """A line through ``points`` losses. ``fall``: loss per boundary, above 0 when it falls; ``error``: its standard
    error; ``level``: the line's value at the newest boundary."""

    fall: float
    error: float
    level: float
    points: int


def fit(losses: Sequence[float]) -> Trend:
    """The trend of losses of consecutive boundaries, oldest first. Raises ValueError for fewer than `FEWEST`."""
    n = len(losses)
    if n < FEWEST:
        raise ValueError(f"{n} losses: expected {FEWEST} or more")
    middle, mean = (n - 1) / 2, math.fsum(losses) / n
    spread = n * (n * n - 1) / 12  # sum of (i - middle)^2
    slope = math.fsum((i - middle) * (loss - mean) for i, loss in enumerate(losses)) / spread
    squares = math.fsum((loss - mean - slope * (i - middle)) ** 2 for i, loss in enumerate(losses))
    return Trend(-slope, math.sqrt(squares / (n - 2) / spread), mean + slope * middle, n)


def course(trend: Trend, *, ahead: int, worth: float, confidence: float) -> Course:
    """Whether the loss will fall by ``worth`` within ``ahead`` boundaries, if it goes on as it did.

    FALLING: it falls beyond doubt, and by that much. LEVEL: so much can be excluded. UNCLEAR: neither; more losses
    will tell. Both with one-sided ``confidence``, 0.5 < confidence < 1.
    """
    margin = t_quantile(confidence, trend.points - 2) * trend.error
    if (trend.fall + margin) * ahead < worth:
        return Course.LEVEL
    if trend.fall > margin and trend.fall * ahead >= worth:
        return Course.FALLING
    return Course.UNCLEAR


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """Student's t with ``degrees`` of freedom: what it stays below with that ``probability``, 0.5 to 0.999999."""
    low, high = 0.0, 1.0
    while _t_inside(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _t_inside(t: float, degrees: int) -> float:
    """Probability of -t to t (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    odd = degrees % 2
    if odd:
        term = math.cos(angle)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    part = math.sin(angle) * total
    return 2 / math.pi * (angle + part) if odd else part
