"""Event files for TensorBoard, written with its own record writer; neither TensorFlow nor torch is needed.

    <folder>/branch-0/events.out.tfevents...     the run as it began
    <folder>/branch-1/...                        and after its first return to an earlier state

TensorBoard shows each branch as a run of its own: what was undone stays to be seen, and no curve goes backwards.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any

from tolaria.errors import ConfigError
from tolaria.telemetry.sinks.points import points_of
from tolaria.telemetry.sinks.record import Record


class TensorBoardSink:
    """Writes every number as a scalar by step. Raises ConfigError when the package or the folder can not be had."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415
            from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
            from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                f"telemetry.tensorboard={str(folder)!r}: {error}; pip install 'tolaria[telemetry]', or leave it empty"
            ) from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"telemetry.tensorboard: {folder} cannot be made ({error.strerror})") from error
        self._folder = folder
        self._event: Any = Event
        self._summary: Any = Summary
        self._record_writer: Any = RecordWriter
        self._writer: Any = None
        self._branch = -1
        self._files = 0

    @property
    def where(self) -> str:
        """The folder of all branches."""
        return str(self._folder)

    def write(self, record: Record) -> None:
        """Add the record's numbers; those of another branch begin a file in its folder."""
        points = points_of(record)
        if not points:
            return
        if record.branch != self._branch:
            self._let_go()
            self._branch = record.branch
        values = [self._summary.Value(tag=point.tag, simple_value=point.value) for point in points]
        event = self._event(
            wall_time=record.wall_ns / 1e9, step=record.step, summary=self._summary(value=values)
        )  # fmt: skip
        self._put(event.SerializeToString())

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        if self._writer is None:
            return
        try:
            self._writer.flush()
        except OSError:
            self._abandon()
            raise

    def close(self) -> None:
        """Flush and close the file."""
        self._let_go()

    def _put(self, data: bytes) -> None:
        if self._writer is None:
            self._writer = self._begin()
        try:
            self._writer.write(data)
        except OSError:
            self._abandon()
            raise

    def _begin(self) -> Any:
        folder = self._folder / f"branch-{self._branch}"
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        now, self._files = time.time(), self._files + 1
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{self._files}"
        writer = self._record_writer((folder / name).open("wb"))
        writer.write(self._event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        return writer

    def _let_go(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _abandon(self) -> None:
        """A record that was cut short ends what can be read of a file, so the next one goes into a new file."""
        writer, self._writer = self._writer, None
        # Closing tries to write the rest again, and lets go of the file all the same.
        _close_anyway(writer)


def _close_anyway(writer: Any) -> None:
    try:
        writer.close()
    except OSError:
        return
