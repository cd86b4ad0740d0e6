"""Every frame between run and policy, kept as it was signed: RUN/policy_frames.bin.

    entry:  mark "TLYR" | what u8 | 3 zero bytes | wall_ns u64 | size u32 | crc32 u32 of the frame | the frame
                                                                                   (big endian, 24 bytes before it)

Entries follow one another in the order in which rank 0 sent and accepted their frames, over all starts of the run. At
half its bound the file becomes policy_frames.1.bin, in place of the one before, and a new one begins: the newest frames
stay. What a crash or a full disk has cut short is passed over to the next mark by who reads (`entries`).

The training thread only queues: a thread of this file's own writes, and what it cannot write is lost and counted.
"""

import os
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from tolaria.errors import RunDirError
from tolaria.leyline.framing import OVERHEAD_BYTES, FrameKind
from tolaria.telemetry.lines import warn

FILE_NAME = "policy_frames.bin"
OLDER_NAME = "policy_frames.1.bin"

MARK = b"TLYR"
QUEUE_BYTES = 8 * 1024 * 1024
SOON_S = 0.2
CLOSE_S = 5.0
MAX_FRAME_BYTES = max(kind.max_frame_bytes for kind in FrameKind)

_ENTRY = struct.Struct("!4sB3xQII")


class What(IntEnum):
    """What a recorded frame was. MALFORMED: a reply, rightly signed, that ended the question and could not be read."""

    REQUEST = 1
    REPLY = 2
    SIGNAL = 3
    MALFORMED = 4


Keep = Callable[[What, bytes], None]
"""Told of each frame when it was sent or accepted; must not wait and must not raise."""


def keep_nothing(what: What, frame: bytes) -> None:
    """For a run that records nothing."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One recorded frame. ``wall_ns``: Unix time at rank 0 when it was sent or accepted."""

    what: What
    wall_ns: int
    frame: bytes


class FrameFile:
    """Appends frames to ``folder``, at most ``limit_bytes`` of them with those in the older file.

    Local to rank 0; `keep` may be called from one thread. ``lost`` counts frames that are not in the file; the first of
    a row of failures is told on stderr. Raises RunDirError only when the file cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        self.lost = 0
        self.path = folder / FILE_NAME
        self._older = folder / OLDER_NAME
        self._half = limit_bytes // 2
        self._wall_ns = wall_ns
        self._write = write
        self._failing = False
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        try:
            self._fd = self._open()
            self._size = os.fstat(self._fd).st_size
        except OSError as error:
            raise RunDirError(f"{self.path}: cannot be opened for writing ({error.strerror})") from error
        self._thread = threading.Thread(target=self._work, name="policy-frames", daemon=True)
        self._thread.start()

    def keep(self, what: What, frame: bytes) -> None:
        """Have a frame written. Does not wait; never raises."""
        entry = _ENTRY.pack(MARK, what, max(0, self._wall_ns()), len(frame), zlib.crc32(frame)) + frame
        with self._changed:
            if self._closed or self._queued_bytes + len(entry) > QUEUE_BYTES:
                self._fail("it is closed" if self._closed else "the disk does not keep up")
                return
            # Waking the thread would cost the caller 50 microseconds; it looks by itself.
            self._queue.append(entry)
            self._queued_bytes += len(entry)

    def close(self) -> None:
        """Write what is waiting, for `CLOSE_S` at most. Safe to call twice. Blocks."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive() and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    if self._closed:
                        return
                    self._changed.wait(SOON_S)
                    continue
                entry = self._queue.popleft()
            try:
                self._put(entry)
                self._failing = False
            except OSError as error:
                self._fail(error.strerror or str(error))
            with self._changed:
                self._queued_bytes -= len(entry)

    def _put(self, entry: bytes) -> None:
        if self._size and self._size + len(entry) > self._half:
            # The new one is open before the old one is let go of: where that fails, the old one goes on.
            os.replace(self.path, self._older)
            fresh = self._open()
            os.close(self._fd)
            self._fd, self._size = fresh, 0
        written = self._write(self._fd, entry)
        self._size += written
        if written < len(entry):
            raise OSError(0, f"only {written} of {len(entry)} bytes fitted")

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def _fail(self, why: str) -> None:
        with self._changed:
            self.lost += 1
            first, self._failing = not self._failing, True
        if first:
            warn(f"tolaria: cannot write {self.path} ({why}); training goes on, frames are not recorded")


def entries(path: Path) -> Iterator[Entry]:
    """The whole entries of a file, in its order; nothing where there is no file. Raises OSError.

    Reads one entry at a time; what is damaged is passed over.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        at = 0
        while True:
            file.seek(at)
            head = file.read(_ENTRY.size)
            if len(head) < _ENTRY.size:
                return
            found = _entry(head, file.read(_size_of(head)))
            if found is not None:
                yield found
                at += _ENTRY.size + len(found.frame)
                continue
            file.seek(at + 1)
            ahead = file.read(MAX_FRAME_BYTES)
            step = ahead.find(MARK)
            if step < 0 and len(ahead) < MAX_FRAME_BYTES:
                return
            at += 1 + (step if step >= 0 else len(ahead) - len(MARK) + 1)


def _size_of(head: bytes) -> int:
    size = int(_ENTRY.unpack(head)[3])
    return size if size <= MAX_FRAME_BYTES else 0


def _entry(head: bytes, frame: bytes) -> Entry | None:
    mark, what, wall_ns, size, checksum = _ENTRY.unpack(head)
    sound = mark == MARK and len(frame) == size >= OVERHEAD_BYTES and zlib.crc32(frame) == checksum
    if not sound or what not in tuple(What):
        return None
    return Entry(What(what), wall_ns, frame)
