"""The log read for an inquiry: all that is sound, and every fault by name, where a start would stop at the first.

Nothing is changed. What is found here proves nothing about who wrote it: the links between records have no key.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tolaria.errors import WalError
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal.reading import MAX_SEGMENT_BYTES, sealed_lsn, segment_names
from tolaria.recovery.wal.records import FIRST_PREV, WalKind, WalRecord, link, next_record, record_at


@dataclass
class Survey:
    """All sound records in the order of the files, and what is wrong. ``torn``: the end was not finished, as a crash or
    a run at work leaves it. ``segments``: files."""

    records: list[WalRecord] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    torn: bool = False
    segments: int = 0
    size: int = 0


def survey(root: Path, fs: FileOps) -> Survey:
    """Read all of a log. Raises OSError for what cannot be read."""
    found = Survey()
    # Before the records: a living run may add some meanwhile.
    sealed = sealed_lsn(root, fs)
    names = segment_names(root, fs)
    prev: bytes | None = FIRST_PREV
    for position, name in enumerate(names):
        prev = _segment(found, root / name, fs, prev, last=position == len(names) - 1)
    found.segments = len(names)
    last = found.records[-1].lsn if found.records else 0
    if sealed > last:
        found.faults.append(f"the log ends at record {last}, but record {sealed} was durable: its end is missing")
    return found


def _segment(found: Survey, path: Path, fs: FileOps, prev: bytes | None, *, last: bool) -> bytes | None:
    """Take in one file. ``prev``: what its first record must say of the one before, None behind a gap."""
    raw = fs.read_file(path, MAX_SEGMENT_BYTES)
    at = 0
    while True:
        try:
            record = record_at(raw, at)
            if record is None:
                later = next_record(raw, at) if any(raw[at:]) else None
        except WalError as error:
            found.faults.append(f"{path.name}: {error}")
            return None
        if record is not None:
            _chain(found, path.name, record, prev)
            found.records.append(record[0])
            prev = link(record[2])
            at += len(record[2])
            continue
        if later is not None:
            found.faults.append(f"{path.name}: bytes {at} to {later} are damaged, and sound records follow")
            at, prev = later, None
            continue
        if any(raw[at:]):
            if last:
                found.torn = True
            else:
                found.faults.append(f"{path.name}: damaged at byte {at}")
                prev = None
        found.size += at
        return prev


def _chain(found: Survey, name: str, record: tuple[WalRecord, bytes, bytes], prev: bytes | None) -> None:
    """Whether a record follows from the one before it, which is `Survey.records`' last."""
    this = record[0]
    before = found.records[-1].lsn if found.records else 0
    first = not found.records or found.records[-1].start != this.start
    if this.lsn != before + 1:
        lost = (
            f"records {before + 1} to {this.lsn - 1} are lost" if this.lsn > before + 1 else "it stands twice or late"
        )
        found.faults.append(f"{name}: record {this.lsn} stands where {before + 1} should: {lost}")
    elif prev is not None and record[1] != prev:
        found.faults.append(
            f"{name}: record {this.lsn} ({this.kind.name}) does not follow from record {before}: one of them was "
            "altered or put in"
        )
    if first and this.kind != WalKind.OPEN:
        found.faults.append(f"{name}: start {this.start} does not begin with the record of its start")
