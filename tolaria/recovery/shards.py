"""The two files that each rank puts into a checkpoint: tensors in safetensors form, the rest as JSON.

Writing streams the staged tensors behind a header of our own making, reading leaves them where the file was read to:
the library would build a second copy of the whole shard in memory either way, or open the file itself, unverified.
"""

import heapq
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from tolaria.errors import CheckpointError
from tolaria.recovery.manifest import FORMAT

REPLICATED = "replicated/"
LOCAL = "local/"
HEADER_MAX_BYTES = 16 * 1024 * 1024
_LENGTH = struct.Struct("<Q")
_TENSOR_NAME = re.compile(r"[\x21-\x7e]{1,512}", re.ASCII)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_Count = Annotated[int, Field(ge=0, lt=2**48)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    dtype: str
    shape: Annotated[list[_Count], Field(max_length=64)]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


_Table = TypeAdapter(dict[str, _Entry])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def dtype_name(name: str, tensor: Tensor) -> str:
    """The format's word for the tensor's type. Raises ValueError for a name or type that cannot be stored."""
    if not _TENSOR_NAME.fullmatch(name):
        raise ValueError(f"tensor name {name!r}: expected 1 to 512 visible ASCII characters")
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"tensor {name!r} has type {tensor.dtype}; can be saved: {', '.join(_DTYPES)}")
    return _DTYPE_NAMES[tensor.dtype]


def named_dtype(name: str) -> torch.dtype | None:
    """The type for one of the format's words, None for another word."""
    return _DTYPES.get(name)


def assign_to_ranks(tensors: Mapping[str, Tensor], world_size: int) -> list[list[str]]:
    """Which rank writes which replicated tensor: balanced by bytes, the same on every rank."""
    load = [(0, rank) for rank in range(world_size)]
    shares: list[list[str]] = [[] for _ in range(world_size)]
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        used, rank = heapq.heappop(load)
        shares[rank].append(name)
        heapq.heappush(load, (used + tensors[name].nbytes, rank))
    return shares


@dataclass(frozen=True)
class Shard:
    """A shard that is ready to be streamed: header, then the tensors in order. ``size`` in bytes."""

    header: bytes
    tensors: tuple[tuple[str, Tensor], ...]
    size: int

    def chunks(self) -> Iterator[tuple[str | None, memoryview]]:
        """The pieces of the file in order, each with its tensor's name (None: header)."""
        yield None, memoryview(self.header)
        for name, tensor in self.tensors:
            yield name, tensor_bytes(tensor)


def build_shard(tensors: Mapping[str, Tensor]) -> Shard:
    """Lay out contiguous CPU tensors as one safetensors file. Raises ValueError as `dtype_name` does."""
    # Wide types first keeps every tensor aligned to its element size.
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    table = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        table[name] = {
            "dtype": dtype_name(name, tensor),
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_MAX_BYTES:
        raise ValueError(f"{len(tensors)} tensors need a header of {len(text)} bytes; at most {HEADER_MAX_BYTES}")
    header = _LENGTH.pack(len(text)) + text
    return Shard(header, tuple((name, tensors[name]) for name in order), len(header) + offset)


def parse_shard(raw: memoryview, where: str) -> dict[str, Tensor]:
    """Tensors of a shard whose hash was verified: views into ``raw``, which they keep alive. Raises CheckpointError."""
    length = _LENGTH.unpack_from(raw)[0] if len(raw) >= _LENGTH.size else -1
    if not 0 <= length <= min(HEADER_MAX_BYTES, len(raw) - _LENGTH.size):
        raise CheckpointError(f"{where}: header of {length} bytes in a file of {len(raw)}")
    begin = _LENGTH.size + length
    try:
        table = _Table.validate_json(bytes(raw[_LENGTH.size : begin]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise CheckpointError(f"{where}: {'.'.join(str(p) for p in first['loc'])[:80]}: {first['msg']}") from error
    tensors: dict[str, Tensor] = {}
    expected = 0
    for name, entry in sorted(table.items(), key=lambda item: item[1].data_offsets):
        dtype = named_dtype(entry.dtype)
        if dtype is None or not _TENSOR_NAME.fullmatch(name):
            raise CheckpointError(f"{where}: tensor {name[:80]!r} of type {entry.dtype[:80]!r} is not accepted")
        start, end = entry.data_offsets
        count = math.prod(entry.shape)
        if start != expected or end - start != count * dtype.itemsize:
            raise CheckpointError(f"{where}: tensor {name[:80]!r} of shape {entry.shape[:8]} at bytes {start} to {end}")
        if end > len(raw) - begin:
            raise CheckpointError(f"{where}: tensor {name[:80]!r} ends behind the end of the file")
        tensors[name] = _tensor(raw[begin + start : begin + end], dtype, aligned=(begin + start) % dtype.itemsize == 0)
        tensors[name] = tensors[name].reshape(entry.shape)
        expected = end
    if begin + expected != len(raw):
        raise CheckpointError(f"{where}: {len(raw) - begin - expected} bytes belong to no tensor")
    return tensors


def _tensor(data: memoryview, dtype: torch.dtype, *, aligned: bool) -> Tensor:
    if not data:
        return torch.empty(0, dtype=dtype)
    # `build_shard` aligns everything; another writer of the format need not.
    return torch.frombuffer(data if aligned else bytearray(data), dtype=dtype)


def encode_json(value: Mapping[str, Any], what: str) -> bytes:
    """A snapshot of ``value`` as JSON, key order kept; NaN and infinities allowed.

    Raises TypeError, naming the path, for anything that would not come back as it was.
    """
    _check_json(value, what)
    return json.dumps(value, separators=(",", ":")).encode()


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a string")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"{where}: {type(value).__name__} cannot be stored as JSON")


def build_state(rank: int, seq: int, step: int, replicated: bytes | None, local: bytes) -> bytes:
    """The rank's JSON file. ``replicated`` and ``local`` are encoded already; only rank 0 stores ``replicated``."""
    head = json.dumps({"format": FORMAT, "rank": rank, "seq": seq, "step": step})[:-1].encode()
    return head + b', "replicated": ' + (replicated or b"null") + b', "local": ' + local + b"}\n"


def parse_state(raw: bytes, rank: int, seq: int, step: int, where: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(replicated, local) of a rank's JSON file whose hash was verified. Raises CheckpointError."""
    try:
        document = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON ({error})") from error
    fixed = {"format": FORMAT, "rank": rank, "seq": seq, "step": step}
    if not isinstance(document, dict) or set(document) != {*fixed, "replicated", "local"}:
        raise CheckpointError(f"{where}: not a state file")
    for key, value in fixed.items():
        if type(document[key]) is not int or document[key] != value:
            raise CheckpointError(f"{where}: {key}: expected {value}")
    replicated, local = document["replicated"], document["local"]
    if not isinstance(local, dict) or not isinstance(replicated, dict if rank == 0 else type(None)):
        raise CheckpointError(f"{where}: replicated or local state has the wrong type")
    return replicated, local
