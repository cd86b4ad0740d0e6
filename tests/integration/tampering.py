"""Changes to a run's log as somebody would make them who may write its directory, from careless to careful."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import WalKind, WalRecord, read_log
from tolaria.recovery.wal.reading import SEAL, seal_bytes
from tolaria.recovery.wal.records import FIRST_PREV, encode, link


def records_of(run: Path) -> list[WalRecord]:
    return read_log(run / "wal", FileOps()).records


def place_of(run: Path, kind: WalKind) -> tuple[Path, int, int]:
    """(file, first byte, bytes) of the first record of a kind."""
    for path in sorted((run / "wal").glob("*.log")):
        raw, at = path.read_bytes(), 0
        while at < len(raw) and (size := struct.unpack_from("<I", raw, at)[0]):
            if raw[at + 8 + 12] == kind:
                return path, at, 8 + size
            at += 8 + size
    raise AssertionError(f"no {kind.name}")


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def rewrite(run: Path, change: Callable[[list[WalRecord]], list[WalRecord]], *, renumber: bool = True) -> None:
    """The whole log anew, with every sum and link as it should be, in one file.

    ``renumber``: the records count from 1 again; without, they keep the numbers they had.
    """
    records = change(records_of(run))
    prev, raw = FIRST_PREV, b""
    for number, record in enumerate(records, start=1):
        lsn = number if renumber else record.lsn
        one = encode(WalRecord(lsn, record.start, record.kind, record.body), prev)
        prev = link(one)
        raw += one
    for path in (run / "wal").glob("*.log"):
        path.unlink()
    (run / "wal" / f"{1:020d}.log").write_bytes(raw)
    (run / "wal" / SEAL).write_bytes(seal_bytes(len(records)))


def change_act(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the first act's record and make the log whole again around it."""

    def changed(records: list[WalRecord]) -> list[WalRecord]:
        at = next(i for i, record in enumerate(records) if record.kind == WalKind.ACT)
        body = records[at].document
        change(body)
        new = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        return [*records[:at], WalRecord(records[at].lsn, records[at].start, WalKind.ACT, new), *records[at + 1 :]]

    rewrite(run, changed)
