"""Emergencies as the training loop sees them: raised by anybody, carried to all ranks by the fence, answered together.

level 2, 3   the guard goes back to an earlier state; then the level is cleared on all ranks
level 4      freeze: the step in hand makes no update. Cleared in time, it goes on as if nothing had been; else the
             newest snapshot becomes a checkpoint and the run ends until a person resumes it

The mapped page makes a level visible within milliseconds, whatever a rank is doing; what is done about it is decided
at the fence, so that it is done by all ranks at the same step.
"""

import time
from collections.abc import Callable, Sequence

from tolaria.dist import World
from tolaria.errors import RunHalted
from tolaria.leyline.types import EmergencySignal
from tolaria.process import StopFlag
from tolaria.recovery.journal import Journal
from tolaria.recovery.no_page import AnyPage
from tolaria.recovery.page import Phase
from tolaria.telemetry.events import EventLog

NOTICE, ELEVATED, CONSERVATIVE, HALT = range(1, 5)
POLL_S = 0.05


class Alarm:
    """One per rank. ``signals``: what the policy has raised since the last call (rank 0; nothing elsewhere)."""

    def __init__(
        self,
        page: AnyPage,
        world: World,
        events: EventLog,
        journal: Journal,
        stop: StopFlag,
        *,
        halt_wait_s: float,
        signals: Callable[[], Sequence[EmergencySignal]],
    ) -> None:
        self.page = page
        self.world = world
        self.events = events
        self.journal = journal
        self._stop = stop
        self._halt_wait_s = halt_wait_s
        self._signals = signals
        self._told = 0

    def level(self) -> int:
        """The highest level this rank knows of, for the next fence. Local; some microseconds."""
        signals = self._signals()
        for signal in signals:
            self.page.raise_level(int(signal.level), f"{signal.origin or 'policy'}: {signal.reason}")
        if signals:
            self.journal.signal_mark(max(signal.mark for signal in signals))
        level = self.page.level()
        if level != self._told:
            self._told = level
            if level:
                self.events.emit("emergency", "warning" if level < CONSERVATIVE else "error", emergency_level=level,
                                 reason=self.page.reason())  # fmt: skip
        return level

    def at_boundary(self, step: int) -> None:
        """Say where the run is. A notice has been told, and that is all that is done about it. Local."""
        self.page.enter(Phase.BOUNDARY, step)
        if self._told == NOTICE:
            self.page.clear(NOTICE)
            self._told = 0

    def answered(self, level: int) -> None:
        """What a level asks for is done: clear it everywhere; a higher one stays. Collective."""
        self.page.clear(level)
        # Nobody reads its page again before the last one has cleared its own.
        self.world.peers.barrier()
        self._told = 0

    def freeze(self, save: Callable[[], None]) -> None:
        """Stand still until the level is cleared; collective, called in the middle of a step.

        Returns when it was cleared in time. Otherwise, or when asked to stop, calls ``save`` and raises RunHalted.
        """
        self.page.enter(Phase.HALTED, self.events.step)
        reason = self.page.reason() or "raised on another node"
        self.events.emit("halted", "critical", reason=reason, wait_s=self._halt_wait_s)
        end = time.monotonic() + self._halt_wait_s
        while True:
            rows = self.world.peers.gather([self.page.level(), int(time.monotonic() > end), int(self._stop.is_set)])
            if max(row[0] for row in rows) < HALT:
                self.events.emit("halt_cleared", reason=reason)
                self.page.enter(Phase.STEP, self.events.step)
                return
            if any(row[1] or row[2] for row in rows):
                break
            time.sleep(POLL_S)
        self.journal.halted(reason)
        self.page.enter(Phase.SAVE, self.events.step)
        save()
        raise RunHalted(f"halted ({reason}) and not cleared within {self._halt_wait_s:g} s; the state is saved")
