"""Who owns a run directory: the lock of the living, the fence against those who wake up later.

RUN/LOCK    held by rank 0 for its whole life (fcntl.lockf: freed by the kernel however the holder dies, and not
            inherited by loader processes)
RUN/FENCE   who started last; an older start that wakes up sees another generation and must stop
"""

import errno
import fcntl
import json
import os
import re
import socket
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from tolaria.errors import RunDirError, RunLocked

LOCK_NAME = "LOCK"
FENCE_NAME = "FENCE"
_FENCE_MAX_BYTES = 4096
_RUN_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


class DirectoryOps(Protocol):
    """The file operations that run directories need; `tolaria.recovery.fsops.FileOps` has them."""

    def mkdir(self, path: Path) -> None:
        """Create a directory and its missing parents, durably."""

    def replace_file(self, path: Path, content: bytes) -> None:
        """Write a small file so that readers see the old or the new content, whole."""

    def read_file(self, path: Path, max_bytes: int) -> bytes:
        """The content of a regular file of at most ``max_bytes``."""

    def list_dir(self, path: Path) -> list[str]:
        """The names in a directory."""

    def is_dir(self, path: Path) -> bool:
        """True for a real directory; a symbolic link is none."""


@dataclass(frozen=True, kw_only=True)
class Fence:
    """Who started last. run_id: 32 hex digits, one for all starts of a run. agent: see `process.agent_id`."""

    generation: str
    run_id: str
    boot_id: str
    pid: int
    agent: str | None


class Lock:
    """The lock of a run directory, held until `release` or the end of the process."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def release(self) -> None:
        """Let others in. The file stays. Safe to call twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def lock(path: Path) -> Lock:
    """Take the lock of a run directory, without waiting. Local; one process at a time.

    Raises RunLocked, naming the holder and having changed nothing, when another process has it; RunDirError when
    the directory cannot be written. A second call in the process that holds it would succeed: the system's record
    locks belong to processes.
    """
    file = path / LOCK_NAME
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unusable(file, error) from error
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        holder = os.pread(fd, 256, 0).decode(errors="replace").split()
        os.close(fd)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            who = f"process {holder[0]} on {holder[1]}" if len(holder) == 2 else "another process"
            raise RunLocked(f"{path}: {who} is training here; wait for it, stop it, or choose run.dir") from error
        raise unusable(file, error) from error
    return Lock(fd)


def write_fence(path: Path, fence: Fence, fs: DirectoryOps) -> None:
    """Record this start, durably. Only with the lock held. Raises RunDirError."""
    file = path / FENCE_NAME
    try:
        fs.replace_file(file, json.dumps(asdict(fence)).encode() + b"\n")
    except OSError as error:
        raise unusable(file, error) from error


def read_fence(path: Path, fs: DirectoryOps) -> Fence | None:
    """Who started last in a run directory, None if nobody did. Raises RunDirError for a damaged record."""
    raw = fence_bytes(path, fs)
    return None if raw is None else parse_fence(path, raw)


def fence_bytes(path: Path, fs: DirectoryOps) -> bytes | None:
    """The record of who started last as it is on disk, None if there is none. Raises RunDirError."""
    file = path / FENCE_NAME
    try:
        return fs.read_file(file, _FENCE_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unusable(file, error) from error


def parse_fence(path: Path, raw: bytes) -> Fence:
    """What `fence_bytes` of a run directory says. Raises RunDirError for a damaged record."""
    file = path / FENCE_NAME
    try:
        document = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise RunDirError(f"{file}: not JSON ({error}); the run directory is damaged") from error
    if not _is_fence(document):
        raise RunDirError(f"{file}: not a record of a start; the run directory is damaged")
    return Fence(**document)


def _is_fence(document: object) -> TypeGuard[dict[str, Any]]:
    if not isinstance(document, dict) or set(document) != {field.name for field in fields(Fence)}:
        return False
    texts = (document["generation"], document["boot_id"], document["run_id"])
    agent_ok = document["agent"] is None or isinstance(document["agent"], str)
    if not agent_ok or type(document["pid"]) is not int or not all(isinstance(text, str) for text in texts):
        return False
    return _RUN_ID.fullmatch(document["run_id"]) is not None


def unusable(path: Path, error: OSError) -> RunDirError:
    """The error for a file operation that failed in a run directory."""
    return RunDirError(f"{path}: {error.strerror or error}; mend it, or choose another run.dir or run.root")
