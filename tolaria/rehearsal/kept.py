"""The whole state of a run on this rank, kept in host memory and put back bit for bit."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tolaria.compare import tensor_hashes
from tolaria.dist import World
from tolaria.errors import CheckpointError
from tolaria.replica import Replica
from tolaria.state import TrainState
from tolaria.streams import load_rng_tensors, rng_tensors


class Kept:
    """Made between two steps. What is kept: model, seeds, optimizer, rates, position in the data, mode, scaler, random
    streams of this rank, the tally of owners. Costs one copy of the state in host memory."""

    def __init__(self, state: TrainState, replica: Replica, world: World) -> None:
        """Local; blocks for the copy. Raises MemoryError or RuntimeError when there is no room for it."""
        self._state = state
        self._replica = replica
        self._world = world
        self._tensors = {name: _copied(tensor) for name, tensor in state.tensors().items()}
        # Through text, as a checkpoint does it: what changes later must not change what was kept.
        self._meta: dict[str, Any] = json.loads(json.dumps(state.meta()))
        self._streams = {name: _copied(tensor) for name, tensor in rng_tensors(world.device).items()}
        self._tally = replica.tally.state_dict()
        self.digest = _digest(self._tensors, self._meta)

    def put_back_streams(self) -> None:
        """Only the random streams, so that both arms are measured with the same. Local."""
        load_rng_tensors(self._streams, self._world.device)

    def put_back(self) -> None:
        """All of it, in place. Collective: ranks agree that it is what it was.

        Raises CheckpointError on all ranks when it is not: the run must not go on with what it holds then.
        """
        for group in self._state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self._state.load(self._tensors, self._meta):
            self._replica.rebuild(afresh=True)
        self._replica.tally.load_state_dict(self._tally)
        self.put_back_streams()
        same = _digest(self._state.tensors(), self._state.meta()) == self.digest
        if not self._world.peers.agree(same):
            raise CheckpointError(
                "after a rehearsal the state is not what it was before; a restart goes on from the last good one"
            )


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    rows = [[n, str(t.dtype), list(t.shape), h] for (n, t), h in zip(tensors.items(), _hashes(tensors), strict=True)]
    return hashlib.sha256(json.dumps([sorted(rows), meta], sort_keys=True).encode()).hexdigest()


def _hashes(tensors: Mapping[str, Tensor]) -> list[int]:
    with torch.no_grad():
        return list(tensor_hashes(tensors).values())
