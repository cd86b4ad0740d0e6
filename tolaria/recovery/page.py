"""The page: a mapped file in which the ranks of one machine, the watchdog and the operator see each other.

    line 0        version, number of ranks, watchdog's process, whether the run is ending
    line 1        the operator's alarm
    line 2 + r    rank r: process, heartbeat, phase, step, its alarm, what it has acknowledged, its fences

An alarm is written with a number that is odd meanwhile, and a checksum; readers that meet it half written do not see
it. Everything else is single 8-byte words. No torch here: watchdog and operator start within milliseconds.
"""

import mmap
import os
import time
import zlib
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Self

LINE_WORDS = 48
LINE_BYTES = 8 * LINE_WORDS
REASON_BYTES = 120
MAX_LEVEL = 4
FILE_MODE = 0o600
OPERATOR = 1
VERSION = 2
_MAGIC = int.from_bytes(b"TLPAGE01", "little")

# Line 0
_IS_PAGE, _VERSION, _RANKS, _WATCHDOG_PID, _CLOSING = range(5)
# A rank's line
_PID, _START, _HEARTBEAT, _PHASE, _SINCE, _STEP, _ACK, _ACK_NS, _STOPPED = range(9)
# The alarm on a rank's or the operator's line
_SEQ, _LEVEL, _CHECK, _REASON = range(12, 16)
# What a rank said at its last fences: turn, flags, loss, check
_TOLD = 31
_TOLD_WORDS = 4
_TOLD_TURNS = 4


class Phase(IntEnum):
    """What a rank is doing; the watchdog has a limit for each but HALTED and PAUSED."""

    START = 0
    COMPILE = 1
    STEP = 2
    BOUNDARY = 3
    SAVE = 4
    RESTORE = 5
    HALTED = 6
    ENDING = 7
    PAUSED = 8


class RankLine(NamedTuple):
    """One rank's line as it was at one moment; times in ns of the monotonic clock."""

    pid: int
    start_time: int
    heartbeat_ns: int
    phase: Phase
    since_ns: int
    step: int
    ack: int
    ack_ns: int
    stopped: bool


class Page:
    """One mapping of the page. ``line``: whose alarm `raise_level` writes: a rank's own, or the operator's.

    Local, lock-free; a call takes some microseconds.
    """

    def __init__(self, path: Path, memory: mmap.mmap, line: int) -> None:
        self.path = path
        self._memory = memory
        self._words = memoryview(memory).cast("Q")
        self._numbers = memoryview(memory).cast("d")
        self._at = line * LINE_WORDS
        self._line = line

    @classmethod
    def create(cls, path: Path, *, local_ranks: int) -> Self:
        """Make the page, for the first rank of a machine. Raises OSError."""
        size = (2 + local_ranks) * LINE_BYTES
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            os.posix_fallocate(fd, 0, size)
            page = cls(path, mmap.mmap(fd, size), 2)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        page._words[_RANKS], page._words[_VERSION], page._words[_IS_PAGE] = local_ranks, VERSION, _MAGIC
        return page

    @classmethod
    def attach(cls, path: Path, *, line: int) -> Self:
        """Map a page that is there. Raises OSError, ValueError when the file is no page or has no such line."""
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size < (line + 1) * LINE_BYTES:
                raise ValueError(f"{path}: {size} bytes; too short for line {line}")
            page = cls(path, mmap.mmap(fd, size), line)
        finally:
            os.close(fd)
        if page._words[_IS_PAGE] != _MAGIC or page._words[_VERSION] != VERSION:
            page.close()
            raise ValueError(f"{path}: not a page of this version")
        return page

    def close(self) -> None:
        """Unmap it; twice does no harm."""
        self._words.release()
        self._numbers.release()
        self._memory.close()

    # Ranks

    @property
    def ranks(self) -> int:
        """How many ranks there are on this machine."""
        return self._words[_RANKS]

    def sign_in(self, start_time: int) -> None:
        """This rank's process is there, in phase START."""
        self.enter(Phase.START, 0)
        self.beat()
        self._words[self._at + _START] = start_time
        self._words[self._at + _PID] = os.getpid()

    def enter(self, phase: Phase, step: int) -> None:
        """This rank begins a phase, or the phase's next step."""
        words, at = self._words, self._at
        # The time first: a reader in between sees the old phase as begun just now, which alarms nobody.
        words[at + _SINCE] = time.monotonic_ns()
        words[at + _STEP] = step
        words[at + _PHASE] = phase

    def beat(self) -> None:
        """This rank's process lives."""
        self._words[self._at + _HEARTBEAT] = time.monotonic_ns()

    def rank_line(self, local_rank: int) -> RankLine:
        """What a rank's line says now."""
        at = (2 + local_rank) * LINE_WORDS
        words = self._words
        return RankLine(
            words[at + _PID], words[at + _START], words[at + _HEARTBEAT], Phase(words[at + _PHASE]),
            words[at + _SINCE], words[at + _STEP], words[at + _ACK], words[at + _ACK_NS], bool(words[at + _STOPPED]),
        )  # fmt: skip

    # Fences

    def tell(self, turn: int, flags: int, loss: float) -> None:
        """This rank's word at a fence. Turns count up from 1; the last few stay readable."""
        words, at = self._words, _told_at(self._at, turn)
        words[at + 1] = flags
        self._numbers[at + 2] = loss
        # The check last, as it covers all: what is half written, or written in another order, is not there yet.
        words[at + 3] = turn ^ flags ^ words[at + 2]
        words[at] = turn

    def told(self, turn: int) -> list[tuple[int, float]] | None:
        """Every rank's flags and loss of that turn, by rank; None when one of them has not told it yet."""
        words, numbers, found = self._words, self._numbers, []
        for rank in range(words[_RANKS]):
            at = _told_at((2 + rank) * LINE_WORDS, turn)
            if words[at] != turn or words[at + 3] != turn ^ words[at + 1] ^ words[at + 2]:
                return None
            found.append((words[at + 1], numbers[at + 2]))
        return found

    # Alarms

    def raise_level(self, level: int, reason: str) -> None:
        """Raise this line's alarm; it only rises until it is cleared. Raises ValueError for no level."""
        if not 1 <= level <= MAX_LEVEL:
            raise ValueError(f"emergency level {level}: expected 1 to {MAX_LEVEL}")
        if level > self._alarm(self._line)[0]:
            self._set_alarm(self._line, level, reason)

    def level(self) -> int:
        """The highest level on the page, 0 for none."""
        return max(self._alarm(line)[0] for line in range(OPERATOR, 2 + self.ranks))

    def reason(self) -> str:
        """Why the highest level was raised; empty without one."""
        return max(self._alarm(line) for line in range(OPERATOR, 2 + self.ranks))[1]

    def clear(self, upto: int = MAX_LEVEL, *, everywhere: bool = False) -> None:
        """Take this line's alarm back unless it is higher than ``upto``, or the alarms on all lines.

        The first rank of the machine takes the operator's back as well.
        """
        lines = range(OPERATOR, 2 + self.ranks) if everywhere else (OPERATOR, 2) if self._line == 2 else (self._line,)
        for line in lines:
            level, _ = self._alarm(line)
            if 0 < level <= upto:
                self._set_alarm(line, 0, "")

    def token(self) -> int:
        """A number that grows with every alarm that is raised or cleared."""
        words = self._words
        return sum(words[line * LINE_WORDS + _SEQ] for line in range(OPERATOR, 2 + self.ranks))

    def ack(self, token: int, *, local_rank: int | None = None, stopped: bool = False) -> None:
        """This rank has seen the alarms up to ``token``; the watchdog says so for a rank that it has stopped."""
        at = self._at if local_rank is None else (2 + local_rank) * LINE_WORDS
        self._words[at + _ACK_NS] = time.monotonic_ns()
        self._words[at + _STOPPED] = stopped
        self._words[at + _ACK] = token

    def _alarm(self, line: int) -> tuple[int, str]:
        words, at = self._words, line * LINE_WORDS
        for _ in range(3):
            before = words[at + _SEQ]
            level = words[at + _LEVEL]
            if not level and not before & 1:
                return 0, ""
            start = 8 * (at + _REASON)
            raw = bytes(self._memory[start : start + REASON_BYTES])
            if before == words[at + _SEQ] and not before & 1 and words[at + _CHECK] == _checksum(before, level, raw):
                return min(level, MAX_LEVEL), raw.rstrip(b"\0").decode(errors="ignore")
        return 0, ""

    def _set_alarm(self, line: int, level: int, reason: str) -> None:
        words, at = self._words, line * LINE_WORDS
        seq = (words[at + _SEQ] | 1) + 1  # even, and higher than before also if a writer died in the middle
        words[at + _SEQ] = seq - 1
        raw = reason.encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0")
        start = 8 * (at + _REASON)
        self._memory[start : start + REASON_BYTES] = raw
        words[at + _LEVEL] = level
        words[at + _CHECK] = _checksum(seq, level, raw)
        words[at + _SEQ] = seq

    # The watchdog and the end

    @property
    def watchdog_pid(self) -> int:
        """The watchdog's process, 0 as long as there is none."""
        return self._words[_WATCHDOG_PID]

    @watchdog_pid.setter
    def watchdog_pid(self, pid: int) -> None:
        self._words[_WATCHDOG_PID] = pid

    @property
    def closing(self) -> bool:
        """Whether the run is ending and the watchdog with it."""
        return bool(self._words[_CLOSING])

    def set_closing(self) -> None:
        """The run is ending: nobody is to mind the watchdog's end."""
        self._words[_CLOSING] = 1

    def remove(self) -> None:
        """Delete the file; mappings stay usable."""
        with suppress(FileNotFoundError):
            self.path.unlink()


def _told_at(line_at: int, turn: int) -> int:
    return line_at + _TOLD + turn % _TOLD_TURNS * _TOLD_WORDS


def _checksum(seq: int, level: int, raw: bytes) -> int:
    return zlib.crc32(raw + seq.to_bytes(8, "little") + level.to_bytes(8, "little"))
