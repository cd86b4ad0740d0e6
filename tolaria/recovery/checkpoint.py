"""Durable checkpoints: what the rest of Tolaria uses of them.

    RUN/ckpt/c<seq>-s<step>/
        shard-00000.safetensors   this rank's share of the replicated tensors, and its own tensors
        state-00000.json          its own metadata; rank 0's also the replicated metadata
        ... one pair per rank
        MANIFEST.json             size and sha256 of every file, step, world size, digest of the state

A folder is written once under a temporary name and becomes a checkpoint by its rename (`commit`); ``seq`` grows by
one for ever, also across rollbacks and restarts. Any number of ranks may load the tensors; what belongs to one
rank comes back only to a run of the same size.
"""

from tolaria.recovery.reader import Accept, Loaded, accept_all, load_newest, load_path
from tolaria.recovery.retain import Retention, sweep
from tolaria.recovery.staging import Payload
from tolaria.recovery.writer import CheckpointWriter, SaveOutcome

__all__ = [
    "Accept",
    "CheckpointWriter",
    "Loaded",
    "Payload",
    "Retention",
    "SaveOutcome",
    "accept_all",
    "load_newest",
    "load_path",
    "sweep",
]
