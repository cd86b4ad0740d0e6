"""Append-only files of JSON lines that never stop a training run."""

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

from tolaria.errors import RunDirError

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None

MAX_TEXT = 4000
"""Longest string that goes into a line, in characters; the rest is cut off."""

_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def to_json(value: object) -> JSON:
    """``value`` as valid JSON: NaN and infinities become strings, enum members their names, bytes hex.

    Anything else that JSON does not know becomes its ``str()``. Strings are cut at MAX_TEXT characters.
    """
    if value is None or (isinstance(value, bool | int | float) and not isinstance(value, Enum)):
        return value if not isinstance(value, float) or math.isfinite(value) else _NON_FINITE[str(float(value))]
    if isinstance(value, Mapping):
        return {str(to_json(k)): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(v) for v in value]
    text = value.name if isinstance(value, Enum) else value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + f"... ({len(text)} characters)"


class LineFile:
    """One JSON object per line, each call one ``os.write`` with O_APPEND.

    Several processes and threads may append to one file: on a local file system their lines do not mix. Local, does
    not wait for the disk. ``lost`` counts the calls whose lines could not be written (full disk); the first of a row
    of failures is told on stderr, and the caller goes on. Raises RunDirError only when the file cannot be opened.
    """

    def __init__(self, path: Path, *, write: Callable[[int, bytes], int] = os.write) -> None:
        self.path = path
        self.lost = 0
        self._write = write
        self._failing = False
        self._torn = False
        self._lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RunDirError(f"{path}: cannot be opened for writing ({error.strerror})") from error

    def append(self, *records: Mapping[str, object]) -> bool:
        """Write the records, each on a line of its own, all in one write. False if they were lost."""
        text = "".join(json.dumps(to_json(r), ensure_ascii=True, separators=(",", ":")) + "\n" for r in records)
        with self._lock:
            # A write that was cut short left half a line; a line break keeps the next one readable.
            data = (("\n" if self._torn else "") + text).encode()
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
            return True

    def close(self) -> None:
        """Close the file. Lines appended later are lost, and counted."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _fail(self, why: str) -> None:
        self.lost += 1
        if not self._failing:
            self._failing = True
            warn(f"tolaria: cannot write {self.path} ({why}); training goes on, lines are lost")


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
