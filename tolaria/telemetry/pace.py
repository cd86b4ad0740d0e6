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
    """The ranks whose own time is more than ``ratio`` times the median of the others'. Equal on all ranks."""
    if not ratio:
        return []
    found = []
    for rank, mine in enumerate(own_ms):
        others = [ms for other, ms in enumerate(own_ms) if other != rank]
        if others and mine > ratio * median(others) and mine - median(others) > FLOOR_MS:
            found.append(rank)
    return found
