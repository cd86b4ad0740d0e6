"""A file of JSON lines that is still being written, read on from where the last look ended."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from tolaria.errors import RunDirError


class Tail:
    """Gives each whole line once. A file that is not there yet is empty; one that was replaced or cut is begun anew.

    Local; keeps no file open between two looks. Raises RunDirError for a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._file = (0, 0)  # device and inode

    def new(self) -> list[dict[str, Any]]:
        """The records written since the last call; damaged lines are passed over."""
        return [record for _, record in self.new_lines()]

    def new_lines(self) -> list[tuple[str, dict[str, Any]]]:
        """The same, each with its line as it stands in the file."""
        try:
            with self.path.open("rb") as file:
                return list(self._read(file))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunDirError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _read(self, file: BinaryIO) -> list[tuple[str, dict[str, Any]]]:
        found = os.fstat(file.fileno())
        if (found.st_dev, found.st_ino) != self._file or found.st_size < self._at:
            self._file, self._at = (found.st_dev, found.st_ino), 0
        file.seek(self._at)
        records = []
        for raw in file:
            if not raw.endswith(b"\n"):
                break  # still being written
            self._at += len(raw)
            record = parsed(raw)
            if record is not None:
                records.append((raw.decode(errors="replace").rstrip("\n"), record))
        return records


def parsed(raw: bytes) -> dict[str, Any] | None:
    """The record of a line; None for one that a full disk or a kill has cut short."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
