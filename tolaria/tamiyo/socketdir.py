"""A private directory for one run's policy socket and key, and the removal of those that dead runs left.

    <base>/tolaria-tamiyo-<pid>-<random>/{owner.lock, shared.key, policy.sock}        0700

The owner holds a POSIX lock on ``owner.lock``. The kernel drops it when the owner dies, whatever kills it, also
where process ids are not comparable (containers that share /tmp), and children do not inherit it.
"""

import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tolaria.errors import RunDirError
from tolaria.leyline.framing import new_key_file_text
from tolaria.tamiyo.endpoint import MAX_IPC_PATH_BYTES

log = logging.getLogger("tolaria.tamiyo")

PREFIX = "tolaria-tamiyo-"
DEAD_PREFIX = f"{PREFIX}dead-"
LOCK_NAME = "owner.lock"
UNLOCKED_GRACE_S = 60.0
_SHORT_BASE = Path("/tmp")  # noqa: S108  (mkdtemp makes a private directory in it)


class SocketDir:
    """Made at construction and held until `close` or the death of this process.

    ``base`` is where to put it, by default the directory for temporary files; where the socket's path would be
    too long for the kernel, /tmp is taken instead. Raises RunDirError when it cannot be made.
    """

    def __init__(self, base: Path | None = None) -> None:
        chosen = _short_enough(base or Path(tempfile.gettempdir()))
        remove_stale(chosen)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=chosen))
            self._lock = _create_locked(self.path)
            self._write_key()
        except OSError as error:
            raise RunDirError(f"{chosen}: cannot make a directory for the policy's socket ({error})") from error

    @property
    def socket_path(self) -> Path:
        """Where the server binds."""
        return self.path / "policy.sock"

    @property
    def key_file(self) -> Path:
        """The shared key, made with the directory."""
        return self.path / "shared.key"

    def _write_key(self) -> None:
        descriptor = os.open(self.key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(new_key_file_text())

    def close(self) -> None:
        """Remove the directory with all that is in it. Safe to call twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_stale(base: Path) -> list[Path]:
    """Remove this user's socket directories in ``base`` whose owner is dead; returns them. Never raises."""
    removed = []
    for path in _candidates(base):
        try:
            if _owner_is_dead(path):
                # Renamed first: its server may have some milliseconds to live and be just making its socket.
                condemned = path.with_name(f"{DEAD_PREFIX}{path.name.removeprefix(DEAD_PREFIX)}")
                path.rename(condemned)
                shutil.rmtree(condemned)
                removed.append(path)
        except OSError as error:
            # Another start may be removing it too. It does not stand in our way either way.
            log.warning("left-over %s was not removed (%s)", path, error)
    return removed


def is_abandoned(path: Path) -> bool:
    """Whether there is no such directory here, or its owner is dead. Never raises; not for the owner's own use."""
    if path.name.startswith(f"{PREFIX}{os.getpid()}-"):
        return False  # taking the lock and giving it back would drop our own
    try:
        return _owner_is_dead(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _candidates(base: Path) -> Iterator[Path]:
    # Taking and dropping a lock on a file drops all of this process's locks on it, so our own are never touched.
    own = f"{PREFIX}{os.getpid()}-"
    try:
        entries = list(os.scandir(base))
    except OSError as error:
        log.warning("%s cannot be searched for left-over socket directories (%s)", base, error)
        return
    for entry in entries:
        if entry.name.startswith(PREFIX) and not entry.name.startswith(own):
            yield Path(entry.path)


def _owner_is_dead(path: Path) -> bool:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return False
    if path.name.startswith(DEAD_PREFIX):
        return True
    try:
        descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        # Either half removed, or so new that its owner has not locked it yet.
        return time.time() - status.st_mtime > UNLOCKED_GRACE_S
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _create_locked(directory: Path) -> int:
    """Descriptor of the lock file, which appears under its name only when it is locked."""
    temporary = directory / f"{LOCK_NAME}.tmp"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    temporary.rename(directory / LOCK_NAME)
    return descriptor


def _short_enough(base: Path) -> Path:
    longest = base.absolute() / f"{PREFIX}{'9' * 7}-{'x' * 8}" / "policy.sock"
    return base.absolute() if len(os.fsencode(longest)) <= MAX_IPC_PATH_BYTES else _SHORT_BASE
