"""The sentinel: are the replicas still equal? DDP never asks; one flipped bit on one rank goes unseen for ever.

A slice of the state, by turns over names, is hashed on every rank and compared, together with what is small: position,
learning rates, mode, scaler, stages, and how far the random generators have come. The slice follows from the step
number, so a run that goes through a step again looks at the same slice again: the rank whose tensor then differs from
what it was is the one that had gone astray. Two ranks alone cannot tell which of them is wrong.
"""

import random
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tolaria.compare import tensor_hash, tensor_hashes
from tolaria.dist import Gathering, Peers
from tolaria.optim.persist import group_options
from tolaria.state import TrainState

_RNG = "random generators"


@dataclass(frozen=True)
class Drift:
    """Replicas that differ at a step. ``what``: names of tensors, or of parts of the rest of the state.

    ``ranks``: those in the minority; empty when no majority tells.
    """

    step: int
    what: tuple[str, ...]
    ranks: tuple[int, ...]

    @property
    def reason(self) -> str:
        """In words."""
        names = ", ".join(self.what[:3]) + (f" and {len(self.what) - 3} more" if len(self.what) > 3 else "")
        whose = f"rank {', '.join(map(str, self.ranks))} differs from the others" if self.ranks else "the ranks differ"
        return f"{whose} in {names}"


class Look(NamedTuple):
    """What one rank has seen, on its way to the others: names of facts, hashes by name of tensor."""

    gathering: Gathering
    facts: list[str]
    hashes: dict[str, int]


class Sentinel:
    """Compares the ranks. Collective: every rank calls `check` at the same steps.

    ``slice_bytes``: how much of the tensors one check reads.
    """

    def __init__(self, state: TrainState, peers: Peers, *, slice_bytes: int) -> None:
        self._state = state
        self._peers = peers
        self._slice_bytes = slice_bytes
        self._watch_rng = True
        self._suspect: tuple[int, str, list[int]] | None = None

    def check(self, turn: int) -> Drift | None:
        """Compare slice number ``turn`` and all that is small; None while the ranks are equal. Two small collectives
        at most; reads the slice once."""
        return self.judge(self.look(turn))

    def look(self, turn: int) -> Look:
        """The first half of `check`: read this rank's slice, start the comparison. Does not wait for other ranks."""
        tensors = self._slice(turn)
        hashes = tensor_hashes(tensors)
        facts = {name: _hash(value) for name, value in self._facts().items()}
        facts["structure"] = _hash(list(tensors))
        row = [_hash(list(hashes.values())), *facts.values()]
        return Look(self._peers.start_gather(row), list(facts), hashes)

    def judge(self, look: Look) -> Drift | None:
        """The second half of `check`, whatever happened since: what the ranks differed in when they looked."""
        rows, facts, hashes = self._peers.finish_gather(look.gathering), look.facts, look.hashes
        if all(row == rows[0] for row in rows):
            return None
        odd = {name: [row[at] for row in rows] for at, name in enumerate(facts, 1) if len({r[at] for r in rows}) > 1}
        if "structure" not in odd and len({row[0] for row in rows}) > 1:
            values = self._peers.gather(list(hashes.values()))
            odd |= {n: [v[at] for v in values] for at, n in enumerate(hashes) if len({v[at] for v in values}) > 1}
        return self._judge(odd)

    def compare(self, hashes: dict[str, int]) -> Drift | None:
        """The same for hashes of all replicated tensors that somebody has taken already. Collective."""
        names = sorted(hashes)
        if len({row[0] for row in self._peers.gather([_hash(names)])}) > 1:
            return self._judge({"structure": []})
        values = self._peers.gather([hashes[name] for name in names] or [0])
        odd = {n: [v[at] for v in values] for at, n in enumerate(names) if len({v[at] for v in values}) > 1}
        return self._judge(odd or {"metadata": []})

    def trace(self, turn: int) -> int | None:
        """After a return, at the step where the ranks had differed: the rank that had gone astray. Local.

        None when this is not that step, or the tensor is again what some rank had on no rank.
        """
        if self._suspect is None or self._suspect[0] != self._state.step:
            return None
        _, name, seen = self._suspect
        self._suspect = None
        if name == _RNG:
            # Gone through again, they differ again: the task itself draws unequally on its ranks.
            return None
        tensor = self._state.tensors().get(name)
        right = tensor_hash(tensor) if tensor is not None else None
        wrong = [rank for rank, value in enumerate(seen) if value != right]
        return wrong[0] if len(wrong) == 1 else None

    def _judge(self, odd: dict[str, list[int]]) -> Drift | None:
        if set(odd) == {_RNG} and self._suspect is not None and self._suspect[:2] == (self._state.step, _RNG):
            # A fault would not come again when the steps are gone through again. The task draws differently per rank.
            self._watch_rng, self._suspect = False, None
            return None
        name, values = next(iter(odd.items()))
        self._suspect = (self._state.step, name, values)
        return Drift(self._state.step, tuple(odd), _minority(values))

    def _slice(self, turn: int) -> dict[str, Tensor]:
        tensors = sorted(self._state.tensors().items())
        slices: list[list[tuple[str, Tensor]]] = [[]]
        room = self._slice_bytes
        for name, tensor in tensors:
            if slices[-1] and tensor.nbytes > room:
                slices.append([])
                room = self._slice_bytes
            slices[-1].append((name, tensor))
            room -= tensor.nbytes
        return dict(slices[turn % len(slices)])

    def _facts(self) -> dict[str, Any]:
        state = self._state
        sampler = state.sampler
        facts: dict[str, Any] = {
            "position": [state.step, state.boundary, sampler.epoch, sampler.cursor, state.skipped_steps],
            "learning rates": [state.lr.lr_at(name, state.step) for name in state.lr.groups],
            "optimizer": [state.optim.name, group_options(state.optimizer, rates=False), state.tuner.state_dict()],
            "mode": [state.mode.name, state.mode.healthy, state.mode.held],
            "gradient scaler": state.scaler.state_dict(),
            "seeds": [(n, s.stage.name, s.blend_position, s.command_id) for n, s in state.kasmina.seeds.items()],
        }
        if self._watch_rng:
            facts[_RNG] = rng_positions(state.kasmina.device)
        return facts


def rng_positions(device: torch.device) -> list[int]:
    """How far this process's generators have come. Their states differ over ranks, their positions do not, as long as
    every rank draws as many numbers."""
    # torch's Mersenne twister: seed (8 bytes), numbers left and a flag (4 each), next (8), then the state itself.
    left, _, following = struct.unpack_from("<iiq", bytes(torch.get_rng_state()[8:24].tolist()))
    numpy_state: Any = np.random.get_state(legacy=True)
    found = [left, following, int(numpy_state[2]), random.getstate()[1][-1]]
    if device.type == "cuda":
        found.append(int.from_bytes(bytes(torch.cuda.get_rng_state(device)[8:16].tolist()), "little"))
    return found


def _hash(value: Any) -> int:
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest(), "big", signed=True)


def _minority(values: Sequence[int]) -> tuple[int, ...]:
    counts = Counter(values).most_common()
    if len(counts) < 2 or counts[0][1] <= len(values) / 2:
        return ()
    return tuple(rank for rank, value in enumerate(values) if value != counts[0][0])
