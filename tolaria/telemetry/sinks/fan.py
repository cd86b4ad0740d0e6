"""From the files' writers to every sink: one append for each."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tolaria.telemetry.events import Level
from tolaria.telemetry.sinks.record import Record, Sink
from tolaria.telemetry.sinks.worker import SinkThread, Tell

CLOSE_S = 5.0


class Fan:
    """Numbers the records of this start of the run and queues each for every sink. Rank 0; from any thread.

    ``queue_records``: records that wait for each sink, at most. ``tell``: where a sink's trouble goes.
    """

    def __init__(self, sinks: Sequence[Sink], *, queue_records: int, tell: Tell) -> None:
        self._lock = threading.Lock()
        self._sequence = 0
        self._tell = tell
        self._threads = [SinkThread(sink, limit=queue_records, tell=tell) for sink in sinks]

    def put(
        self, kind: str, level: Level, fields: Mapping[str, Any], *, rank: int, step: int, branch: int, wall_ns: int
    ) -> None:
        """Queue one record. Never blocks, never raises; a few microseconds."""
        with self._lock:
            self._sequence += 1
            record = Record(self._sequence, kind, level, rank, step, branch, wall_ns, fields)
            for thread in self._threads:
                thread.put(record)

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
