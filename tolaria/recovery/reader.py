"""Reads checkpoints: nothing is believed before its sha256 was verified, nothing is used unless all ranks agree.

Tensors come back as fresh CPU tensors; a load never touches a live model. Everything is read as data: no pickle,
no importable names, no path from a file's content, no symbolic links.
"""

import errno
import hashlib
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from tolaria.dist import Peers
from tolaria.errors import CheckpointError
from tolaria.recovery import manifest as layout
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.shards import LOCAL, REPLICATED, parse_shard, parse_state

# These say that the checkpoint itself is broken; any other error may pass, and must not condemn a sound one.
_DAMAGE = frozenset({
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.EIO, errno.ENXIO,
})  # fmt: skip
_GOOD, _REFUSED, _DAMAGED, _UNREADABLE, _LOG_LOST = range(5)
_SHA = struct.Struct("!4q")
Content = TypeVar("Content", bytes, memoryview)

Accept: TypeAlias = Callable[[int, int, int | None], bool]
"""Whether (seq, step, branch) may be used; the branch is None as long as the checkpoint is not read."""


def accept_all(seq: int, step: int, branch: int | None) -> bool:
    """Any checkpoint will do."""
    return True


class _Unreadable(Exception):
    pass


class _LogLost(Exception):
    pass


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A verified checkpoint. Tensors are fresh CPU tensors that belong to the caller.

    world_size: of the run that saved it. local_tensors, local_meta: what this rank saved as its own, None when
    that run had another number of ranks; first_meta: what its rank 0 saved, in any case. state_digest: of step,
    replicated tensors and metadata, as saved. branch: see recovery/timeline.py. wal_lsn: the log's last record then.
    """

    seq: int
    step: int
    path: Path
    world_size: int
    run_id: str
    generation: str
    state_digest: str
    branch: int
    wal_lsn: int
    manifest_sha256: str
    versions: dict[str, str]
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    local_tensors: dict[str, Tensor] | None
    local_meta: dict[str, Any] | None
    first_meta: dict[str, Any]


def load_path(path: Path, peers: Peers, fs: FileOps) -> Loaded:
    """Load one checkpoint folder. Collective; changes nothing on disk.

    Raises CheckpointError on all ranks when any rank cannot verify it.
    """
    loaded, verdict, reason = _load_together(path, None, _Wanted(), peers, fs)
    if loaded is None:
        raise CheckpointError(f"{path}: {_VERDICTS[verdict]}: {reason}")
    return loaded


@dataclass(frozen=True)
class _Wanted:
    accept: Accept = accept_all
    known: Mapping[int, str] = field(default_factory=dict)
    last_lsn: int | None = None

    def check(self, loaded: Loaded) -> int:
        """The verdict on a sound checkpoint."""
        if self.last_lsn is not None and loaded.wal_lsn > self.last_lsn:
            raise _LogLost(f"it was saved after record {loaded.wal_lsn} of the log, which ends at {self.last_lsn}")
        if self.known.get(loaded.seq, loaded.manifest_sha256) != loaded.manifest_sha256:
            raise CheckpointError(f"{loaded.path}: its manifest is not the one in the log")
        return _GOOD if self.accept(loaded.seq, loaded.step, loaded.branch) else _REFUSED


def load_newest(
    root: Path, peers: Peers, fs: FileOps, *, report: Callable[[str, dict[str, Any]], None], quarantine: bool = True,
    accept: Accept = accept_all, known: Mapping[int, str] | None = None, last_lsn: int | None = None,
    allow_fresh: bool = False,
) -> Loaded | None:  # fmt: skip
    """The newest committed checkpoint under ``root`` whose every hash verifies on all ranks; None if there is none.

    accept, known, last_lsn count on rank 0 alone: which checkpoints may be used, the sha256 of their manifests, and
    the last record of the log. allow_fresh: None also when all are damaged.

    Collective; "newest" is by sequence number (steps repeat after a rollback). A damaged one is renamed to
    ``.bad`` by rank 0 (unless ``quarantine`` is False: for the folder of another run), reported on every rank as
    ``report("checkpoint_bad", {"path", "reason", "renamed_to"})``, and the next older one is tried. Raises
    CheckpointError when there are checkpoints but all of them are bad (starting afresh would hide the loss), or
    when one cannot be read for a reason that may pass, such as missing permission.
    """
    names, num_bad = _candidates(root, fs, accept) if peers.rank == 0 else ([], 0)
    wanted = _Wanted(accept, known or {}, last_lsn) if peers.rank == 0 else _Wanted()
    while True:
        following = layout.parse_checkpoint_name(names[0]) if names else None
        found, seq, step, num_bad = peers.gather([int(following is not None), *(following or (0, 0)), num_bad])[0]
        if not found:
            break
        path = root / layout.checkpoint_name(seq, step)
        loaded, verdict, reason = _load_together(path, (seq, step), wanted, peers, fs)
        if loaded is not None:
            return loaded
        if verdict == _REFUSED:
            names = names[1:]
            continue
        if verdict != _DAMAGED:
            raise CheckpointError(f"{path}: {_VERDICTS[verdict]}: {reason}")
        renamed_to = _quarantine(path, fs) if quarantine and peers.rank == 0 else None
        report("checkpoint_bad", {"path": str(path), "reason": reason, "renamed_to": renamed_to})
        names, num_bad = names[1:], num_bad + 1
    if num_bad and not allow_fresh:
        raise CheckpointError(
            f"{root}: all {num_bad} checkpoints are damaged; nothing to resume from. To begin anew all the same: "
            "--run.allow_fresh true"
        )
    return None


_VERDICTS = {
    _DAMAGED: "not a usable checkpoint",
    _UNREADABLE: "cannot be read now; mend the cause and start again",
    _LOG_LOST: "the log of decisions has lost its end",
}


def _candidates(root: Path, fs: FileOps, accept: Accept) -> tuple[list[str], int]:
    """Names of committed checkpoints that may be used, newest first, and the number of quarantined ones."""
    names = fs.list_dir(root) if fs.is_dir(root) else []
    committed = [name for name in names if (found := layout.parse_checkpoint_name(name)) and accept(*found, None)]
    committed.sort(key=lambda name: layout.used_seq(name) or 0, reverse=True)
    return committed, sum(layout.is_quarantined(name) for name in names)


def _quarantine(path: Path, fs: FileOps) -> str | None:
    """Rename a damaged checkpoint out of the way; None when the directory cannot be changed."""
    target = path.with_name(path.name + layout.BAD_SUFFIX)
    number = 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}{layout.BAD_SUFFIX}-{number}")
    try:
        fs.rename(path, target)
        fs.fsync_dir(path.parent)
    except OSError:
        return None
    return str(target)


def _load_together(
    path: Path, expected: tuple[int, int] | None, wanted: _Wanted, peers: Peers, fs: FileOps
) -> tuple[Loaded | None, int, str]:
    """One attempt on all ranks: (loaded, good, "") on all of them, or (None, worst verdict, reason) on all."""
    verdict, reason, loaded, sha = _GOOD, "", None, bytes(32)
    try:
        loaded, sha = _read(path, expected, peers, fs)
        verdict = wanted.check(loaded)
    except _LogLost as error:
        verdict, reason = _LOG_LOST, str(error)
    except CheckpointError as error:
        verdict, reason = _DAMAGED, str(error)
    except _Unreadable as error:
        verdict, reason = _UNREADABLE, str(error)
    rows = peers.gather([verdict, *_SHA.unpack(sha)])
    worst = max(row[0] for row in rows)
    if worst == _GOOD and any(row[1:] != rows[0][1:] for row in rows):
        # Ranks that see different folders under one path (no shared file system) must not mix them.
        return None, _UNREADABLE, "ranks read different manifests; is the run directory shared by all nodes?"
    if worst == _GOOD:
        return loaded, _GOOD, ""
    refusing = [rank for rank, row in enumerate(rows) if row[0] == worst]
    return None, worst, reason or f"refused by rank {', '.join(map(str, refusing[:8]))}"


def _read(path: Path, expected: tuple[int, int] | None, peers: Peers, fs: FileOps) -> tuple[Loaded, bytes]:
    """Read and verify every file of a checkpoint on this rank. Local. Also the sha256 of its manifest."""
    if not fs.is_dir(path):
        raise CheckpointError(f"{path}: not a directory")
    raw = _file(path / layout.MANIFEST_NAME, layout.MANIFEST_MAX_BYTES, fs.read_file)
    manifest = layout.parse_manifest(raw, str(path / layout.MANIFEST_NAME))
    if expected is not None and (manifest.seq, manifest.step) != expected:
        raise CheckpointError(f"{path}: holds the manifest of c{manifest.seq}-s{manifest.step}")
    tensors: dict[str, Tensor] = {}
    own: dict[str, Tensor] | None = None
    meta: dict[str, Any] | None = None
    local_meta: dict[str, Any] | None = None
    first_meta: dict[str, Any] = {}
    same_world = manifest.world_size == peers.world_size
    for rank, shard in enumerate(_shards(path, manifest, fs)):
        # Small, and copied: they must not keep a whole shard in memory.
        local = {n.removeprefix(LOCAL): shard.pop(n).clone() for n in list(shard) if n.startswith(LOCAL)}
        tensors |= _replicated(shard, tensors, path / layout.shard_name(rank))
        replicated_meta, rank_meta = _state(path, rank, manifest, fs)
        if rank == 0:
            meta, first_meta = replicated_meta, rank_meta
        if same_world and rank == peers.rank:
            own, local_meta = local, rank_meta
    if meta is None or len(tensors) != manifest.num_tensors:
        raise CheckpointError(f"{path}: {len(tensors)} tensors where the manifest says {manifest.num_tensors}")
    loaded = Loaded(
        seq=manifest.seq, step=manifest.step, path=path, world_size=manifest.world_size, run_id=manifest.run_id,
        generation=manifest.generation, state_digest=manifest.state_digest, branch=manifest.branch,
        wal_lsn=manifest.wal_lsn, manifest_sha256=hashlib.sha256(raw).hexdigest(), versions=manifest.versions,
        tensors=tensors, meta=meta, local_tensors=own, local_meta=local_meta, first_meta=first_meta,
    )  # fmt: skip
    return loaded, hashlib.sha256(raw).digest()


def _file(path: Path, max_bytes: int, read: Callable[[Path, int], Content]) -> Content:
    try:
        return read(path, max_bytes)
    except OSError as error:
        if error.errno in _DAMAGE:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        raise _Unreadable(f"{path}: {error.strerror or error}") from error


def _verified(path: Path, entry: layout.FileEntry, max_bytes: int, read: Callable[[Path, int], Content]) -> Content:
    """The bytes of a file that are exactly those the manifest names."""
    if entry.size > max_bytes:
        raise CheckpointError(f"{path}: the manifest announces {entry.size} bytes, at most {max_bytes} accepted")
    raw = _file(path, entry.size, read)
    if len(raw) != entry.size:
        raise CheckpointError(f"{path}: {len(raw)} bytes, the manifest says {entry.size}")
    if hashlib.sha256(raw).hexdigest() != entry.sha256:
        raise CheckpointError(f"{path}: sha256 is not the one in the manifest")
    return raw


def _shards(path: Path, manifest: layout.Manifest, fs: FileOps) -> list[dict[str, Tensor]]:
    # Every rank checks every byte that it uses: that another rank read the same file well says nothing about its own
    # disk and memory. Hashing, which is most of it, leaves the interpreter lock, so files go side by side.
    workers = min(manifest.world_size, torch.get_num_threads())
    with ThreadPoolExecutor(workers, thread_name_prefix="read-checkpoint") as pool:
        return list(pool.map(lambda rank: _shard(path, rank, manifest, fs), range(manifest.world_size)))


def _shard(path: Path, rank: int, manifest: layout.Manifest, fs: FileOps) -> dict[str, Tensor]:
    file = path / layout.shard_name(rank)
    # A file that does not fit into this machine's memory cannot be one of its shards.
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return parse_shard(_verified(file, manifest.files[file.name], limit, fs.read_memory), str(file))


def _state(
    path: Path, rank: int, manifest: layout.Manifest, fs: FileOps
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    file = path / layout.state_name(rank)
    raw = _verified(file, manifest.files[file.name], layout.STATE_MAX_BYTES, fs.read_file)
    return parse_state(raw, rank, manifest.seq, manifest.step, str(file))


def _replicated(shard: dict[str, Tensor], seen: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in shard.items():
        short = name.removeprefix(REPLICATED)
        if short == name or short in seen:
            raise CheckpointError(f"{file}: tensor {name[:80]!r} is unexpected here")
        tensors[short] = tensor
    return tensors
