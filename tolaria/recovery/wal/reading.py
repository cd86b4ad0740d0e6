"""The log as files, read and checked as a whole; nothing is changed, so it may be the log of a run that lives."""

import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tolaria.errors import WalError
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal.records import FIRST_PREV, Scanned, WalKind, WalRecord, chained, scan

SEAL = "SEAL"
MAX_SEGMENT_BYTES = 64 * 1024 * 1024
_SEGMENT = re.compile(r"([0-9]{20})\.log", re.ASCII)
_SEAL = struct.Struct("<4sQI")
_MAGIC = b"TSEA"


class Segment(NamedTuple):
    """One file of the log."""

    name: str
    scanned: Scanned


@dataclass(frozen=True)
class ReadLog:
    """All records, oldest first; ``link``: what a next record would say of the last."""

    records: list[WalRecord]
    link: bytes
    segments: list[Segment]

    @property
    def torn(self) -> bool:
        """Whether bytes of a record that was never finished stand at the end, as a crash leaves them, or a run that is
        writing just now."""
        return bool(self.segments) and not self.segments[-1].scanned.clean


def read_log(root: Path, fs: FileOps) -> ReadLog:
    """The log of a run: every record sound, each following from the one before, none missing at the end.

    Raises WalError that names file, byte or record, OSError.
    """
    # Before the records: a living run may add some meanwhile.
    sealed = sealed_lsn(root, fs)
    names = segment_names(root, fs)
    segments = [Segment(name, _scanned(root / name, fs)) for name in names]
    for segment in segments[:-1]:
        if not segment.scanned.clean or not segment.scanned.records:
            raise WalError(f"{segment.name}: damaged at byte {segment.scanned.end}")
    records, prev = [], FIRST_PREV
    for record, link_to_it in chained(part for segment in segments for part in segment.scanned.records):
        records.append(record)
        prev = link_to_it
    if sealed > len(records):
        raise WalError(
            f"the log ends at record {len(records)}, but record {sealed} was durable: its end is damaged or missing"
        )
    return ReadLog(records, prev, segments)


def seal_bytes(lsn: int) -> bytes:
    """What the seal says when this record is durable."""
    head = _SEAL.pack(_MAGIC, lsn, 0)[:12]
    return head + struct.pack("<I", zlib.crc32(head))


def segment_names(root: Path, fs: FileOps) -> list[str]:
    """The files of the log in their order."""
    return [name for name in fs.list_dir(root) if _SEGMENT.fullmatch(name)]


def sealed_lsn(root: Path, fs: FileOps) -> int:
    """The lsn that the seal names; 0 when there is none or a crash tore it."""
    if not os.path.lexists(root / SEAL):
        return 0
    raw = fs.read_file(root / SEAL, 4096)
    if len(raw) != _SEAL.size:
        return 0
    magic, lsn, checksum = _SEAL.unpack(raw)
    return int(lsn) if magic == _MAGIC and checksum == zlib.crc32(raw[:12]) else 0


def _scanned(path: Path, fs: FileOps) -> Scanned:
    try:
        scanned = scan(fs.read_file(path, MAX_SEGMENT_BYTES))
    except WalError as error:
        raise WalError(f"{path.name}: {error}") from error
    if scanned.records:
        first = scanned.records[0][0]
        if first.kind != WalKind.OPEN or first.lsn != int(path.stem):
            raise WalError(f"{path.name}: does not begin with the record of its start")
    return scanned
