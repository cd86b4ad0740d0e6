"""What makes two states the same: names, shapes and types of their tensors, and a digest of all that they hold.

digest_of        sha256 of everything, on the host: what a run ends with, for whoever compares two runs
tensor_hashes    64 bits of each tensor, on its device: what ranks compare while they train, and what memory is
                 checked by
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from tolaria.errors import CheckpointMismatch

# Rows of half a megabyte of products stay in the cache: 4.1 to 5.7 GB/s on one core; rows of 16 KiB give 1.9.
_ROW = 65536
# Smaller tensors are hashed all in one go: one by one they cost 6 microseconds each, mostly of calls.
_SMALL = 8192
_ROWS_ON_DEVICE = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16}


def check_same(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise CheckpointMismatch unless both have the same names, and under each the same shape and type."""
    if own.keys() != saved.keys():
        missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        raise CheckpointMismatch(f"tensors missing in the checkpoint: {missing[:5]}; unknown here: {extra[:5]}")
    for name, tensor in own.items():
        other = saved[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            raise CheckpointMismatch(
                f"tensor {name!r}: {other.dtype} {tuple(other.shape)} saved, {tensor.dtype} {tuple(tensor.shape)} here"
            )


def digest_of(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """sha256 over names, types, shapes and bytes of the tensors, and the JSON. Reads every tensor once."""
    whole = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.digest()


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A fast hash of the bits of each tensor, a signed 64-bit integer; computed where the tensor is.

    Every flipped bit changes it. So do several, and elements that change places, but for chances of 2^-32: products
    of 32-bit words and fixed odd factors, one for each place in a row, are added up modulo 2^64. (An exclusive or of
    all words, `torch.hash_tensor`, is no faster from memory and blind to two equal changes.) Waits for the device, once
    for each that holds some of the tensors.
    """
    found: dict[str, int] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        found |= _hashed({name: _words(t) for name, t in tensors.items() if t.device == device}, device)
    return {name: found[name] for name in tensors}


def tensor_hash(tensor: Tensor) -> int:
    """`tensor_hashes` of one."""
    return tensor_hashes({"": tensor})[""]


def _words(tensor: Tensor) -> Tensor:
    """The bits in logical order, (n,), as integers of 32 bits or, of narrower types, of one element each."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_INTEGERS.get(flat.element_size(), torch.int32))


def _hashed(words: Mapping[str, Tensor], device: torch.device) -> dict[str, int]:
    small = [name for name, w in words.items() if w.numel() <= _SMALL]
    rows = {name: _sums_of_rows(w) for name, w in words.items() if w.numel() > _SMALL}
    read = iter(torch.cat([_sums_of_small([words[name] for name in small], device), *rows.values()]).tolist())
    found = dict(zip(small, read, strict=False))
    return found | {name: _mixed(list(islice(read, len(sums)))) for name, sums in rows.items()}


def _sums_of_small(words: Sequence[Tensor], device: torch.device) -> Tensor:
    """(len(words),) int64: the hash of each."""
    lengths = [w.numel() for w in words]
    factors = _factors(device)
    if not sum(lengths):
        return torch.zeros(len(words), dtype=torch.int64, device=device)
    products = torch.cat(list(words)).long() * torch.cat([factors[:length] for length in lengths])
    running = torch.cat([products.new_zeros(1), products.cumsum(0)])
    # The ends travel to the device without waiting for it; sums modulo 2^64 may be taken as differences.
    ends = running[torch.tensor([0, *accumulate(lengths)]).to(device, non_blocking=True)]
    return ends[1:] - ends[:-1]


def _sums_of_rows(words: Tensor) -> Tensor:
    """(rows,) int64: one sum for each row of `_ROW` words, the last of which may be shorter."""
    factors, whole = _factors(words.device), words.numel() // _ROW * _ROW
    rows = words[:whole].view(-1, _ROW)
    if words.is_cuda:
        # No product of integer matrices there; a few rows at a time, since the products are larger than the words.
        found = [(part.long() * factors).sum(1) for part in rows.split(_ROWS_ON_DEVICE)]
    else:
        # New memory for the products of each row would cost more than the products.
        wide = torch.empty(_ROW, dtype=torch.int64)
        found = [torch.dot(wide.copy_(row), factors)[None] for row in rows.unbind()]
    rest = words[whole:].long()
    return torch.cat([*found, (rest * factors[: len(rest)]).sum()[None]])


def _mixed(sums: Sequence[int]) -> int:
    digest = hashlib.blake2b(struct.pack(f"<{len(sums)}q", *sums), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0x7061_7269_7479)
    return (torch.randint(-(2**63), 2**63 - 1, (_ROW,), generator=generator) | 1).to(device)
