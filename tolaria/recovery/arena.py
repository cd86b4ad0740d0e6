"""One snapshot's memory: a mapped file that outlives the process, or anonymous memory where there is no such file.

    0      header page: magic, validity, sizes, position, checksums; then who made it, as JSON
    4096   tensors, each at a multiple of 64 bytes
    ...    JSON: metadata, and name, type, shape, place and hash of every tensor

Written in this order: not valid, tensors, JSON, header, valid. A process that dies in between leaves a file that
nobody takes for a snapshot.
"""

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tolaria.errors import CheckpointError
from tolaria.recovery.shards import dtype_name, named_dtype

PAGE_BYTES = 4096
ALIGNMENT = 64
MAX_JSON_BYTES = 64 * 1024 * 1024
FILE_MODE = 0o600
_MAGIC = b"TLSNAP01"
_VALID = 0x5AFE_57A7_E001_D00D
_FIELDS = struct.Struct("<QQQQQ32s32sI")  # seq, step, branch, tensor bytes, JSON bytes, digest, sha256 of JSON, about
_FIELDS_AT, _VALID_AT = 64, 16
_CHECKSUM_AT = _FIELDS_AT + _FIELDS.size
_ABOUT_AT = 512


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the header page says. ``about``: who made the file: run, run directory, process."""

    seq: int
    step: int
    branch: int
    tensor_bytes: int
    json_bytes: int
    digest: bytes
    json_sha256: bytes
    about: Mapping[str, Any]
    valid: bool

    @property
    def size(self) -> int:
        """Bytes of the file that count."""
        return PAGE_BYTES + self.tensor_bytes + self.json_bytes


def parse_header(page: bytes) -> Header | None:
    """The header in these bytes; None unless it is whole."""
    if len(page) < PAGE_BYTES or page[:8] != _MAGIC:
        return None
    seq, step, branch, tensor_bytes, json_bytes, digest, sha, about_bytes = _FIELDS.unpack_from(page, _FIELDS_AT)
    (checksum,) = struct.unpack_from("<I", page, _CHECKSUM_AT)
    if about_bytes > PAGE_BYTES - _ABOUT_AT or tensor_bytes % ALIGNMENT or json_bytes > MAX_JSON_BYTES:
        return None
    about = page[_ABOUT_AT : _ABOUT_AT + about_bytes]
    if checksum != zlib.crc32(page[_FIELDS_AT:_CHECKSUM_AT] + about):
        return None
    (flag,) = struct.unpack_from("<Q", page, _VALID_AT)
    return Header(
        seq=seq, step=step, branch=branch, tensor_bytes=tensor_bytes, json_bytes=json_bytes, digest=digest,
        json_sha256=sha, about=json.loads(about), valid=flag == _VALID,
    )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the tensor area."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def places(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Place], int]:
    """A place for each tensor, and the bytes of the tensor area. Raises ValueError for a type that has no name."""
    found, offset = {}, 0
    for name, tensor in tensors.items():
        dtype_name(name, tensor)
        found[name] = Place(offset, tensor.dtype, tuple(tensor.shape))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return found, offset


def view(memory: Any, start: int, place: Place) -> Tensor:
    """The tensor at a place of a buffer whose tensor area begins at ``start``."""
    count = 1
    for size in place.shape:
        count *= size
    if not count:
        return torch.empty(place.shape, dtype=place.dtype)
    flat = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=start + place.offset)
    return flat.view(place.shape)


def table(found: Mapping[str, Place], hashes: Mapping[str, int]) -> list[list[Any]]:
    """Places and hashes as JSON."""
    return [
        [name, dtype_name(name, torch.empty(0, dtype=p.dtype)), list(p.shape), p.offset, hashes[name]]
        for name, p in found.items()
    ]


def parse_table(rows: Any, tensor_bytes: int) -> tuple[dict[str, Place], dict[str, int]]:
    """What `table` gave. Raises CheckpointError for anything else, or a place outside of the tensor area."""
    found, hashes = {}, {}
    try:
        for name, word, shape, offset, value in rows:
            dtype = named_dtype(word)
            size = torch.Size(shape).numel() * (dtype.itemsize if dtype is not None else 1)
            if dtype is None or offset < 0 or offset % ALIGNMENT or offset + size > tensor_bytes:
                raise CheckpointError(f"tensor {name!r} lies outside of the snapshot")
            found[str(name)], hashes[str(name)] = Place(offset, dtype, tuple(shape)), int(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the table of tensors is malformed: {error}") from error
    return found, hashes


def arena_path(directory: Path, run_id: str, generation: str, rank: int, slot: int) -> Path:
    """The file of one slot."""
    return directory / f"tolaria-{run_id[:16]}-{generation}-r{rank}-{slot}"


class Arena:
    """Mapped memory of ``capacity`` bytes, touched once so that no copy waits for it. ``path``: None for anonymous.

    Raises OSError when the directory has no room for it.
    """

    def __init__(self, capacity: int, path: Path | None, about: Mapping[str, Any], *, pinned: bool) -> None:
        self.capacity = -(-capacity // PAGE_BYTES) * PAGE_BYTES
        self.path = path
        self._about = dict(about)
        if path is None:
            self.memory = mmap.mmap(-1, self.capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        else:
            self.memory = _map_new(path, self.capacity)
        self._pinned = pinned and _pin(self.memory, self.capacity)

    def invalidate(self) -> None:
        """From here on the content counts for nothing."""
        self.memory[_VALID_AT : _VALID_AT + 8] = bytes(8)

    def write(self, header: Header, document: bytes) -> None:
        """Write JSON and header behind tensors that are there already; still not valid."""
        start = PAGE_BYTES + header.tensor_bytes
        self.memory[start : start + len(document)] = document
        about = json.dumps({**self._about, **header.about}).encode()[: PAGE_BYTES - _ABOUT_AT]
        fields = _FIELDS.pack(
            header.seq, header.step, header.branch, header.tensor_bytes, header.json_bytes, header.digest,
            header.json_sha256, len(about),
        )  # fmt: skip
        self.memory[_ABOUT_AT : _ABOUT_AT + len(about)] = about
        self.memory[_FIELDS_AT:_CHECKSUM_AT] = fields
        self.memory[_CHECKSUM_AT : _CHECKSUM_AT + 4] = struct.pack("<I", zlib.crc32(fields + about))
        self.memory[:8] = _MAGIC

    def validate(self) -> None:
        """The content counts."""
        self.memory[_VALID_AT : _VALID_AT + 8] = struct.pack("<Q", _VALID)

    def close(self, *, remove: bool) -> None:
        """Let the memory go as soon as nobody looks at it; ``remove``: the file too."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(_address(self.memory))
            self._pinned = False
        if remove and self.path is not None:
            self.path.unlink(missing_ok=True)


def _map_new(path: Path, capacity: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        # Without the room in advance, a full directory would show as SIGBUS in the middle of a copy.
        os.posix_fallocate(fd, 0, capacity)
        return mmap.mmap(fd, capacity, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()


def _pin(memory: mmap.mmap, capacity: int) -> bool:
    result = torch.cuda.cudart().cudaHostRegister(_address(memory), capacity, 0)
    return int(result) == 0


def json_sha256(document: bytes) -> bytes:
    """The checksum of the JSON area."""
    return hashlib.sha256(document).digest()
