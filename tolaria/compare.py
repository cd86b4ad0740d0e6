"""What makes two states the same: names, shapes and types of their tensors, and a digest of all that they hold."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tolaria.errors import CheckpointMismatch


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
