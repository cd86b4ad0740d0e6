"""Who holds the others up: each rank's own time in a step, before it waits for anybody.

That is its data, and its forward pass unless DDP sends buffers (running statistics) before it. On a GPU the host's
part is seen (data, launching), not the device's.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

REMEMBERED = 1024
FLOOR_MS = 5.0
"""Less than this holds nobody up."""


class Pace:
    """The times of this rank's steps since the last boundary. Local."""

    def __init__(self) -> None:
        self._own: deque[float] = deque(maxlen=REMEMBERED)
        self._whole: deque[float] = deque(maxlen=REMEMBERED)

    def add(self, own_s: float, whole_s: float) -> None:
        """One step, from asking for its data to the last moment that does not depend on other ranks; and to its end."""
        self._own.append(own_s)
        self._whole.append(whole_s)

    def take(self) -> tuple[float, float]:
        """The medians of both in milliseconds, 0 without a step; begins anew. A single hiccup does not move them."""
        found = tuple(median(seconds) * 1e3 if seconds else 0.0 for seconds in (self._own, self._whole))
        self._own.clear()
        self._whole.clear()
        return found[0], found[1]


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
