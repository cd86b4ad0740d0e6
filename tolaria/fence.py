"""The fence: one verdict for all ranks before a step counts.

What only one rank knows (a signal arrived, an emergency was raised, the loss of its samples) travels in one fixed-size
sum that starts before the step's compute and is read before its update, so that it costs no waiting. All ranks read
the same verdict at the same step. Counts, not flags: a sum tells how many ranks said it, and carries the loss as well.
"""

import math
import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tolaria.dist import Peers
from tolaria.process import STOP_SIGNALS

MAX_LEVEL = 4
_LOSS, _LOSSES, _NOT_FINITE = range(3)
_SIGNALS = 3
_LEVELS = _SIGNALS + len(STOP_SIGNALS)
_LR_CHANGED = _LEVELS + MAX_LEVEL
WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all ranks agreed on at one step.

    stop_signal: the signal that asked to stop, 0 for none. level: the highest emergency that any rank knows of, 0 for
    none. loss: of the step before, mean over all its samples; NaN or inf when it was that on any rank; None when there
    was no step before. lr_changed: whether some rank found a learning rate that somebody else had written.
    """

    stop_signal: int
    level: int
    loss: float | None
    lr_changed: bool = False


class Fence:
    """Opened before a step, closed before its update, by every rank. Belongs to the training thread."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._told = torch.zeros(WIDTH, dtype=torch.float64)
        self._work: dist.Work | None = None

    def open(
        self, *, stop_signal: int, level: int = 0, loss: float | None = None, lr_changed: bool = False
    ) -> None:  # fmt: skip
        """Send what this rank knows. ``loss``: of its part of the step before. Collective, does not wait."""
        told = [0.0] * WIDTH
        told[_LR_CHANGED] = float(lr_changed)
        if loss is not None:
            finite = math.isfinite(loss)
            told[_LOSS], told[_LOSSES], told[_NOT_FINITE] = (loss if finite else 0.0), 1.0, float(not finite)
        if stop_signal:
            told[_SIGNALS + STOP_SIGNALS.index(signal.Signals(stop_signal))] = 1.0
        if level:
            told[_LEVELS + min(level, MAX_LEVEL) - 1] = 1.0
        self._told.copy_(torch.tensor(told, dtype=torch.float64))
        self._work = self._peers.start_sum(self._told)

    def close(self) -> Verdict:
        """The verdict over all ranks. Blocks until every rank has opened. Raises PeerLost."""
        self._peers.finish(self._work)
        self._work = None
        told = self._told.tolist()
        loss = None
        if told[_LOSSES]:
            loss = math.nan if told[_NOT_FINITE] else told[_LOSS] / told[_LOSSES]
        signals = (int(number) for at, number in enumerate(STOP_SIGNALS) if told[_SIGNALS + at])
        return Verdict(
            stop_signal=next(signals, 0),
            level=max((level for level in range(1, MAX_LEVEL + 1) if told[_LEVELS + level - 1]), default=0),
            loss=loss,
            lr_changed=bool(told[_LR_CHANGED]),
        )
