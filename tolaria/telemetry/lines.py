"""Append-only files of JSON lines that never stop a training run."""

import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

from tolaria.errors import RunDirError

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None

MAX_TEXT = 4000
"""Longest string that goes into a line, in characters; the rest is cut off."""

PATIENCE_S = 0.005
LATE_S = 1.0
SOON_S = 0.2
CLOSE_S = 5.0
QUEUE_BYTES = 1 << 20

_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def to_json(value: object) -> JSON:
    """``value`` as valid JSON: NaN and infinities become strings, enum members their names, bytes hex.

    Anything else that JSON does not know becomes its ``str()``. Strings are cut at MAX_TEXT characters.
    """
    # Tuples of types, the usual ones first: unions and abstract classes take four times as long.
    if type(value) is str and len(value) <= MAX_TEXT:
        return value
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, Enum)):
        return value if not isinstance(value, float) or math.isfinite(value) else _NON_FINITE[str(float(value))]
    if isinstance(value, (dict, Mapping)):
        return {str(to_json(k)): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(v) for v in value]
    text = value.name if isinstance(value, Enum) else value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + f"... ({len(text)} characters)"


class LineFile:
    """One JSON object per line, each call one ``os.write`` with O_APPEND, done by a thread of the file's own.

    Several processes and threads may append to one file: on a local file system their lines do not mix. A line waited
    for is in the file when `append` returns, unless the disk takes longer than PATIENCE_S: then the caller goes on,
    nobody waits for LATE_S, and up to QUEUE_BYTES are kept until the disk can take them. ``lost`` counts the calls
    whose lines did not get into the file (full disk, full queue); the first of a row of failures is told on stderr,
    and the next line that fits is preceded by what ``notice`` makes of the number lost before it. Local. Raises
    RunDirError only when the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        write: Callable[[int, bytes], int] = os.write,
        notice: Callable[[int], Mapping[str, object]] | None = None,
    ) -> None:
        self.path = path
        self.lost = 0
        self._write = write
        self._notice = notice
        self._untold = 0
        self._failing = False
        self._torn = False
        self._changed = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._queued_bytes = 0
        self._closed = False
        self._patient_from = 0.0
        self._thread: threading.Thread | None = None
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RunDirError(f"{path}: cannot be opened for writing ({error.strerror})") from error

    def append(self, record: Mapping[str, object], *, wait: bool = True, wake: bool = True) -> bool:
        """Write the record on a line of its own. False if it is known to be lost.

        ``wait`` False: written at once, but not waited for; ``wake`` False too: within SOON_S.
        """
        entry = _Entry(_line(record))
        with self._changed:
            if self._closed:
                self._fail("it is closed")
                return False
            if self._queued_bytes + len(entry.data) > QUEUE_BYTES:
                self._fail("the disk does not keep up")
                return False
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"lines-{self.path.name}", daemon=True)
                self._thread.start()
            self._queue.append(entry)
            self._queued_bytes += len(entry.data)
            if wait or wake:
                # Waking the thread costs the caller 50 microseconds; without it, it looks by itself.
                self._changed.notify()
        if wait and time.monotonic() >= self._patient_from and not entry.done.wait(PATIENCE_S):
            self._patient_from = time.monotonic() + LATE_S
        return not entry.failed

    def close(self) -> None:
        """Write what is waiting, for CLOSE_S at most, and close the file. Lines appended later are lost, and counted.

        Blocks.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                with self._changed:
                    self._fail("the disk does not answer", calls=len(self._queue) + 1)
                return  # its descriptor stays open: the thread may be using it
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._queue and not self._closed:
                    self._changed.wait(SOON_S)
                if not self._queue:
                    if self._closed:
                        return
                    continue
                entry = self._queue.popleft()
            entry.failed = not self._put(entry.data)
            with self._changed:
                self._queued_bytes -= len(entry.data)
            entry.done.set()

    def _put(self, data: bytes) -> bool:
        if self._untold and self._notice is not None:
            data = _line(self._notice(self._untold)) + data
        # A write that was cut short left half a line; a line break keeps the next one readable.
        data = b"\n" + data if self._torn else data
        try:
            written = self._write(self._fd, data)
        except OSError as error:
            self._fail(error.strerror or str(error))
            return False
        if written < len(data):
            self._torn = True
            self._fail(f"only {written} of {len(data)} bytes fitted")
            return False
        self._torn = self._failing = False
        self._untold = 0
        return True

    def _fail(self, why: str, *, calls: int = 1) -> None:
        with self._changed:
            self.lost += calls
            self._untold += calls
            first, self._failing = not self._failing, True
        if first:
            warn(f"tolaria: cannot write {self.path} ({why}); training goes on, lines are lost")


class _Entry:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.failed = False
        self.done = threading.Event()


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(to_json(record), ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def warn(text: str) -> None:
    """One line on stderr, from code that must not fail."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        # stderr is closed or full as well: there is nobody left to tell.
        return


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, in file order; lines that a full disk or a kill cut short are skipped."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
