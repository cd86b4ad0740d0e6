"""Records of the log as bytes. Pure.

    len u32 | crc32 u32 | lsn u64 | start u32 | kind u8 | prev 16 B | body        all little-endian

``len`` counts what comes after the checksum, which covers ``len`` too. ``prev`` is the beginning of the sha256 of the
record before, so that a record from elsewhere, a lost one and a repeated one show. A segment's first record is OPEN.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tolaria.errors import WalError

_HEAD = struct.Struct("<II")
_REST = struct.Struct("<QIB16s")
HEAD_BYTES = _HEAD.size + _REST.size
MAX_BODY_BYTES = 256 * 1024
FIRST_PREV = bytes(16)


class WalKind(IntEnum):
    """What a record says. Numbers are on disk: never used again for something else."""

    OPEN = 1
    DECISION = 2
    APPLIED = 3
    ABORTED = 4
    CHECKPOINT = 5
    VOID = 6
    GOOD = 7
    MODE = 8
    CLOSE = 9
    START = 10
    SIGNAL = 11
    HALT = 12
    ACT = 13
    ACTED = 14


@dataclass(frozen=True)
class WalRecord:
    """One record. ``lsn`` counts from 1 over the life of the run; ``start`` counts the starts, from 1."""

    lsn: int
    start: int
    kind: WalKind
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        """The body as JSON. Raises WalError when it is not a JSON object."""
        try:
            found = json.loads(self.body)
        except ValueError as error:
            raise WalError(f"the log's record {self.lsn} ({self.kind.name}) is not JSON") from error
        if not isinstance(found, dict):
            raise WalError(f"the log's record {self.lsn} ({self.kind.name}) is not a JSON object")
        return found


def encode_body(body: bytes | Mapping[str, Any]) -> bytes:
    """Bytes as they are, anything else as canonical JSON. Raises WalError when it is too long."""
    raw = body if isinstance(body, bytes) else json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    if len(raw) > MAX_BODY_BYTES:
        raise WalError(f"a record of {len(raw)} bytes; the log takes at most {MAX_BODY_BYTES}")
    return raw


def encode(record: WalRecord, prev: bytes) -> bytes:
    """A record as it is stored behind the one whose `link` is ``prev``."""
    rest = _REST.pack(record.lsn, record.start, record.kind, prev) + record.body
    length = struct.pack("<I", len(rest))
    return length + struct.pack("<I", zlib.crc32(length + rest)) + rest


def link(raw: bytes) -> bytes:
    """What the next record says of this one."""
    return hashlib.sha256(raw).digest()[:16]


@dataclass(frozen=True)
class Scanned:
    """What a segment holds: (record, its ``prev``, its bytes) of each, and where the last sound one ends.

    ``clean``: behind that are only zeros, or nothing. ``size``: of the file.
    """

    records: tuple[tuple[WalRecord, bytes, bytes], ...]
    end: int
    clean: bool
    size: int


def scan(raw: bytes) -> Scanned:
    """Take a segment apart up to the first byte that is no record.

    Raises WalError when a sound record lies behind bytes that are none: then something in the middle is damaged, which
    no crash does.
    """
    found, at = [], 0
    while (record := record_at(raw, at)) is not None:
        found.append(record)
        at += len(record[2])
    if any(raw[at:]) and (later := next_record(raw, at)) is not None:
        raise WalError(f"bytes {at} to {later} are damaged, and sound records follow")
    return Scanned(tuple(found), at, not any(raw[at:]), len(raw))


def next_record(raw: bytes, start: int) -> int | None:
    """Where the next sound record behind ``start`` begins."""
    for at in range(start + 1, len(raw) - HEAD_BYTES + 1):
        if record_at(raw, at) is not None:
            return at
    return None


def record_at(raw: bytes, at: int) -> tuple[WalRecord, bytes, bytes] | None:
    """(record, its prev, its bytes) if a sound record begins here."""
    if at + HEAD_BYTES > len(raw):
        return None
    length, checksum = _HEAD.unpack_from(raw, at)
    end = at + _HEAD.size + length
    if not _REST.size <= length <= _REST.size + MAX_BODY_BYTES or end > len(raw):
        return None
    if zlib.crc32(raw[at : at + 4] + raw[at + _HEAD.size : end]) != checksum:
        return None
    lsn, start, kind, prev = _REST.unpack_from(raw, at + _HEAD.size)
    if kind not in WalKind.__members__.values():
        raise WalError(f"record {lsn} is of kind {kind}, which this version does not know")
    body = raw[at + HEAD_BYTES : end]
    return WalRecord(lsn, start, WalKind(kind), body), prev, raw[at:end]


def chained(parts: Iterable[tuple[WalRecord, bytes, bytes]]) -> Iterator[tuple[WalRecord, bytes]]:
    """Records with their own links, checked to follow each other. Raises WalError where the chain is broken."""
    lsn, prev = 0, FIRST_PREV
    for record, says, raw in parts:
        if record.lsn != lsn + 1:
            raise WalError(f"record {record.lsn} stands where {lsn + 1} should")
        if says != prev:
            raise WalError(f"record {record.lsn} does not follow from record {lsn}: the log was put together wrongly")
        lsn, prev = record.lsn, link(raw)
        yield record, prev
