"""Tiny checkpoints of one process, saved and loaded whole, for tests of what disks do to them."""

from pathlib import Path

import torch

from tolaria.dist import Peers
from tolaria.recovery.checkpoint import CheckpointWriter, Loaded, Payload, SaveOutcome, load_newest
from tolaria.recovery.fsops import FileOps

ALONE = Peers(None, 0, 1)


def payload(step: int) -> Payload:
    tensors = {"w": torch.full((64,), float(step)), "v": torch.full((3,), step, dtype=torch.int64)}
    return Payload(step=step, tensors=tensors, meta={"m": step}, local_tensors={}, local_meta={"l": step})


def save(root: Path, step: int, fs: FileOps) -> SaveOutcome:
    writer = CheckpointWriter(root, run_id="r", generation="g", peers=ALONE, fs=fs, keep=2)
    writer.save(payload(step))
    assert writer.wait(30)
    (outcome,) = writer.poll()
    return outcome


def load(root: Path, fs: FileOps | None = None) -> Loaded | None:
    return load_newest(root, ALONE, fs or FileOps(), report=lambda kind, info: None)


def require_whole(loaded: Loaded | None, steps: set[int]) -> None:
    """The loaded state is one of these, in all its parts."""
    assert loaded is not None and loaded.step in steps
    expected = payload(loaded.step)
    assert loaded.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert (loaded.meta, loaded.local_meta) == (expected.meta, expected.local_meta)
