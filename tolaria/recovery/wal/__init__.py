"""The write-ahead log of a run: decisions, returns and commits, durable before they take effect.

`records`: what a record is on disk, pure. `log`: the log as files, written by rank 0 alone.
"""

from tolaria.recovery.wal.log import Wal
from tolaria.recovery.wal.records import WalKind, WalRecord

__all__ = ["Wal", "WalKind", "WalRecord"]
