"""Emergencies on their way out of the policy: asked of each run's policy, signed, kept until they could be sent.

No sockets. The trainer's last question says which run and start is at the other end and by which connection it is
reached; before the first question of a run nothing can be raised to it.

Marks must grow over the life of the run, which is longer than that of this process, and nothing is stored here: each
mark is the wall clock in nanoseconds, or one more than the last where the clock has not moved on. A clock set back
between two lives of the policy makes its signals look old until it has caught up; the trainer counts them as
"replayed".
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tolaria.leyline.codec import encode_signal
from tolaria.leyline.framing import FrameHeader, KeyRing, seal, signal_header
from tolaria.tamiyo.policy import Policy

log = logging.getLogger("tolaria.tamiyo")

MAX_LINES = 64


@dataclass
class _Line:
    """The way back to one run: its newest question, where that came from, and what was raised."""

    newest: FrameHeader
    receiver: bytes
    raised_level: int = 0
    last: bytes = b""
    unsent: bytes = b""


class SignalOutbox:
    """Raises the emergencies of any number of policies, each to its own run. One thread uses it."""

    def __init__(self, keys: KeyRing, *, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self.failed: Counter[bytes] = Counter()
        self._keys = keys
        self._wall_ns = wall_ns
        self._mark = 0
        self._lines: OrderedDict[bytes, _Line] = OrderedDict()

    def heard(self, question: FrameHeader, sender: bytes) -> None:
        """A verified question that is not older than any before it came from ``sender``."""
        line = self._lines.get(question.run_id)
        if line is None or line.newest.generation != question.generation:
            if line is not None and line.unsent:
                log.warning("an emergency for an earlier start of the run was never sent and is dropped")
            line = self._lines[question.run_id] = _Line(question, sender)
        elif sender != line.receiver:
            # What went to the lost connection may be lost with it; the mark keeps it from being taken twice.
            line.unsent = line.last
        line.newest, line.receiver = question, sender
        self._lines.move_to_end(question.run_id)
        if len(self._lines) > MAX_LINES:
            self._lines.popitem(last=False)

    def send(self, policies: Mapping[bytes, Policy], send: Callable[[bytes, bytes], bool]) -> None:
        """Ask every run's policy for an emergency and send what is due with ``send(receiver, frame)``.

        What ``send`` refuses is kept for the next call, and while it waits its policy is not asked.
        """
        for run_id, line in self._lines.items():
            policy = policies.get(run_id)
            if not line.unsent and policy is not None:
                line.unsent = self._raised(run_id, line, policy)
            if line.unsent and send(line.receiver, line.unsent):
                line.last, line.unsent = line.unsent, b""
                if policy is not None:
                    # A policy that hands out each finding once may have the same level to raise at its next question,
                    # however soon that comes.
                    line.unsent = self._raised(run_id, line, policy)

    def _raised(self, run_id: bytes, line: _Line, policy: Policy) -> bytes:
        """The signed frame of what the policy raises now; empty when there is nothing new."""
        try:
            signal = policy.emergency()
            if signal is None:
                line.raised_level = 0
                return b""
            if signal.level <= line.raised_level:
                return b""
            payload = encode_signal(replace(signal, origin=signal.origin or policy.version), raised_at_ns=self._now())
        except Exception:  # the user's policy: whatever comes out of it must not end the service
            self.failed[run_id] += 1
            if self.failed[run_id] & (self.failed[run_id] - 1) == 0:
                # At powers of two only: it is asked many times a second.
                log.exception("the policy's emergency() failed (%d so far)", self.failed[run_id])
            return b""
        line.raised_level = signal.level
        self._mark = max(self._mark + 1, self._wall_ns())
        log.warning("emergency of level %d (%s): %s", signal.level, signal.level.name, signal.reason)
        return seal(signal_header(line.newest, mark=self._mark, wall_ns=self._now()), payload, self._keys)

    def _now(self) -> int:
        return max(0, self._wall_ns())
