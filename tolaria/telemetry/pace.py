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
    """The own times of this rank since the last boundary. Local."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    def add(self, seconds: float) -> None:
        """One step: from asking for its data to the last moment that does not depend on other ranks."""
        self._seconds.append(seconds)

    def take(self) -> float:
        """The median in milliseconds, 0 without a step; begins anew. A single hiccup does not move it."""
        found = median(self._seconds) * 1e3 if self._seconds else 0.0
        self._seconds.clear()
        return found


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
