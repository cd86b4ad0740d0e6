"""The write-ahead log of a run: decisions, returns and commits, durable before they take effect.

`records`: what a record is on disk, pure. `reading`: the log
read and checked as a whole. `log`: the log as files, written by rank 0 alone.
"""

from tolaria.recovery.wal.log import Wal
from tolaria.recovery.wal.reading import ReadLog, read_log
from tolaria.recovery.wal.records import WalKind, WalRecord

__all__ = ["ReadLog", "Wal", "WalKind", "WalRecord", "read_log"]
