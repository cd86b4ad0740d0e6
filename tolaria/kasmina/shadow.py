"""The shadow branch: how a TRAINING seed learns on the loss the model would have with it, without the host noticing.

A twin of the whole objective shares every storage with the host, but as detached tensors, and has the seed in full in
its slot. Its forward builds no graph before the slot, its backward reaches the seed's parameters only. The host's
graph, gradients and random streams are those of a run without the seed, whatever the seed computes.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tolaria.kasmina.seed import Seed
from tolaria.kasmina.slot import Active, Slot


def make_twin(objective: nn.Module, slots_of: str, seed: Seed, blend: str) -> nn.Module:
    """A second module tree over the storages of ``objective``, with ``seed`` at alpha 1 in its slot.

    Parameters become detached aliases (an in-place update of the host shows at once); alphas of other seeds are
    shared; other buffers are copies, so that running statistics advance once per batch in the host (bring them up to
    date with `refresh_buffers`). ``slots_of`` is the attribute of ``objective`` that holds its slots by index; the
    seed's own module is the same object in both.
    """
    if seed.module is None:
        raise ValueError(f"slot {seed.slot!r} holds no seed")
    memo: dict[int, object] = {id(p): p.detach() for p in objective.parameters()}
    memo[id(seed.module)] = seed.module
    if seed.seam is not None:
        # The twin's own loss is not weighted, so there is nothing to take off.
        memo[id(seed.seam)] = torch.ones_like(seed.seam)
    for name, buffer in objective.named_buffers():
        if name.endswith(".form.alpha"):
            memo[id(buffer)] = buffer
    twin = copy.deepcopy(objective, memo)
    slots: nn.ModuleList = getattr(twin, slots_of)
    for slot in slots:
        if isinstance(slot, Slot) and slot.name == seed.slot:
            slot.form = Active(seed.module, blend)
            return twin
    raise ValueError(f"slot {seed.slot!r} is not among the objective's slots")


def refresh_buffers(twin: nn.Module, objective: nn.Module) -> None:
    """Give the twin the host's present buffers before it runs.

    What it made of its copies would be a memory that no checkpoint holds and that differs over ranks.
    """
    host = dict(objective.named_buffers())
    pairs = [(b, host[name]) for name, b in twin.named_buffers() if name in host and host[name] is not b]
    if pairs:
        copies, originals = zip(*pairs, strict=True)
        torch._foreach_copy_(copies, originals)


@contextmanager
def random_streams_kept(device: torch.device) -> Iterator[None]:
    """Restore the CPU's and the device's generator afterwards, so that dropout in the host draws what it would."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        yield


def average_gradients(seeds: Sequence[Seed], group: "torch.distributed.ProcessGroup | None", world_size: int) -> None:
    """Average the gradients of shadow seeds over ranks in one collective of their own. All ranks call it.

    A buffer apart from DDP's keeps the host's gradients bit-equal to those without a seed on any number of ranks.
    """
    gradients = [p.grad for s in seeds for p in s.named_parameters().values() if p.grad is not None]
    if group is None or not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    torch.distributed.all_reduce(flat, group=group)
    flat /= world_size
    pieces: Sequence[Tensor] = flat.split([g.numel() for g in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))
