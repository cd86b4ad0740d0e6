"""The copy of a rank's state that a checkpoint is made from, and its digests.

The training loop waits for this copy only. The host buffers are kept between saves: the first touch of new
memory costs several times the copy itself.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tolaria.recovery.manifest import STATE_MAX_BYTES
from tolaria.recovery.shards import LOCAL, REPLICATED, dtype_name, encode_json, tensor_bytes


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What one rank hands to a save.

    step: optimizer steps done. tensors, meta: equal on every rank (parameters, buffers, optimizer state; JSON).
    local_tensors, local_meta: this rank's own (random generators; loader position). Tensors may be on any device.
    Metadata is dicts with string keys, lists, strings, numbers, booleans and None; a tuple comes back as a list.
    branch: how many returns the run had made when it was at this step; acts: how many acts of an operator it had seen
    (recovery/timeline.py).
    """

    step: int
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]
    local_tensors: Mapping[str, Tensor]
    local_meta: Mapping[str, Any]
    branch: int = 0
    acts: int = 0


@dataclass(frozen=True)
class Staged:
    """A payload copied to host memory. Tensor names carry their prefix; they are contiguous CPU tensors."""

    step: int
    replicated: dict[str, Tensor]
    local: dict[str, Tensor]
    meta: bytes
    local_meta: bytes
    branch: int = 0
    acts: int = 0


class HostBuffers:
    """Host memory for one payload, reused as long as names, shapes and types stay the same. Local."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def stage(self, payload: Payload) -> Staged:
        """Copy a payload; overwrites what the previous call returned. Blocks until the copy is done.

        Raises ValueError or TypeError, before anything is copied, for content that cannot be stored.
        """
        meta = _encode(payload.meta, "meta")
        local_meta = _encode(payload.local_meta, "local_meta")
        sources = {f"{REPLICATED}{name}": tensor for name, tensor in payload.tensors.items()}
        own = {f"{LOCAL}{name}": tensor for name, tensor in payload.local_tensors.items()}
        for name, tensor in (sources | own).items():
            dtype_name(name, tensor)
        self._buffers = {name: self._buffer_for(name, tensor) for name, tensor in (sources | own).items()}
        self._copy(sources | own)
        return Staged(
            step=payload.step,
            replicated={name: self._buffers[name] for name in sources},
            local={name: self._buffers[name] for name in own},
            meta=meta,
            local_meta=local_meta,
            branch=payload.branch,
            acts=payload.acts,
        )

    def release(self) -> None:
        """Give the memory back."""
        self._buffers = {}

    def _buffer_for(self, name: str, source: Tensor) -> Tensor:
        old = self._buffers.get(name)
        if old is not None and old.shape == source.shape and old.dtype == source.dtype:
            return old
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)

    def _copy(self, sources: Mapping[str, Tensor]) -> None:
        devices = set()
        with torch.no_grad():
            for name, source in sources.items():
                self._buffers[name].copy_(source, non_blocking=True)
                if source.is_cuda:
                    devices.add(source.device)
        # The loop changes the sources next, so the copies must have left the device before it goes on.
        for device in devices:
            torch.cuda.current_stream(device).synchronize()


def _encode(value: Mapping[str, Any], what: str) -> bytes:
    raw = encode_json(value, what)
    if len(raw) > STATE_MAX_BYTES // 2 - 1024:
        raise ValueError(f"{what}: {len(raw)} bytes of JSON; at most {STATE_MAX_BYTES // 2 - 1024} can be saved")
    return raw


def tensor_digest(tensor: Tensor) -> bytes:
    """sha256 over type, shape and bytes of a contiguous CPU tensor."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor_bytes(tensor))
    return digest.digest()


def structure_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """sha256 over names, types and shapes, without the values."""
    lines = (f"{name} {t.dtype} {tuple(t.shape)}\n" for name, t in sorted(tensors.items()))
    return hashlib.sha256("".join(lines).encode()).digest()


def state_digest(step: int, digests: Mapping[str, bytes], meta: bytes) -> bytes:
    """sha256 over the step, the digests of the replicated tensors by name, and the replicated metadata."""
    whole = hashlib.sha256(f"step {step} meta {len(meta)}\n".encode() + meta)
    for name, digest in sorted(digests.items()):
        whole.update(f"{name}\n".encode() + digest)
    return whole.digest()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all elements together."""
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
