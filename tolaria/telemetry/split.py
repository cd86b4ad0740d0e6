"""Where the time of a boundary goes, in milliseconds by part.

On rank 0, in the order of their course; the other ranks have those in which they take part, waiting included:

validation  the passes over the validation data                      (outside the budget)
signal      measuring what growth promises                           (outside the budget)
report      the rest of measuring: bringing the numbers of all ranks together
guard       collapse, replicas compared
packet      building the state packet
encode      checking, serializing, signing the question
round_trip  from sending the question to the checked answer
decision    screening, deciding, writing the decision to the log, durably
broadcast   the decision to all ranks
check       each rank's plan, and the vote on it
apply       the change itself, and the vote on it
digest      the ranks compared after the change
warm_up     trying, and compiling, what has changed                  (outside the budget)
telemetry   what became of the commands: log, events, table
boundary    all of it, whatever has no name included, without what is outside the budget
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

OUTSIDE = ("validation", "signal", "warm_up")
"""Parts that depend on the user's model and data, not on the boundary."""


class Split:
    """The times of one boundary. Local; begins when it is made."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.ms: dict[str, float] = {}
        self._clock = clock
        self._began = self._last = clock()

    def lap(self, part: str) -> None:
        """What has passed since the last lap, or the beginning, went into ``part``."""
        now = self._clock()
        self.ms[part] = self.ms.get(part, 0.0) + (now - self._last) * 1e3
        self._last = now

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part``, also when it raises; the laps do not notice."""
        start = self._clock()
        try:
            yield
        finally:
            self.ms[part] = self.ms.get(part, 0.0) + (self._clock() - start) * 1e3

    def add(self, other: Mapping[str, float], *, out_of: str = "") -> None:
        """Take over parts that somebody else has timed; they are no longer part of ``out_of``."""
        for part, ms in other.items():
            self.ms[part] = self.ms.get(part, 0.0) + ms
        if out_of:
            self.ms[out_of] -= sum(other.values())

    def end(self) -> dict[str, float]:
        """The parts, and "boundary"."""
        whole = (self._clock() - self._began) * 1e3
        return {**self.ms, "boundary": whole - sum(self.ms.get(part, 0.0) for part in OUTSIDE)}
