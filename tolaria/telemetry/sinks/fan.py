"""From the files' writers to every sink: one append for each."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tolaria.telemetry.events import Level
from tolaria.telemetry.sinks.record import STEP, Record, Sink
from tolaria.telemetry.sinks.worker import SinkThread, Tell

CLOSE_S = 5.0


class Fan:
    """Numbers the records of this start of the run and queues each for every sink. Rank 0; from any thread.

    ``queue_records``: records that wait for each sink, at most. ``interval_s``: numbers of steps that come sooner after
    the last ones are for the file only; sinks take the interpreter from the training thread, and fast steps have many.
    ``tell``: where a sink's trouble goes.
    """

    def __init__(self, sinks: Sequence[Sink], *, queue_records: int, tell: Tell, interval_s: float = 0.0) -> None:
        self._lock = threading.Lock()
        self._sequence = 0
        self._interval_ns = round(interval_s * 1e9)
        self._newest_step = (-1, 0)
        self._tell = tell
        self._threads = [SinkThread(sink, limit=queue_records, tell=tell) for sink in sinks]

    def put(
        self, kind: str, level: Level, fields: Mapping[str, Any], *, rank: int, step: int, branch: int, wall_ns: int
    ) -> None:
        """Queue one record. Never blocks, never raises; a few microseconds."""
        with self._lock:
            if kind == STEP and not self._is_due(branch, wall_ns):
                return
            self._sequence += 1
            record = Record(self._sequence, kind, level, rank, step, branch, wall_ns, fields)
            for thread in self._threads:
                thread.put(record)

    def _is_due(self, branch: int, wall_ns: int) -> bool:
        newest_branch, newest_ns = self._newest_step
        # A clock that was set back must not silence the run.
        if branch == newest_branch and 0 <= wall_ns - newest_ns < self._interval_ns:
            return False
        self._newest_step = (branch, wall_ns)
        return True

    @property
    def lost(self) -> dict[str, int]:
        """Records that each sink did not get, by its name."""
        return {thread.sink.name: thread.lost for thread in self._threads}

    def close(self) -> None:
        """Hand over what is waiting, for CLOSE_S at most over all sinks. Blocks; what is stuck then is left alone."""
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.finish()
        for thread in self._threads:
            if not thread.ended_by(deadline):
                reason = f"it did not end within {CLOSE_S:g} s"
                self._tell("sink_abandoned", "warning", sink=thread.sink.name, reason=reason, lost=thread.lost)
