"""Every hash of one checkpoint, file by file in pieces, without its tensors ever being in memory.

    manifest's checksum -> size and sha256 of each file -> places of the tensors -> digest of the state they make up

The manifest's own sha256 is in the run's log, which is the word against which it is held where there is one.
"""

import errno
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tolaria.errors import CheckpointError
from tolaria.recovery.manifest import (
    MANIFEST_MAX_BYTES,
    MANIFEST_NAME,
    STATE_MAX_BYTES,
    FileEntry,
    Manifest,
    parse_manifest,
    shard_name,
    state_name,
)

PIECE_BYTES = 4 * 1024 * 1024
HEADER_MAX_BYTES = 16 * 1024 * 1024
REPLICATED = "replicated/"
DTYPES = {
    "F64": ("torch.float64", 8), "F32": ("torch.float32", 4), "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2), "F8_E4M3": ("torch.float8_e4m3fn", 1), "F8_E5M2": ("torch.float8_e5m2", 1),
    "I64": ("torch.int64", 8), "I32": ("torch.int32", 4), "I16": ("torch.int16", 2), "I8": ("torch.int8", 1),
    "U8": ("torch.uint8", 1), "BOOL": ("torch.bool", 1),
}  # fmt: skip
"""The format's words for types: torch's, which the digest of a state is taken over, and bytes of an element."""

Progress = Callable[[int], None]
"""Told of so many more bytes read."""


@dataclass
class Checked:
    """What was found of one checkpoint, or of the log. ``faults`` name file and place; empty: sound."""

    name: str
    faults: list[str] = field(default_factory=list)
    size: int = 0
    files: int = 0
    note: str = ""
    step: int = 0

    @property
    def sound(self) -> bool:
        """Whether every hash is right."""
        return not self.faults


def check_checkpoint(path: Path, *, logged_sha256: str = "", progress: Progress = lambda count: None) -> Checked:
    """Read every byte of a checkpoint. Local; changes nothing; needs a few MiB of memory, whatever its size.

    ``logged_sha256``: of its manifest, as the run's log has it. Raises FileNotFoundError when the folder is not there,
    OSError for what may pass, such as missing permission.
    """
    found = Checked(path.name)
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        found.faults.append("not a directory")
        return found
    try:
        raw = _small(path / MANIFEST_NAME, MANIFEST_MAX_BYTES)
        found.size += len(raw)
        progress(len(raw))
        manifest = parse_manifest(raw, MANIFEST_NAME)
    except CheckpointError as error:
        found.faults.append(str(error))
        return found
    found.step = manifest.step
    if path.name.startswith("c") and path.name.split(".")[0] != f"c{manifest.seq}-s{manifest.step}":
        found.faults.append(f"{MANIFEST_NAME}: it is that of c{manifest.seq}-s{manifest.step}")
    if logged_sha256 and hashlib.sha256(raw).hexdigest() != logged_sha256:
        found.faults.append(f"{MANIFEST_NAME}: not the one in the run's log")
    _contents(path, manifest, found, progress)
    return found


def checkpoint_bytes(path: Path) -> int:
    """Bytes of its files, for a bar of progress; 0 for what is not there any more."""
    total = 0
    try:
        for entry in os.scandir(path):
            total += entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return total
    return total


def _contents(path: Path, manifest: Manifest, found: Checked, progress: Progress) -> None:
    digests: dict[str, bytes] = {}
    meta: bytes | None = None
    for rank in range(manifest.world_size):
        for name in (shard_name(rank), state_name(rank)):
            entry, file = manifest.files[name], path / name
            try:
                if name == shard_name(rank):
                    _shard(file, entry, digests, progress)
                else:
                    replicated = _state(file, entry, manifest, rank, progress)
                    meta = replicated if rank == 0 else meta
            except CheckpointError as error:
                found.faults.append(f"{name}: {error}")
            found.size += entry.size
            found.files += 1
    if found.faults:
        return
    if len(digests) != manifest.num_tensors:
        found.faults.append(f"{len(digests)} tensors where the manifest says {manifest.num_tensors}")
    elif meta is not None and _state_digest(manifest.step, digests, meta) != manifest.state_digest:
        found.faults.append("the digest of the whole state is not the one in the manifest")


def _shard(file: Path, entry: FileEntry, digests: dict[str, bytes], progress: Progress) -> None:
    """Hash a shard as a whole, and its replicated tensors one by one into ``digests``."""
    whole = hashlib.sha256()
    pieces = _Pieces(file, entry.size, whole.update, progress)
    with pieces:
        own: dict[str, bytes] = {}
        fault = ""
        try:
            _tensors(pieces, entry.size, own)
        except CheckpointError as error:
            fault = str(error)
        pieces.finish()
    _require(
        whole.hexdigest() == entry.sha256, "sha256 is not the one in the manifest" + (f"; {fault}" if fault else "")
    )
    _require(not fault, fault)
    twice = own.keys() & digests.keys()
    _require(not twice, f"tensor {min(twice, default='')!r:.80} is in another shard as well")
    digests |= own


def _tensors(pieces: "_Pieces", size: int, digests: dict[str, bytes]) -> None:
    head = pieces.take(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
    _require(0 <= length <= min(HEADER_MAX_BYTES, size - 8), f"header of {length} bytes in a file of {size}")
    try:
        table = json.loads(pieces.take(length))
        listed = sorted(
            ((n, t["dtype"], t["shape"], *t["data_offsets"]) for n, t in table.items()), key=lambda t: t[3:]
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"header: not a table of tensors ({type(error).__name__})") from error
    at = 0
    for name, dtype, shape, start, end in listed:
        _require(
            dtype in DTYPES and all(type(n) is int and n >= 0 for n in shape), f"tensor {name!r:.80}: {dtype!r:.20}"
        )
        word, width = DTYPES[dtype]
        _require((start, end) == (at, at + math.prod(shape) * width), f"tensor {name!r:.80} at bytes {start} to {end}")
        digest = hashlib.sha256(f"{word} {tuple(shape)}\n".encode())
        for piece in pieces.through(end - start):
            digest.update(piece)
        if name.startswith(REPLICATED):
            digests[name] = digest.digest()
        at = end
    _require(8 + length + at == size, f"{size - 8 - length - at} bytes belong to no tensor")


def _state(file: Path, entry: FileEntry, manifest: Manifest, rank: int, progress: Progress) -> bytes:
    """The replicated part of a rank's JSON file, as it was encoded."""
    raw = _small(file, STATE_MAX_BYTES)
    progress(len(raw))
    _require(len(raw) == entry.size, f"{len(raw)} bytes, the manifest says {entry.size}")
    _require(hashlib.sha256(raw).hexdigest() == entry.sha256, "sha256 is not the one in the manifest")
    try:
        document: Any = json.loads(raw)
        said = (document["rank"], document["seq"], document["step"])
        replicated = document["replicated"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"not a state file ({type(error).__name__})") from error
    _require(said == (rank, manifest.seq, manifest.step), f"it is of rank, checkpoint, step {said}")
    return json.dumps(replicated, separators=(",", ":")).encode()


def _state_digest(step: int, digests: dict[str, bytes], meta: bytes) -> str:
    """As the run took it (tolaria/recovery/staging.py), here without tensors."""
    whole = hashlib.sha256(f"step {step} meta {len(meta)}\n".encode() + meta)
    for name, digest in sorted(digests.items()):
        whole.update(f"{name}\n".encode() + digest)
    return whole.hexdigest()


def _small(file: Path, max_bytes: int) -> bytes:
    """A small file's content. Raises CheckpointError for one that is missing or no file."""
    pieces = _Pieces(file, None, lambda piece: None, lambda count: None)
    with pieces:
        _require(pieces.size <= max_bytes, f"{pieces.size} bytes, at most {max_bytes} accepted")
        return pieces.take(pieces.size)


class _Pieces:
    """A regular file, read once from front to back; every byte goes through ``see``."""

    def __init__(self, file: Path, size: int | None, see: Callable[[bytes], None], progress: Progress) -> None:
        try:
            # O_NONBLOCK: opening a planted pipe must not wait for a writer.
            self._fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR) and file.parent.is_dir():
                raise CheckpointError(f"{error.strerror}") from error
            raise
        status = os.fstat(self._fd)
        self.size = status.st_size
        self._see, self._progress = see, progress
        regular = stat.S_ISREG(status.st_mode)
        if not regular or (size is not None and self.size != size):
            os.close(self._fd)
            raise CheckpointError(f"{self.size} bytes, the manifest says {size}" if regular else "not a regular file")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes at once."""
        return b"".join(self.through(count))

    def through(self, count: int) -> Iterator[bytes]:
        """The next ``count`` bytes in pieces. Raises CheckpointError where the file ends before."""
        while count:
            try:
                piece = os.read(self._fd, min(PIECE_BYTES, count))
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise CheckpointError("the disk cannot read it (input/output error)") from error
            _require(bool(piece), "it ends too early")
            self._see(piece)
            self._progress(len(piece))
            count -= len(piece)
            yield piece

    def finish(self) -> None:
        """Whatever is left."""
        while piece := os.read(self._fd, PIECE_BYTES):
            self._see(piece)
            self._progress(len(piece))


def _require(ok: bool, fault: str) -> None:
    if not ok:
        raise CheckpointError(fault)
