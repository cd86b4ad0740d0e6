"""Bytes of any length in a tensor of fixed size, so that the ranks can never disagree on how much is sent. Pure.

length (4 bytes) | sha256 of the payload (32) | payload | zeros
"""

import hashlib
import struct

import torch

from tolaria.errors import PeerLost

FRAME_CAPACITY_BYTES = 65536
FRAME_ATTEMPTS = 3
_HEADER = struct.Struct("!I32s")
HEADER_BYTES = _HEADER.size


def make_frame(payload: bytes | None, capacity: int) -> torch.Tensor:
    """(capacity,) uint8: a frame that holds the payload; an empty one for None. Raises ValueError for too long ones."""
    frame = torch.zeros(capacity, dtype=torch.uint8)
    if payload is not None:
        if len(payload) > capacity - HEADER_BYTES:
            raise ValueError(f"payload of {len(payload)} bytes does not fit a frame of {capacity}")
        view = frame.numpy().data
        _HEADER.pack_into(view, 0, len(payload), hashlib.sha256(payload).digest())
        view[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    return frame


def read_frame(frame: torch.Tensor) -> bytes | None:
    """The payload; None where it is damaged."""
    view = frame.numpy().data
    length, sha = _HEADER.unpack_from(view)
    body = bytes(view[HEADER_BYTES : HEADER_BYTES + length])
    return body if hashlib.sha256(body).digest() == sha else None


def damaged_frames() -> PeerLost:
    """What to raise, on all ranks, when `FRAME_ATTEMPTS` frames in a row arrived damaged on some rank."""
    return PeerLost(f"a broadcast arrived damaged on a rank, {FRAME_ATTEMPTS} times in a row; check the network")
