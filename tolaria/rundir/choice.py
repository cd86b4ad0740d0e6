"""Which directory a start uses and what it resumes from: reads only, changes nothing."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tolaria.config import RunConfig
from tolaria.errors import RunDirError
from tolaria.rundir.ownership import DirectoryOps, read_fence

CHECKPOINTS_NAME = "ckpt"
_MANIFEST_NAME = "MANIFEST.json"
_TIME_FORMAT = "%Y%m%dT%H%M%SZ"
_TIME = r"[0-9]{8}T[0-9]{6}Z"
# Committed checkpoints, and those found damaged later; not unfinished attempts.
_CHECKPOINT = re.compile(r"c[0-9]+-s[0-9]+(\.bad.*)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """What to load: one checkpoint folder, or the newest good one in a folder of checkpoints."""

    path: Path
    is_checkpoint: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The directory of this start. restarted: the same torchrun agent has started this run before."""

    path: Path
    resume: Resume | None
    restarted: bool


def default_path(root: Path, name: str, now: datetime) -> Path:
    """``<root>/<UTC time>-<name>``."""
    return root / f"{now.astimezone(UTC).strftime(_TIME_FORMAT)}-{name}"


def has_checkpoints(path: Path, fs: DirectoryOps) -> bool:
    """True if a checkpoint was ever committed in this run directory and is still there, even a damaged one."""
    folder = path / CHECKPOINTS_NAME
    return fs.is_dir(folder) and any(_CHECKPOINT.fullmatch(name) for name in fs.list_dir(folder))


def find_newest(root: Path, name: str, fs: DirectoryOps) -> Path | None:
    """The newest run of this name under ``root`` that holds a checkpoint."""
    pattern = re.compile(_TIME + "-" + re.escape(name), re.ASCII)
    return next((p for p in _folders(root, fs) if pattern.fullmatch(p.name) and has_checkpoints(p, fs)), None)


def find_restart(folders: Sequence[Path], agent: str, fs: DirectoryOps) -> Path | None:
    """The first of these run directories that this torchrun agent started last; directories that cannot be read
    are passed over."""
    for path in folders:
        try:
            fence = read_fence(path, fs)
        except RunDirError:
            continue
        if fence is not None and fence.agent == agent:
            return path
    return None


def choose(run: RunConfig, *, agent: str | None, now: datetime, fs: DirectoryOps) -> Choice:
    """Which directory this start uses and what it resumes from. Reads only. Raises RunDirError."""
    root = Path(run.root).resolve()
    given = Path(run.dir).resolve() if run.dir else None
    candidates = [given] if given is not None else _folders(root, fs)
    again = find_restart(candidates, agent, fs) if agent is not None else None
    if again is not None and has_checkpoints(again, fs):
        own = Resume(path=again / CHECKPOINTS_NAME, is_checkpoint=False)
        return Choice(path=again, resume=own, restarted=True)
    first = _choose_first(run, root, given, now, fs)
    if again is None:
        return first
    # Started again before its first checkpoint: the same start once more, in the same place.
    return Choice(path=again, resume=None if run.resume == "auto" else first.resume, restarted=True)


def _choose_first(run: RunConfig, root: Path, given: Path | None, now: datetime, fs: DirectoryOps) -> Choice:
    """The choice of a start that is no restart."""
    fresh = given if given is not None else _free_path(root, run.name, now)
    if run.resume == "no":
        return Choice(path=fresh, resume=None, restarted=False)
    if run.resume == "auto":
        found = given if given is not None else find_newest(root, run.name, fs)
        if found is None or not has_checkpoints(found, fs):
            return Choice(path=fresh, resume=None, restarted=False)
        return Choice(path=found, resume=Resume(path=found / CHECKPOINTS_NAME, is_checkpoint=False), restarted=False)
    target = Path(run.resume).resolve()
    if fs.is_dir(target) and _MANIFEST_NAME in fs.list_dir(target):
        # A new directory: saving beside newer checkpoints would make "the newest" one of the abandoned line.
        return Choice(path=fresh, resume=Resume(path=target, is_checkpoint=True), restarted=False)
    if has_checkpoints(target, fs):
        own = Resume(path=target / CHECKPOINTS_NAME, is_checkpoint=False)
        return Choice(path=given if given is not None else target, resume=own, restarted=False)
    raise RunDirError(f"run.resume={run.resume!r}: expected no, auto, or the path of a run or a checkpoint")


def _free_path(root: Path, name: str, now: datetime) -> Path:
    path = default_path(root, name, now)
    while os.path.lexists(path):
        now += timedelta(seconds=1)
        path = default_path(root, name, now)
    return path


def _folders(root: Path, fs: DirectoryOps) -> list[Path]:
    """The run directories with a default name under ``root``, newest first."""
    names = fs.list_dir(root) if fs.is_dir(root) else []
    return [
        root / name for name in sorted(names, reverse=True) if re.match(_TIME + "-", name) and fs.is_dir(root / name)
    ]
