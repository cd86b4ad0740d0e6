"""Which checkpoints stay on the disk, and how the others go. Rank 0 only, local."""

from dataclasses import dataclass
from pathlib import Path

from tolaria.recovery import manifest as layout
from tolaria.recovery.fsops import FileOps


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay beside the newest ones, and which are no part of the run's course any more, by seq."""

    protected: frozenset[int] = frozenset()
    void: frozenset[int] = frozenset()


def sweep(root: Path, fs: FileOps) -> list[str]:
    """Delete unfinished attempts and unfinished deletions under ``root``; return their names.

    Local; only for the process that owns the run. Raises OSError.
    """
    if not fs.is_dir(root):
        return []
    names = [name for name in fs.list_dir(root) if layout.is_leftover(name)]
    for name in names:
        fs.remove_tree(root / name)
    return names


def retain(root: Path, fs: FileOps, *, keep: int, newest: int, retention: Retention) -> str | None:
    """Delete what need not stay. ``newest``: just committed, stays in any case. The error, None when all went well:
    a failure here cannot undo the commit and is reported beside it."""
    try:
        doomed = _doomed(fs.list_dir(root), keep, newest, retention)
        # Renamed first, so that a crash while deleting does not look like a damaged checkpoint.
        for name in doomed:
            fs.rename(root / name, root / (name + layout.TRASH_SUFFIX))
        if doomed:
            fs.fsync_dir(root)
        for name in doomed:
            fs.remove_tree(root / (name + layout.TRASH_SUFFIX))
    except OSError as error:
        return f"deleting old checkpoints: {error}"
    return None


def _doomed(names: list[str], keep: int, newest: int, retention: Retention) -> list[str]:
    found = {parsed[0]: name for name in names if (parsed := layout.parse_checkpoint_name(name))}
    pinned = {seq for seq, name in found.items() if name + layout.PIN_SUFFIX in names}
    sound = sorted(set(found) - retention.void)
    staying = {*sound[-keep:], *(retention.protected - retention.void), *pinned, newest}
    return [found[seq] for seq in sorted(set(found) - staying)]
