"""How a checkpoint becomes valid: all ranks together, one commit point, the rename of its folder.

    1. agree    digests of the replicated state are equal on all ranks, or nothing is written
    2. open     rank 0: leftovers removed, owner checked, space checked, c<seq>-s<step>.tmp made
    3. write    each rank: its shard and state file, created exclusively, reserved, written, fsynced
    4. gather   size and sha256 of every file; one failure anywhere and all ranks drop the attempt
    5. publish  rank 0: manifest, fsync file and folder, owner checked again, RENAME, fsync the parent
    6. log      rank 0: the record of it in the log of decisions
    7. retain   rank 0: older ones renamed to .trash, then deleted

Each decision is taken from gathered integers, so the ranks cannot disagree. A crash before the rename leaves the
previous checkpoint, after it the previous or the new one, both whole. Only what is in the log is acknowledged.
"""

import errno
import hashlib
import os
import platform
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from tolaria.dist import Peers
from tolaria.errors import RunDirError, RunLocked, WalError
from tolaria.recovery import manifest as layout
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.retain import Retention, retain, sweep
from tolaria.recovery.shards import Shard, assign_to_ranks, build_shard, build_state
from tolaria.recovery.staging import Staged, state_digest, structure_digest, tensor_digest
from tolaria.recovery.wal import Wal, WalKind

# Left free for logs and the operating system when a checkpoint is written.
FREE_SPACE_MARGIN_BYTES = 16 * 1024 * 1024
# Local failures travel as one integer: an errno, or one of these.
_OK = 0
_STAGED_BYTES_CHANGED = -1
_NOT_OWNER = -2
_OWNER_UNKNOWN = -3
_NOT_LOGGED = -4
_TEXTS = {
    _STAGED_BYTES_CHANGED: "the staged bytes changed while they were written",
    _NOT_OWNER: "another start has taken over this run directory",
    _OWNER_UNKNOWN: "the record of who owns this run directory cannot be read",
}
_SHA = struct.Struct("!4q")


class Abandoned(Exception):
    """This attempt is given up, on every rank alike. ``taken_over``: the run belongs to another start."""

    def __init__(self, message: str, *, taken_over: bool = False) -> None:
        super().__init__(message)
        self.taken_over = taken_over


class _StagedBytesChanged(Exception):
    pass


@dataclass(frozen=True)
class Committed:
    """A checkpoint that is durable. ``size`` in bytes, all files; ``cleanup_error`` of what came after."""

    seq: int
    path: Path
    size: int
    cleanup_error: str | None


@dataclass(frozen=True)
class _Written:
    size: int
    sha256: bytes


def _ints(digest: bytes) -> tuple[int, ...]:
    return _SHA.unpack(digest)


def _hex(row: Sequence[int]) -> str:
    return _SHA.pack(*row).hex()


def _describe(code: int) -> str:
    if code in _TEXTS:
        return _TEXTS[code]
    return f"{os.strerror(code)} ({errno.errorcode.get(code, code)})"


class Committer:
    """Carries out the steps above for one run. Every method is collective over ``peers`` unless it says local."""

    def __init__(
        self, root: Path, *, run_id: str, generation: str, peers: Peers, fs: FileOps, keep: int,
        check_owner: Callable[[], None], wal: Wal | None = None,
    ) -> None:  # fmt: skip
        layout.require_label("run_id", run_id)
        layout.require_label("generation", generation)
        self._root = root
        self._run_id = run_id
        self._generation = generation
        self._peers = peers
        self._fs = fs
        self._keep = keep
        self._check_owner = check_owner
        self._wal = wal
        self._last_seq = -1

    def commit(self, staged: Staged, retention: Retention) -> Committed:
        """Write and commit one checkpoint. Raises on all ranks alike: Abandoned; WalError when it is on the disk but
        could not be logged. PeerLost when a rank is gone."""
        digests = {name: tensor_digest(tensor) for name, tensor in staged.replicated.items()}
        digest = state_digest(staged.step, digests, staged.meta)
        self._agree_on_content(staged, digests, digest)
        share = assign_to_ranks(staged.replicated, self._peers.world_size)[self._peers.rank]
        shard = build_shard({name: staged.replicated[name] for name in share} | staged.local)
        expected = {name: digests[name] for name in share}
        seq = self._open(staged, shard.size + len(staged.meta) + len(staged.local_meta))
        tmp = self._root / (layout.checkpoint_name(seq, staged.step) + layout.TMP_SUFFIX)
        files = self._write(tmp, seq, staged, shard, expected)
        document = layout.Manifest(
            run_id=self._run_id, generation=self._generation, seq=seq, step=staged.step, branch=staged.branch,
            wal_lsn=self._wal.last_lsn if self._wal is not None else 0,
            world_size=self._peers.world_size, num_tensors=len(staged.replicated), state_digest=digest.hex(),
            files=files, versions=_versions(),
        )  # fmt: skip
        path = self._publish(tmp, document, staged.acts)
        cleanup_error = None
        if self._peers.rank == 0:
            cleanup_error = retain(self._root, self._fs, keep=self._keep, newest=seq, retention=retention)
        return Committed(seq, path, sum(entry.size for entry in files.values()), cleanup_error)

    # --- steps ----------------------------------------------------------------------------------------------

    def _agree_on_content(self, staged: Staged, digests: dict[str, bytes], digest: bytes) -> None:
        rows = self._peers.gather([*_ints(digest), *_ints(structure_digest(staged.replicated))])
        if all(row[:4] == rows[0][:4] for row in rows):
            return
        if any(row[4:] != rows[0][4:] for row in rows):
            raise Abandoned("replica mismatch: names, types or shapes of tensors differ over ranks")
        names = sorted(digests)
        # The ranks agree on the number of tensors here, so the rows have one length.
        values = self._peers.gather([_ints(digests[name])[0] for name in names] or [0])
        odd = [name for index, name in enumerate(names) if len({row[index] for row in values}) > 1]
        what = f"{len(odd)} tensors differ over ranks, such as {odd[:3]}" if odd else "step or metadata differs"
        raise Abandoned(f"replica mismatch: {what}")

    def _open(self, staged: Staged, own_bytes: int) -> int:
        total = sum(row[0] for row in self._peers.gather([own_bytes]))
        code, seq = _OK, 0
        if self._peers.rank == 0:
            try:
                seq = self._open_locally(staged.step, total)
            except OSError as error:
                code = error.errno or errno.EIO
            except RunLocked:
                code = _NOT_OWNER
            except RunDirError:
                code = _OWNER_UNKNOWN
        code, seq = self._peers.gather([code, seq])[0]
        self._require([code], "opening a checkpoint")
        return seq

    def _open_locally(self, step: int, total: int) -> int:
        self._check_owner()
        self._fs.mkdir(self._root)
        on_disk = [seq for name in self._fs.list_dir(self._root) if (seq := layout.used_seq(name)) is not None]
        sweep(self._root, self._fs)
        if self._fs.free_bytes(self._root) < total + FREE_SPACE_MARGIN_BYTES:
            raise OSError(errno.ENOSPC, f"{total} bytes needed", str(self._root))
        self._last_seq = max([self._last_seq, *on_disk]) + 1
        self._fs.make_dir(self._root / (layout.checkpoint_name(self._last_seq, step) + layout.TMP_SUFFIX))
        return self._last_seq

    def _write(
        self, tmp: Path, seq: int, staged: Staged, shard: Shard, expected: dict[str, bytes]
    ) -> dict[str, layout.FileEntry]:
        rank = self._peers.rank
        code = _OK
        shard_file = state_file = _Written(0, bytes(32))
        replicated = staged.meta if rank == 0 else None
        try:
            shard_file = self._write_shard(tmp / layout.shard_name(rank), shard, expected)
            state = build_state(rank, seq, staged.step, replicated, staged.local_meta)
            self._fs.write_new(tmp / layout.state_name(rank), [state], len(state))
            state_file = _Written(len(state), hashlib.sha256(state).digest())
        except OSError as error:
            code = error.errno or errno.EIO
        except _StagedBytesChanged:
            code = _STAGED_BYTES_CHANGED
        row = [code, shard_file.size, *_ints(shard_file.sha256), state_file.size, *_ints(state_file.sha256)]
        rows = self._peers.gather(row)
        self._require([r[0] for r in rows], "writing a checkpoint", tmp)
        files = {}
        for r, row in enumerate(rows):
            files[layout.shard_name(r)] = layout.FileEntry(size=row[1], sha256=_hex(row[2:6]))
            files[layout.state_name(r)] = layout.FileEntry(size=row[6], sha256=_hex(row[7:11]))
        return files

    def _write_shard(self, path: Path, shard: Shard, expected: dict[str, bytes]) -> _Written:
        whole = hashlib.sha256()
        tensors = dict(shard.tensors)

        def verified() -> Iterator[memoryview]:
            for name, chunk in shard.chunks():
                # What the ranks agreed on and what goes to the disk must be the same bytes.
                if name in expected and tensor_digest(tensors[name]) != expected[name]:
                    raise _StagedBytesChanged
                whole.update(chunk)
                yield chunk

        self._fs.write_new(path, verified(), shard.size)
        return _Written(shard.size, whole.digest())

    def _publish(self, tmp: Path, document: layout.Manifest, acts: int) -> Path:
        final = self._root / layout.checkpoint_name(document.seq, document.step)
        raw = document.to_bytes()
        code = _OK
        if self._peers.rank == 0:
            try:
                if len(raw) > layout.MANIFEST_MAX_BYTES:
                    raise OSError(errno.EFBIG, f"manifest of {len(raw)} bytes", str(tmp))
                self._fs.write_new(tmp / layout.MANIFEST_NAME, [raw], len(raw))
                self._fs.fsync_dir(tmp)
                self._check_owner()
                self._fs.rename(tmp, final)
                self._fs.fsync_dir(self._root)
            except OSError as error:
                code = error.errno or errno.EIO
            except RunLocked:
                code = _NOT_OWNER
            except RunDirError:
                code = _OWNER_UNKNOWN
        self._require(self._peers.gather([code])[0], "committing a checkpoint", tmp)
        self._log(document, raw, acts)
        return final

    def _log(self, document: layout.Manifest, raw: bytes, acts: int) -> None:
        code, failure = _OK, ""
        if self._wal is not None:
            body = {
                "seq": document.seq, "step": document.step, "branch": document.branch, "acts": acts,
                "manifest_sha256": hashlib.sha256(raw).hexdigest(),
            }  # fmt: skip
            try:
                self._wal.append(WalKind.CHECKPOINT, body)
                self._wal.rotate()
            except WalError as error:
                code, failure = _NOT_LOGGED, str(error)
            except RunLocked:
                code = _NOT_OWNER
            except RunDirError:
                code = _OWNER_UNKNOWN
        code = self._peers.gather([code])[0][0]
        if code == _NOT_LOGGED:
            raise WalError(failure or "rank 0 cannot write its log of decisions; its own output says why")
        self._require([code], "logging a checkpoint")

    def _require(self, codes: Sequence[int], what: str, tmp: Path | None = None) -> None:
        """Give the attempt up, on all ranks alike, unless every code is OK. Local."""
        failed = [(rank, code) for rank, code in enumerate(codes) if code != _OK]
        if not failed:
            return
        note = self._drop(tmp) if tmp is not None and self._peers.rank == 0 else ""
        taken_over = any(code == _NOT_OWNER for _, code in failed)
        reasons = "; ".join(f"rank {rank}: {_describe(code)}" for rank, code in failed[:4])
        raise Abandoned(f"{what}: {reasons}{note}", taken_over=taken_over)

    def _drop(self, tmp: Path) -> str:
        try:
            if self._fs.is_dir(tmp):
                self._fs.remove_tree(tmp)
        except OSError as error:
            return f"; {tmp.name} could not be removed ({error}) and is deleted with the next save"
        return ""


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "safetensors": safetensors.__version__}
