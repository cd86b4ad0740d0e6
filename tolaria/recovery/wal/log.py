"""The log as files. Rank 0 alone writes it; what `append` has returned for survives any crash.

    RUN/wal/<first lsn>.log    segments, reserved in advance and zero behind their last record; each begins with OPEN
    RUN/wal/RESERVE            room that is given up when the disk is full, so that the run can end in order
    RUN/wal/SEAL               the last durable lsn, written after each append without waiting for the disk

A crash leaves at most one torn record at the very end, which nobody was told of; it is wiped out at the next start.
Damage anywhere else, a file of another run, and an end before the one that the seal names refuse the start: a log that
has lost records would let decisions happen twice.
"""

import errno
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tolaria.errors import WalError
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal.reading import SEAL, read_log, seal_bytes
from tolaria.recovery.wal.records import WalKind, WalRecord, encode, encode_body, link

RESERVE_BYTES = 16 * 1024 * 1024
GROWTH_BYTES = 64 * 1024
ROTATE_BYTES = 1024 * 1024
# A run that never commits a checkpoint must not outgrow what a start accepts to read.
LARGE_BYTES = 16 * ROTATE_BYTES
RESERVE = "RESERVE"


class Wal:
    """An open log. ``low_space``: it lives on its reserve, the run should save and stop."""

    def __init__(
        self, root: Path, *, run_id: str, generation: str, facts: Mapping[str, Any], fs: FileOps,
        check_owner: Callable[[], None], start: int, lsn: int, prev: bytes,
    ) -> None:  # fmt: skip
        self.root = root
        self.low_space = False
        self._open_body = {"run_id": run_id, "generation": generation, "facts": dict(facts)}
        self._fs = fs
        self._check_owner = check_owner
        self._start = start
        self._lsn = lsn
        self._prev = prev
        self._lock = threading.Lock()
        self._fd = self._seal_fd = -1
        self._end = self._reserved = 0
        self._failed = ""

    @classmethod
    def open(
        cls, root: Path, *, run_id: str, generation: str, facts: Mapping[str, Any], fs: FileOps,
        check_owner: Callable[[], None],
    ) -> tuple[Self, list[WalRecord]]:  # fmt: skip
        """Take up a run's log, or begin it; the records of all earlier starts. Durable on return.

        Raises WalError for a log that cannot be trusted or written, and changes nothing then but a torn end; RunLocked
        when another start owns the run.
        """
        check_owner()
        try:
            fs.mkdir(root)
            records, prev = _recover(root, fs)
        except OSError as error:
            raise WalError(f"{root}: the log cannot be read ({error.strerror or error})") from error
        except WalError as error:
            raise WalError(f"{root}: {error}") from error
        for record in records:
            if record.kind == WalKind.OPEN and record.document.get("run_id") != run_id:
                raise WalError(f"{root}: the log is of run {record.document.get('run_id')!r}, not of {run_id!r}")
        last = records[-1] if records else WalRecord(0, 0, WalKind.OPEN, b"")
        wal = cls(
            root, run_id=run_id, generation=generation, facts=facts, fs=fs, check_owner=check_owner,
            start=last.start + 1, lsn=last.lsn, prev=prev,
        )  # fmt: skip
        try:
            wal._begin()
        except OSError as error:
            wal.close()
            raise WalError(f"{root}: the log cannot be written ({error.strerror or error})") from error
        return wal, records

    @property
    def last_lsn(self) -> int:
        """Number of the last durable record."""
        return self._lsn

    def append(self, kind: WalKind, body: bytes | Mapping[str, Any]) -> int:
        """Write one record; its lsn. Durable on return; blocks for the disk. Any thread of rank 0.

        Raises WalError when it could not be made durable; the log then takes no further record, since nobody can tell
        what the disk holds. RunLocked, with nothing written, when another start has taken the run over.
        """
        raw = encode_body(body)
        with self._lock:
            self._check_owner()
            if self._failed:
                raise WalError(self._failed)
            try:
                try:
                    if self._end > LARGE_BYTES and self._has_room():
                        self._new_segment()
                    self._write(kind, raw)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self.low_space:
                        raise
                    self._use_reserve()
                    self._write(kind, raw)
            except OSError as error:
                reason = error.strerror or str(error)
                self._failed = f"{self.root}: the log cannot be written ({reason}); nothing more may take effect"
                raise WalError(self._failed) from error
            return self._lsn

    def rotate(self) -> None:
        """Begin a new segment if this one has grown large. As `append` otherwise."""
        with self._lock:
            if self._end < ROTATE_BYTES or self._failed:
                return
            self._check_owner()
            try:
                if self._has_room():
                    self._new_segment()
            except OSError as error:
                self._failed = f"{self.root}: no new segment of the log ({error.strerror or error})"
                raise WalError(self._failed) from error

    def close(self) -> None:
        """Close the files and give the reserve back; twice does no harm."""
        with self._lock:
            if self._fd >= 0 and not self.low_space:
                with suppress(OSError):
                    self._fs.unlink(self.root / RESERVE)
            for fd in (self._fd, self._seal_fd):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._seal_fd = -1
            self._failed = self._failed or f"{self.root}: the log is closed"

    # Writing

    def _has_room(self) -> bool:
        return self._fs.free_bytes(self.root) > 4 * RESERVE_BYTES

    def _begin(self) -> None:
        reserve = self.root / RESERVE
        if not os.path.lexists(reserve) and self._has_room():
            self._fs.reserve_file(reserve, RESERVE_BYTES)
        self._fs.replace_file(self.root / SEAL, seal_bytes(self._lsn))
        self._seal_fd = self._fs.open_existing(self.root / SEAL)
        self._new_segment()

    def _new_segment(self) -> None:
        path = self.root / f"{self._lsn + 1:020d}.log"
        fd = self._fs.create(path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._end, self._reserved = fd, 0, 0
        # Before the first record: the seal may not name one whose file a power cut can still take away.
        self._fs.fsync_dir(self.root)
        self._write(WalKind.OPEN, encode_body(self._open_body))

    def _write(self, kind: WalKind, body: bytes) -> None:
        raw = encode(WalRecord(self._lsn + 1, self._start, kind, body), self._prev)
        needed = self._end + len(raw)
        if needed > self._reserved:
            room = -(-needed // GROWTH_BYTES) * GROWTH_BYTES
            self._fs.reserve(self._fd, room)
            self._fs.fsync(self._fd)
            self._reserved = room
        self._fs.write_all_at(self._fd, raw, self._end)
        self._fs.datasync(self._fd)
        self._end, self._lsn, self._prev = needed, self._lsn + 1, link(raw)
        self._fs.write_all_at(self._seal_fd, seal_bytes(self._lsn), 0)

    def _use_reserve(self) -> None:
        self.low_space = True
        self._fs.truncate(self._fd, self._end)
        self._fs.fsync(self._fd)
        reserve = self.root / RESERVE
        if os.path.lexists(reserve):
            self._fs.unlink(reserve)
            self._fs.fsync_dir(self.root)
        self._new_segment()


def _recover(root: Path, fs: FileOps) -> tuple[list[WalRecord], bytes]:
    """All records, and the link to the last. Wipes out a torn end and an unfinished last segment."""
    found = read_log(root, fs)
    last = found.segments[-1] if found.segments else None
    if last is not None and not last.scanned.records:
        fs.unlink(root / last.name)
        fs.fsync_dir(root)
    elif last is not None and not last.scanned.clean:
        fs.wipe(root / last.name, last.scanned.end, last.scanned.size - last.scanned.end)
    return found.records, found.link
