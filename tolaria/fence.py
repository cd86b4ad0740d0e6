"""The fence: one verdict for all ranks before a step counts.

What only one rank knows (a signal arrived, an emergency was raised, the losses of its samples) is told before a step's
compute and read before its update, so that it costs no waiting. All ranks read the same verdict at the same step.

    SharedFence       ranks of one machine, or one alone: through their page, at every step, some microseconds
    CollectiveFence   ranks of several machines: one fixed-size sum, as often as keeps its cost below a share of the
                      training time, and no later than a delay that a signal may have
"""

import math
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from tolaria.config import DistConfig
from tolaria.dist import Peers
from tolaria.errors import PeerLost
from tolaria.process import STOP_SIGNALS
from tolaria.recovery.no_page import AnyPage

MAX_LEVEL = 4
MAX_STEPS = 64
"""Steps from one sum to the next, at most: each brings its loss along."""
_SIGNALS = 0
_LEVELS = _SIGNALS + len(STOP_SIGNALS)
_LR_CHANGED = _LEVELS + MAX_LEVEL
_COST_S = _LR_CHANGED + 1
_STEP_S = _COST_S + 1
_ASKED = _STEP_S + 1
_LOSSES = 16
WIDTH = _LOSSES + MAX_STEPS
_NO_LOSS = 1
_LR_FLAG = 2
_ASKED_FLAG = 4
_LEVEL_SHIFT, _SIGNAL_SHIFT = 8, 16
_LOOK_S = 20e-6


class Verdict(NamedTuple):
    """What all ranks agreed on at one step.

    stop_signal: the signal that asked to stop, 0 for none. level: the highest emergency that any rank knows of, 0 for
    none. losses: of the oldest steps that no fence has told yet, each the mean over all its samples; NaN when it was
    not finite on any rank. lr_changed: whether some rank found a learning rate that somebody else had written.
    asked: whether an operator's order waits on any rank.
    """

    stop_signal: int = 0
    level: int = 0
    losses: tuple[float, ...] = ()
    lr_changed: bool = False
    asked: bool = False


class Fence(Protocol):
    """Opened before a step, closed before its update, by every rank. Belongs to the training thread."""

    def due(self, *, last: bool) -> bool:
        """Whether the coming step has a fence. ``last``: something follows it that has to know. Equal on all ranks."""

    def open(self, *, stop_signal: int, level: int, losses: Sequence[float], lr_changed: bool, asked: bool) -> None:
        """Tell what this rank knows. ``losses``: of its parts of the steps that no fence has told yet, oldest first, at
        most MAX_STEPS; their number is the same on all ranks. Collective, does not wait."""

    def close(self) -> Verdict | None:
        """The verdict over all ranks; None when no fence is open. Blocks until every rank has opened it. Raises
        PeerLost."""

    def stepped(self, seconds: float) -> None:
        """A step is over; how long it took on this rank. Local."""

    def restart(self) -> None:
        """Have a fence at the next step. Call it alike on all ranks."""


class SharedFence:
    """Through memory that all ranks map. A rank is at most one turn ahead of the others: `close` waits for all.

    After a step's gradients are reduced all ranks have told long since, and nobody waits.
    """

    def __init__(self, page: AnyPage, ranks: int, *, timeout_s: float) -> None:
        self._page = page
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._turn = 0
        self._open = False

    def due(self, *, last: bool) -> bool:
        """Always: it costs nothing that would be worth saving."""
        return True

    def open(self, *, stop_signal: int, level: int, losses: Sequence[float], lr_changed: bool, asked: bool) -> None:
        """As `Fence.open`; one loss at a turn, and the others wait for the next."""
        flags = (0 if losses else _NO_LOSS) | (_LR_FLAG if lr_changed else 0) | (_ASKED_FLAG if asked else 0)
        flags |= min(level, MAX_LEVEL) << _LEVEL_SHIFT | stop_signal << _SIGNAL_SHIFT
        self._turn += 1
        self._open = True
        self._page.tell(self._turn, flags, losses[0] if losses else 0.0)

    def close(self) -> Verdict | None:
        """As `Fence.close`."""
        if not self._open:
            return None
        told = self._page.told(self._turn) or self._wait()
        self._open = False
        if len(told) == 1:
            flags, loss = told[0]
        else:
            flags, loss = 0, 0.0
            for other, part in told:
                level = max(flags & 0xFF << _LEVEL_SHIFT, other & 0xFF << _LEVEL_SHIFT)
                stop = max(flags >> _SIGNAL_SHIFT, other >> _SIGNAL_SHIFT)
                flags = (flags | other) & 0xFF | level | stop << _SIGNAL_SHIFT
                loss += part
            loss /= self._ranks
        losses = () if flags & _NO_LOSS else (loss if math.isfinite(loss) else math.nan,)
        level, stop = flags >> _LEVEL_SHIFT & 0xFF, flags >> _SIGNAL_SHIFT
        return Verdict(stop, level, losses, bool(flags & _LR_FLAG), bool(flags & _ASKED_FLAG))

    def _wait(self) -> list[tuple[int, float]]:
        end = time.monotonic() + self._timeout_s
        while (told := self._page.told(self._turn)) is None:
            if time.monotonic() > end:
                raise PeerLost(f"fence: another rank of this machine did not answer within {self._timeout_s:g} s")
            time.sleep(_LOOK_S)
        return told

    def stepped(self, seconds: float) -> None:
        """It does not matter here."""

    def restart(self) -> None:
        """Every step has one."""


class CollectiveFence:
    """By a sum over all ranks that is in flight while the step computes."""

    def __init__(self, peers: Peers, config: DistConfig) -> None:
        self._peers = peers
        self._config = config
        self._told = torch.zeros(WIDTH, dtype=torch.float64)
        self._work: dist.Work | None = None
        self._count = 0
        self._left = 0
        self._steps_s: list[float] = []
        self._open = False
        self.cost_s = 0.0
        self.interval = 1

    def due(self, *, last: bool) -> bool:
        """As `Fence.due`."""
        return last or self._left <= 0

    def stepped(self, seconds: float) -> None:
        """As `Fence.stepped`."""
        self._left -= 1
        self._steps_s.append(seconds)

    def restart(self) -> None:
        """As `Fence.restart`."""
        self._left = 0
        self._steps_s.clear()

    def open(self, *, stop_signal: int, level: int, losses: Sequence[float], lr_changed: bool, asked: bool) -> None:
        """As `Fence.open`."""
        told = [0.0] * WIDTH
        told[_LR_CHANGED] = float(lr_changed)
        told[_ASKED] = float(asked)
        told[_COST_S] = self.cost_s
        told[_STEP_S] = sum(self._steps_s) / len(self._steps_s) if self._steps_s else 0.0
        told[_LOSSES : _LOSSES + len(losses)] = losses
        if stop_signal:
            told[_SIGNALS + STOP_SIGNALS.index(signal.Signals(stop_signal))] = 1.0
        if level:
            told[_LEVELS + min(level, MAX_LEVEL) - 1] = 1.0
        self._count = len(losses)
        self._steps_s.clear()
        self._told = torch.tensor(told, dtype=torch.float64)
        self._work = self._peers.start_sum(self._told)
        self._open = True

    def close(self) -> Verdict | None:
        """As `Fence.close`."""
        if not self._open:
            return None
        self._peers.finish(self._work)
        self._work = None
        self._open = False
        told = self._told.tolist()
        ranks = self._peers.world_size
        self.interval = self._left = self._steps_apart(told[_COST_S] / ranks, told[_STEP_S] / ranks)
        # Counts, not flags: they tell how many ranks said it. What is not finite stays so in a sum.
        losses = (total / ranks for total in told[_LOSSES : _LOSSES + self._count])
        signals = (int(number) for at, number in enumerate(STOP_SIGNALS) if told[_SIGNALS + at])
        return Verdict(
            stop_signal=next(signals, 0),
            level=max((level for level in range(1, MAX_LEVEL + 1) if told[_LEVELS + level - 1]), default=0),
            losses=tuple(loss if math.isfinite(loss) else math.nan for loss in losses),
            lr_changed=bool(told[_LR_CHANGED]),
            asked=bool(told[_ASKED]),
        )

    def _steps_apart(self, cost_s: float, step_s: float) -> int:
        config = self._config
        if config.fence_steps:
            return config.fence_steps
        return steps_apart(cost_s, step_s, share=config.fence_share, delay_s=config.fence_delay_ms / 1000)


def steps_apart(cost_s: float, step_s: float, *, share: float, delay_s: float) -> int:
    """Steps from one fence to the next, so that it costs at most ``share`` of them and delays by ``delay_s`` at most.

    Where both can not be had, the delay counts. 1 while either time is unknown (0). Pure.
    """
    if step_s <= 0 or cost_s <= 0:
        return 1
    return max(1, min(math.ceil(cost_s / (share * step_s)), math.floor(delay_s / step_s), MAX_STEPS))
