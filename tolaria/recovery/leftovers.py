"""Snapshots that earlier starts of a run left in memory: found, verified, read, and cleared away.

A file is believed only if it is a plain file of this user that nobody else can write, its header is whole and valid,
and every hash in it is right.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tolaria.compare import tensor_hashes
from tolaria.errors import CheckpointError
from tolaria.recovery.arena import PAGE_BYTES, Header, json_sha256, parse_header, parse_table, view
from tolaria.recovery.snapshots import Snapshot, SnapshotInfo, snapshot_of

_PAGE = re.compile(r"tolaria-([A-Za-z0-9_.+-]{1,16})-([0-9A-Za-z]+)-page", re.ASCII)
_NAME = re.compile(r"tolaria-([A-Za-z0-9_.+-]{1,16})-([0-9A-Za-z]+)-r([0-9]+)-([0-9])", re.ASCII)


@dataclass(frozen=True)
class Found:
    """A file with a valid header."""

    info: SnapshotInfo
    path: Path


def find(run_id: str, rank: int, directory: Path) -> list[Found]:
    """The snapshots of a rank that earlier starts of this run left. Local; reads the headers only."""
    found = []
    for path, generation, owner_rank in _files(run_id, directory):
        header = _header(path) if owner_rank == rank else None
        if header is not None and header.valid and header.about.get("run") == run_id:
            info = SnapshotInfo(
                seq=header.seq,
                step=header.step,
                branch=header.branch,
                generation=generation,
                digest=header.digest,
                acts=int(header.about.get("acts", 0)),
            )
            found.append(Found(info, path))
    return found


def read(found: Found) -> Snapshot:
    """A copy of a snapshot, every hash verified. Raises CheckpointError when one is wrong, OSError."""
    with open(_open(found.path), "rb") as file:
        header = parse_header(file.read(PAGE_BYTES))
        if header is None or not header.valid or header.digest != found.info.digest:
            raise CheckpointError(f"{found.path}: not a valid snapshot any more")
        if os.fstat(file.fileno()).st_size < header.size:
            raise CheckpointError(f"{found.path}: shorter than its header says")
        content = bytearray(header.tensor_bytes)
        whole = file.readinto(content)
        document = file.read(header.json_bytes)
    if whole != header.tensor_bytes or json_sha256(document) != header.json_sha256:
        raise CheckpointError(f"{found.path}: its metadata is damaged")
    parsed = json.loads(document)
    places, hashes = parse_table(parsed["tensors"], header.tensor_bytes)
    tensors = {name: view(content, 0, place) for name, place in places.items()}
    for name, value in tensor_hashes(tensors).items():
        if value != hashes[name]:
            raise CheckpointError(f"{found.path}: tensor {name!r} is damaged")
    return snapshot_of(found.info, tensors, parsed)


def sweep(run_id: str, keep_generation: str | None, directory: Path) -> list[str]:
    """Delete what starts of this run left, but for one generation's, and what dead runs without a directory left:
    snapshots, and the pages of this run.

    Returns the names. Local; what another user owns stays.
    """
    deleted = []
    for path in _pages(run_id, keep_generation, directory):
        path.unlink(missing_ok=True)
        deleted.append(path.name)
    for path, generation, _ in _files(None, directory):
        ours = path.name.startswith(f"tolaria-{run_id[:16]}-")
        if (ours and generation != keep_generation) or (not ours and _is_orphan(path)):
            path.unlink(missing_ok=True)
            deleted.append(path.name)
    return deleted


def _is_orphan(path: Path) -> bool:
    """Whether a file belongs to a run whose directory is gone and whose process is dead."""
    header = _header(path)
    if header is None:
        return False
    pid, run_dir = header.about.get("pid"), header.about.get("dir")
    return (
        isinstance(pid, int) and isinstance(run_dir, str) and not psutil.pid_exists(pid) and not Path(run_dir).exists()
    )


def _pages(run_id: str, keep_generation: str | None, directory: Path) -> list[Path]:
    try:
        matches = [_PAGE.fullmatch(name) for name in sorted(os.listdir(directory))]
    except OSError:
        return []
    found = [directory / m[0] for m in matches if m and m[1] == run_id[:16] and m[2] != keep_generation]
    return [path for path in found if (status := _status(path)) is not None and status.st_uid == os.geteuid()]


def _status(path: Path) -> os.stat_result | None:
    """None when another rank has deleted it in the meantime."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _files(run_id: str | None, directory: Path) -> Iterator[tuple[Path, str, int]]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or (run_id is not None and match[1] != run_id[:16]):
            continue
        status = _status(directory / name)
        if status is None:
            continue
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
            yield directory / name, match[2], int(match[3])


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _header(path: Path) -> Header | None:
    try:
        with open(_open(path), "rb") as file:
            return parse_header(file.read(PAGE_BYTES))
    except OSError:
        return None
