"""The random streams of this process: read, put back, and begun so that ranks differ."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolaria.errors import CheckpointMismatch


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's random generators: torch (CPU and device), numpy, Python."""
    numpy_state: Any = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    found = {
        "rng/torch": torch.get_rng_state(),
        "rng/numpy_keys": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "rng/numpy_rest": torch.tensor([numpy_state[2], numpy_state[3], numpy_state[4]], dtype=torch.float64),
        "rng/python": torch.tensor([version, *internal], dtype=torch.int64),
        "rng/python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        found["rng/cuda"] = torch.cuda.get_rng_state(device)
    return found


def load_rng_tensors(saved: Mapping[str, Tensor], device: torch.device) -> None:
    """Take over what `rng_tensors` gave. Raises CheckpointMismatch when a generator is missing."""
    missing = rng_tensors(device).keys() - saved.keys()
    if missing:
        raise CheckpointMismatch(f"random generators missing in the checkpoint: {sorted(missing)}")
    torch.set_rng_state(saved["rng/torch"])
    position, has_gauss, cached = saved["rng/numpy_rest"].tolist()
    keys = saved["rng/numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, *internal = saved["rng/python"].tolist()
    gauss = saved["rng/python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved["rng/cuda"], device)


def seed_rank(run_seed: int, step: int, rank: int) -> None:
    """Seed this rank's generators for the time after ``step``: ranks differ, so that their dropout does."""
    digest = hashlib.sha256(f"{run_seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    np.random.seed(int.from_bytes(digest[8:12], "big"))
    random.seed(digest[12:])
