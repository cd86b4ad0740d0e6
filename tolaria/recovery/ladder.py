"""Which checkpoints are good. Pure: a checkpoint is a candidate until enough healthy boundaries have followed it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Rung:
    """One committed checkpoint."""

    seq: int
    step: int
    branch: int
    acts: int = 0
    healthy: int = 0
    good: bool = False


class Ladder:
    """The committed checkpoints of a run on their way from candidate to good. Rank 0 only.

    A return takes those off that are not part of the run's course any more. What is good stays good.
    """

    def __init__(self, good_after: int) -> None:
        self._good_after = good_after
        self.rungs: dict[int, Rung] = {}

    def add(self, seq: int, step: int, branch: int, acts: int = 0, *, good: bool = False) -> None:
        """A checkpoint was committed."""
        self.rungs[seq] = Rung(seq, step, branch, acts, good=good)

    def healthy_boundary(self) -> list[int]:
        """A boundary passed without an incident; the checkpoints that became good by it."""
        promoted = []
        for rung in self.rungs.values():
            if rung.good:
                continue
            rung.healthy += 1
            if rung.healthy >= self._good_after:
                rung.good = True
                promoted.append(rung.seq)
        return promoted

    def sick(self) -> None:
        """An incident: candidates begin to wait anew."""
        for rung in self.rungs.values():
            rung.healthy = 0

    def take_off(self, void: Callable[[Rung], bool]) -> set[int]:
        """Take off every checkpoint of which ``void`` is true; their numbers."""
        gone = {seq for seq, rung in self.rungs.items() if void(rung)}
        self.rungs = {seq: rung for seq, rung in self.rungs.items() if seq not in gone}
        return gone

    @property
    def newest_good(self) -> Rung | None:
        """The good checkpoint with the highest number, None if there is none."""
        return max((r for r in self.rungs.values() if r.good), key=lambda r: r.seq, default=None)

    @property
    def newest(self) -> Rung | None:
        """The newest checkpoint, good or candidate."""
        return max(self.rungs.values(), key=lambda r: r.seq, default=None)
