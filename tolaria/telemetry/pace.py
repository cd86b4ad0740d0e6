"""Who holds the others up: each rank's own time in a step, before it waits for anybody.

That is its data, and its forward pass unless DDP sends buffers (running statistics) before it. On a GPU the host's
part is seen (data, launching), not the device's. How much of it is waiting for data is told apart.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

REMEMBERED = 1024
FLOOR_MS = 5.0
"""Less than this holds nobody up."""


DATA_SHARE = 0.5
"""More than this, of a step or of what a rank takes longer than others, is worth telling."""


class StepTimes(NamedTuple):
    """One rank's milliseconds in a step since the last boundary, 0 without a step. Medians, but for ``wait_ms``.

    own_ms: up to the last moment that does not depend on other ranks, data included. data_ms: waiting for the data.
    wait_ms: waiting for other ranks, the mean. whole_ms: all of it.
    """

    own_ms: float = 0.0
    whole_ms: float = 0.0
    data_ms: float = 0.0
    wait_ms: float = 0.0


NO_STEPS = StepTimes()


class Pace:
    """The times of this rank's steps since the last boundary. Local."""

    def __init__(self) -> None:
        self._own: deque[float] = deque(maxlen=REMEMBERED)
        self._whole: deque[float] = deque(maxlen=REMEMBERED)
        self._data: deque[float] = deque(maxlen=REMEMBERED)
        self._steps = 0
        self._waited = 0.0

    def add(self, own_s: float, whole_s: float, data_s: float = 0.0) -> None:
        """One step, from asking for its data to the last moment that does not depend on other ranks; and to its end.
        ``data_s``: waiting for its data."""
        self._own.append(own_s)
        self._whole.append(whole_s)
        self._data.append(data_s)
        self._steps += 1

    def take(self, waited_s: float = 0.0) -> StepTimes:
        """The steps' times; begins anew. A single hiccup does not move the medians.

        ``waited_s``: for other ranks, in all steps of this start.
        """
        own, whole, data = (
            median(seconds) * 1e3 if seconds else 0.0 for seconds in (self._own, self._whole, self._data)
        )
        wait = (waited_s - self._waited) * 1e3 / self._steps if self._steps else 0.0
        for seconds in (self._own, self._whole, self._data):
            seconds.clear()
        self._steps, self._waited = 0, waited_s
        return StepTimes(own, whole, data, max(0.0, wait))


def slowness(rank: int, own_ms: Sequence[float], data_ms: Sequence[float]) -> str:
    """What a straggler spends its time on, for people: its data, where that is most of what it takes longer."""
    usual = median(ms for other, ms in enumerate(own_ms) if other != rank)
    usual_data = median(ms for other, ms in enumerate(data_ms) if other != rank)
    if data_ms[rank] - usual_data > DATA_SHARE * (own_ms[rank] - usual):
        return f"rank {rank} waits {data_ms[rank]:.0f} ms a step for its data, the others {usual_data:.0f} ms"
    return f"rank {rank}: {own_ms[rank]:.0f} ms a step of its own, the others {usual:.0f} ms"


def data_bound(data_ms: Sequence[float], step_ms: float) -> str:
    """For people: that steps wait for data more than for anything else, on all ranks; "" where they do not."""
    least = min(data_ms, default=0.0)
    if least <= FLOOR_MS or least <= DATA_SHARE * step_ms:
        return ""
    who = "every rank waits" if len(data_ms) > 1 else "it waits"
    return f"{who} {least:.0f} of {step_ms:.0f} ms a step for its data"


def stragglers(own_ms: Sequence[float], ratio: float) -> list[int]:
    """The ranks whose own time is more than ``ratio`` times the median of the others'. Equal on all ranks.

    Sorts once: a median for each of 1,024 ranks would take 25 ms.
    """
    if not ratio or len(own_ms) < 2:
        return []
    order = sorted(range(len(own_ms)), key=own_ms.__getitem__)
    ordered = [own_ms[rank] for rank in order]
    found = []
    for place, rank in enumerate(order):
        usual = _median_without(ordered, place)
        if own_ms[rank] > ratio * usual and own_ms[rank] - usual > FLOOR_MS:
            found.append(rank)
    return sorted(found)


def _median_without(ordered: Sequence[float], place: int) -> float:
    """The median of sorted values without the one at ``place``."""
    low, high = (len(ordered) - 2) // 2, (len(ordered) - 1) // 2
    return (ordered[low + (low >= place)] + ordered[high + (high >= place)]) / 2
