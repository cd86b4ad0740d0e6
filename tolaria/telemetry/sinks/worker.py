"""One sink's thread and its bounded queue: what keeps a slow, full or broken sink away from training.

    put         in the training thread: one append, a few microseconds, never blocks, never raises
    the thread  looks several times a second, hands over what has come, tells of trouble once per kind

A full queue drops the new record and counts it; a critical one is kept all the same.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tolaria.telemetry.events import Level
from tolaria.telemetry.sinks.record import Record, Sink

SOON_S = 0.2
"""Until the thread looks by itself: to wake it costs the training thread more than the record is worth."""
REST_S = 1.0
LONGEST_REST_S = 60.0


class Tell(Protocol):
    """Where a sink's trouble is told: `EventLog.emit`."""

    def __call__(self, kind: str, level: Level = "info", **fields: object) -> None:
        """Write one event."""
        ...


class SinkBroken(Exception):
    """A sink has raised what no disk or network raises."""


class SinkThread:
    """Hands records to ``sink``. ``limit``: records that wait for it, at most, critical ones not counted.

    ``tell`` is called in the sink's thread.
    """

    def __init__(self, sink: Sink, *, limit: int, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self.sink = sink
        self.given_up = False
        self._limit = limit
        # Counted apart: one in the threads that put, one in this thread.
        self._dropped = 0
        self._failed = self._unflushed = 0
        self._tell = tell
        self._clock = clock
        self._queue: deque[Record] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._rest_s = 0.0
        self._resting_until = 0.0
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"sink-{sink.name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Records that the sink was never given, failed to take, or had not flushed when it failed."""
        return self._dropped + self._failed

    def put(self, record: Record) -> None:
        """Queue one record. Called under the fan's lock."""
        critical = record.level == "critical"
        if self.given_up or (len(self._queue) >= self._limit and not critical):
            self._dropped += 1
            return
        self._queue.append(record)
        if critical:
            self._wake.set()

    def finish(self) -> None:
        """Ask the thread to hand over what is waiting, and to end. Does not wait."""
        self._closing = True
        self._wake.set()

    def ended_by(self, deadline: float) -> bool:
        """Whether the thread has ended by this time of `time.monotonic`; blocks until one or the other."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while not self.given_up:
            self._wake.wait(SOON_S)
            self._wake.clear()
            closing = self._closing
            self._turn(last=closing)
            if self.lost:
                self._once("sink_lost_records", "warning", reason="its queue was full, or it failed")
            if closing:
                break
        self._failed += len(self._queue)
        self._end()

    def _turn(self, *, last: bool) -> None:
        """Hand over what is waiting, unless the sink rests; a run that ends does not wait for it."""
        if self._clock() < self._resting_until and not last:
            return
        try:
            while self._queue:
                record = self._queue.popleft()
                self._unflushed += 1
                self._attempt(lambda record=record: self.sink.write(record))  # type: ignore[misc]
            self._attempt(self.sink.flush)
            self._unflushed = 0
        except OSError as error:
            # What the sink had taken since it was last flushed may be lost with the record that failed.
            self._failed, self._unflushed = self._failed + self._unflushed, 0
            self._rest_s = min(LONGEST_REST_S, 2 * self._rest_s or REST_S)
            self._resting_until = self._clock() + self._rest_s
            self._once("sink_failing", "warning", reason=f"{type(error).__name__}: {error}")
        except SinkBroken as error:
            self.given_up = True
            self._failed += 1 + len(self._queue)
            self._queue.clear()
            self._once("sink_given_up", "error", reason=str(error))
        else:
            self._rest_s = 0.0

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError:
            raise
        except Exception as error:  # a sink's package, or its service's: whatever comes out must not end the run
            raise SinkBroken(f"{type(error).__name__}: {error}") from error

    def _end(self) -> None:
        try:
            self._attempt(self.sink.close)
        except (OSError, SinkBroken) as error:
            self._once("sink_failing", "warning", reason=f"closing it: {error}")

    def _once(self, kind: str, level: Level, *, reason: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._tell(kind, level, sink=self.sink.name, reason=reason, lost=self.lost)
