"""The fence: one verdict for all ranks before a step counts.

What only one rank knows (a signal arrived) travels in one fixed-size integer MAX-reduce that starts before the step's
compute and is read after it, so that it costs no waiting. All ranks read the same verdict at the same step.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from tolaria.dist import Peers

WIDTH = 8
_STOP = 0


@dataclass(frozen=True)
class Verdict:
    """What all ranks agreed on at one step. ``stop_signal``: the signal that asked to stop, 0 for none."""

    stop_signal: int


class Fence:
    """Opened before a step, closed after it, by every rank. Belongs to the training thread."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._flags = torch.zeros(WIDTH, dtype=torch.int64)
        self._work: dist.Work | None = None

    def open(self, *, stop_signal: int) -> None:
        """Send this rank's flags. Collective, does not wait."""
        self._flags.zero_()
        self._flags[_STOP] = stop_signal
        self._work = self._peers.start_max(self._flags)

    def close(self) -> Verdict:
        """The verdict over all ranks. Blocks until every rank has opened. Raises PeerLost."""
        self._peers.finish(self._work)
        self._work = None
        return Verdict(stop_signal=int(self._flags[_STOP]))
