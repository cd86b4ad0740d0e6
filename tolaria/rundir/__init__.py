"""The run directory: which one this start uses, that nobody else does, and what a restart finds there.

    RUN/LOCK, RUN/FENCE   who may write here (`ownership`)
    RUN/ckpt/             checkpoints

Rank 0 decides (`choice`, which changes nothing), takes the lock, writes the fence and tells the other ranks.
"""

import json
import os
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tolaria.config import RunConfig
from tolaria.errors import RunDirError, RunLocked
from tolaria.process import boot_id
from tolaria.rundir.choice import (
    CHECKPOINTS_NAME,
    Choice,
    Resume,
    choose,
    default_path,
    find_newest,
    find_restart,
    has_checkpoints,
)
from tolaria.rundir.ownership import (
    FENCE_NAME,
    LOCK_NAME,
    DirectoryOps,
    Fence,
    Lock,
    fence_bytes,
    lock,
    parse_fence,
    read_fence,
    unusable,
    write_fence,
)

if TYPE_CHECKING:
    # Who only looks at run directories has no need of torch.
    from tolaria.dist import Peers

__all__ = [
    "RunDir", "open_run", "Resume", "Choice", "choose", "default_path", "find_newest", "find_restart",
    "has_checkpoints", "Fence", "read_fence", "write_fence", "Lock", "lock", "DirectoryOps",
]  # fmt: skip


@dataclass(kw_only=True)
class RunDir:
    """An opened run directory. On rank 0 it holds the lock until `close`."""

    path: Path
    run_id: str
    generation: str
    resume: Resume | None
    restarted: bool
    _fs: DirectoryOps
    _lock: Lock | None
    _mine: bytes | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's own checkpoints."""
        return self.path / CHECKPOINTS_NAME

    def check_owner(self) -> None:
        """Raise RunLocked unless this start is still the last one. Local; one small read."""
        raw = fence_bytes(self.path, self._fs)
        if raw is not None and raw == self._mine:
            # Taking it apart costs more than reading it, and this runs before every entry of the log.
            return
        fence = None if raw is None else parse_fence(self.path, raw)
        if fence is None or fence.generation != self.generation:
            by = "nobody" if fence is None else f"process {fence.pid} (generation {fence.generation})"
            raise RunLocked(f"{self.path}: taken over by {by}; this start (generation {self.generation}) must stop")
        self._mine = raw

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(
    run: RunConfig, peers: "Peers", *, generation: str, agent: str | None, now: datetime, fs: DirectoryOps
) -> RunDir:
    """Choose, create, lock and fence the run directory. Collective; blocks for a broadcast.

    Raises on every rank alike: RunLocked when another process trains there (nothing was changed), RunDirError
    when the directory cannot be used or a resume finds nothing.
    """
    if peers.rank != 0:
        return _follow(json.loads(peers.broadcast_frame(None)), generation, fs)
    try:
        opened = _open_locally(run, generation=generation, agent=agent, now=now, fs=fs)
    except RunDirError as error:
        peers.broadcast_frame(_encode({"locked": isinstance(error, RunLocked), "error": str(error)}))
        raise
    resume = opened.resume
    told = {"path": str(opened.path), "run_id": opened.run_id, "restarted": opened.restarted}
    told |= {"resume": str(resume.path) if resume else None, "one": resume is not None and resume.is_checkpoint}
    peers.broadcast_frame(_encode(told))
    return opened


def _follow(told: dict[str, Any], generation: str, fs: DirectoryOps) -> RunDir:
    """What rank 0 decided, on another rank."""
    if "error" in told:
        raise (RunLocked if told["locked"] else RunDirError)(told["error"])
    resume = Resume(path=Path(told["resume"]), is_checkpoint=told["one"]) if told["resume"] else None
    return RunDir(
        path=Path(told["path"]), run_id=told["run_id"], generation=generation, resume=resume,
        restarted=told["restarted"], _fs=fs, _lock=None,
    )  # fmt: skip


def _open_locally(
    run: RunConfig, *, generation: str, agent: str | None, now: datetime, fs: DirectoryOps
) -> RunDir:  # fmt: skip
    choice = choose(run, agent=agent, now=now, fs=fs)
    path = choice.path
    try:
        names = fs.list_dir(path) if os.path.lexists(path) else []
        if names and not {LOCK_NAME, FENCE_NAME} & set(names) and not has_checkpoints(path, fs):
            raise RunDirError(f"{path}: holds other files and was never a run directory; choose another run.dir")
        fs.mkdir(path)
    except OSError as error:
        raise unusable(path, error) from error
    held = lock(path)
    try:
        own = path / CHECKPOINTS_NAME
        if has_checkpoints(path, fs) and (choice.resume is None or choice.resume.path != own):
            raise RunDirError(
                f"{path}: holds checkpoints of a run; continue it with run.resume=auto, or choose run.dir"
            )
        former = read_fence(path, fs)
        run_id = former.run_id if former is not None else secrets.token_hex(16)
        fence = Fence(generation=generation, run_id=run_id, boot_id=boot_id(), pid=os.getpid(), agent=agent)
        write_fence(path, fence, fs)
        fs.mkdir(own)
    except RunDirError:
        held.release()
        raise
    except OSError as error:
        held.release()
        raise unusable(path, error) from error
    return RunDir(
        path=path, run_id=run_id, generation=generation, resume=choice.resume, restarted=choice.restarted,
        _fs=fs, _lock=held,
    )  # fmt: skip


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()
