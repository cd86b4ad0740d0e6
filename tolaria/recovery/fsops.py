"""File operations: the only place in the recovery code that writes, syncs, renames or deletes.

`FileOps` has two layers. The primitives are one system call each; tests subclass them to fail, to kill or to lie
at the n-th call. The operations above them are composed of primitives only. Nothing here retries: after a failed
fsync the kernel may already have marked the lost pages clean, so a second fsync on that file would succeed
without the data. The caller gives up the whole directory instead.

Nothing follows a symbolic link in the last component of a path, new directories have mode 0700, new files 0600.
"""

import errno
import mmap
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
# One write system call moves at most this much, so that a full disk or a signal is noticed soon.
WRITE_PIECE_BYTES = 8 * 1024 * 1024
# Linux moves at most 0x7ffff000 bytes per read.
READ_PIECE_BYTES = 1024 * 1024 * 1024
SMALL_BYTES = 64 * 1024


def fresh_memory(size: int) -> mmap.mmap:
    """Memory for one large thing. Its pages are large ones where the system has them: touching is most of the cost."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class FileOps:
    """Local file operations. Every method raises OSError as the system call does, and blocks for it."""

    # --- primitives: one system call each -------------------------------------------------------------------

    def create(self, path: Path) -> int:
        """Create a file that must not exist yet and return its descriptor, open for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)

    def allocate(self, fd: int, size: int) -> None:
        """Reserve ``size`` bytes for an open file, so that a full disk shows before the first write."""
        os.posix_fallocate(fd, 0, size)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some of ``data`` and return how many bytes."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Make an open file or directory durable."""
        os.fsync(fd)

    def open_existing(self, path: Path) -> int:
        """Open a file that exists for writing and return its descriptor; its content stays."""
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def write_at(self, fd: int, data: memoryview, offset: int) -> int:
        """Write some of ``data`` from byte ``offset`` on and return how many bytes."""
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Cut an open file off behind ``size`` bytes."""
        os.ftruncate(fd, size)

    def datasync(self, fd: int) -> None:
        """Make the content of an open file durable, and of its metadata what is needed to read it."""
        os.fdatasync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically. Replaces ``target`` when both are files."""
        os.rename(source, target)

    def make_dir(self, path: Path) -> None:
        """Create one directory that must not exist yet."""
        os.mkdir(path, DIRECTORY_MODE)

    def unlink(self, path: Path) -> None:
        """Remove a file or a symbolic link."""
        os.unlink(path)

    def remove_dir(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    # --- composed operations --------------------------------------------------------------------------------

    def mkdir(self, path: Path) -> None:
        """Create a directory and its missing parents, durably. An existing directory is left as it is."""
        if path.is_dir():
            return
        self.mkdir(path.parent)
        self.make_dir(path)
        self.fsync_dir(path.parent)

    def write_new(self, path: Path, chunks: Iterable[Buffer], size: int) -> None:
        """Write a file that must not exist yet, ``size`` bytes from ``chunks``, and fsync it.

        The file's directory entry is durable only after `fsync_dir`. On failure a partial file is left behind.
        """
        fd = self.create(path)
        try:
            if size:
                self.reserve(fd, size)
            written = 0
            for chunk in chunks:
                written += self._write_all(fd, memoryview(chunk))
            if written != size:
                raise OSError(errno.EIO, f"wrote {written} bytes where {size} were announced", str(path))
            self.fsync(fd)
        finally:
            os.close(fd)

    def write_all_at(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of ``data`` from byte ``offset`` of an open file on; not durable yet."""
        flat = memoryview(data).cast("B")
        done = 0
        while done < len(flat):
            done += self.write_at(fd, flat[done : done + WRITE_PIECE_BYTES], offset + done)

    def reserve(self, fd: int, size: int) -> None:
        """Reserve ``size`` bytes for an open file where the file system can."""
        try:
            self.allocate(fd, size)
        except OSError as error:
            # Some network file systems cannot reserve; their writes then report a full disk themselves.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def reserve_file(self, path: Path, size: int) -> None:
        """Make a file that only takes ``size`` bytes of room. Its directory entry is durable after `fsync_dir`."""
        fd = self.create(path)
        try:
            self.reserve(fd, size)
            self.fsync(fd)
        finally:
            os.close(fd)

    def wipe(self, path: Path, start: int, size: int) -> None:
        """Overwrite ``size`` bytes of a file from ``start`` on with zeros, durably."""
        fd = self.open_existing(path)
        try:
            self.write_all_at(fd, bytes(size), start)
            self.fsync(fd)
        finally:
            os.close(fd)

    def replace_file(self, path: Path, content: bytes) -> None:
        """Write a small file so that readers see the old or the new content, whole, also after a power cut."""
        fresh = path.with_name(f"{path.name}.tmp")
        if os.path.lexists(fresh):
            self.unlink(fresh)
        self.write_new(fresh, [content], len(content))
        self.rename(fresh, path)
        self.fsync_dir(path.parent)

    def fsync_dir(self, path: Path) -> None:
        """Make the entries of a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def remove_tree(self, path: Path) -> None:
        """Remove a file, a symbolic link (not what it points to) or a directory with all it holds."""
        if not self.is_dir(path):
            self.unlink(path)
            return
        for name in self.list_dir(path):
            self.remove_tree(path / name)
        self.remove_dir(path)

    def _write_all(self, fd: int, data: memoryview) -> int:
        if not data.nbytes:
            return 0
        flat = data.cast("B")
        done = 0
        while done < len(flat):
            done += self.write(fd, flat[done : done + WRITE_PIECE_BYTES])
        return done

    # --- reading --------------------------------------------------------------------------------------------

    def read_file(self, path: Path, max_bytes: int) -> bytes:
        """The content of a regular file. Raises as `read_memory`."""
        return bytes(self.read_memory(path, max_bytes))

    def read_memory(self, path: Path, max_bytes: int) -> memoryview:
        """The content of a regular file in memory of its own, read once and never copied.

        Raises OSError EFBIG, before anything is read, when it is longer than ``max_bytes``; ELOOP for a symbolic
        link; EINVAL for a pipe, device or directory.
        """
        # O_NONBLOCK: opening a planted pipe must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            if status.st_size > max_bytes:
                raise OSError(errno.EFBIG, f"{status.st_size} bytes, at most {max_bytes} accepted", str(path))
            # A mapping of its own costs a small file more than its reading.
            small = status.st_size < SMALL_BYTES
            view = memoryview(bytearray(status.st_size) if small else fresh_memory(status.st_size))
            done = 0
            while done < len(view) and (count := self.read_into(fd, view[done : done + READ_PIECE_BYTES])):
                done += count
            return view[:done]
        finally:
            os.close(fd)

    def read_into(self, fd: int, into: memoryview) -> int:
        """Read some bytes and return how many (a primitive, like the writing ones)."""
        return os.readv(fd, [into])

    def list_dir(self, path: Path) -> list[str]:
        """The names in a directory, sorted."""
        return sorted(os.listdir(path))

    def is_dir(self, path: Path) -> bool:
        """True for a real directory, False for anything else, a symbolic link to a directory included."""
        try:
            return stat.S_ISDIR(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the file system of ``path``."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize
