"""What other ranks tell from a warning on, read from the file that all ranks write to."""

import json
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

from tolaria.telemetry.events import Listener

POLL_S = 0.5
MOST_BYTES = 1 << 20
_FOLLOWED = ("warning", "error", "critical")


class Follower:
    """Hands lines that other ranks than 0 add to events.jsonl to ``listener``, from a thread of its own, until closed.

    A line is seen within POLL_S; ranks on other machines need a file system that shows it to this one. A file that can
    not be read is tried again.
    """

    def __init__(self, path: Path, run_id: str, listener: Listener) -> None:
        self._path = path
        self._run_id = run_id
        self._listener = listener
        self._at = path.stat().st_size if path.exists() else 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="follow-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read what is there, and stop. Waits for the thread."""
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        ending = False
        while not ending:
            # Asked before reading, so that what was there when the end came is read.
            ending = self._ended.wait(POLL_S)
            try:
                if self._path.stat().st_size > self._at:
                    with self._path.open("rb") as file:
                        self._read(file)
            except OSError:
                continue

    def _read(self, file: BinaryIO) -> None:
        file.seek(self._at)
        while chunk := file.read(MOST_BYTES):
            whole, newline, _ = chunk.rpartition(b"\n")
            if not newline and len(chunk) == MOST_BYTES:
                whole = chunk  # no line is that long
            elif not newline:
                return
            self._at += len(whole) + len(newline)
            file.seek(self._at, os.SEEK_SET)
            for line in whole.split(b"\n"):
                # Most lines are rank 0's own, and need not be taken apart.
                if b'"rank":0,' not in line[:200]:
                    self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            event: Any = json.loads(line)
            if event["run_id"] != self._run_id or event["rank"] == 0 or event["level"] not in _FOLLOWED:
                return
            where = {name: int(event.pop(name)) for name in ("rank", "step", "branch", "wall_ns")}
            kind, level = str(event.pop("kind")), event.pop("level")
        except (ValueError, KeyError, TypeError):
            return  # cut short by a full disk or a kill, as `read_lines` skips it too
        del event["run_id"]
        event.pop("mono_ns", None)
        self._listener(kind, level, event, **where)
