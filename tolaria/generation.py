"""A name for this start of a run that only the live ranks share, agreed over torchrun's store."""

import secrets
import time
from collections.abc import Callable

import torch.distributed as dist

from tolaria.errors import PeerLost


def agree_on_generation(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A fresh prefix for this start, agreed by the live ranks: hello, reply, acknowledge.

    torchrun's store outlives a restart and still holds the keys of dead ranks, and its restart count is per
    node. So every process announces a random nonce; rank 0 answers each nonce it sees, also a dead one, and is
    done when the new ranks have acknowledged its own random generation.
    """
    deadline = time.monotonic() + timeout_s

    def waiting(what: str) -> None:
        if time.monotonic() > deadline:
            raise PeerLost(f"start: {what} within {timeout_s:.0f} s")
        time.sleep(0.01)

    if rank == 0:
        return _welcome(store, world_size, waiting)
    nonce = secrets.token_hex(8)
    store.set(f"tolaria/hello/{rank}", nonce)
    while not store.check([f"tolaria/reply/{nonce}"]):
        waiting("rank 0 did not answer")
    generation: str = store.get(f"tolaria/reply/{nonce}").decode()
    store.set(f"tolaria/ack/{generation}/{rank}", "1")
    return generation


def _welcome(store: dist.Store, world_size: int, waiting: Callable[[str], None]) -> str:
    """Rank 0's side of the agreement: answer every nonce until every rank has acknowledged the generation."""
    generation = secrets.token_hex(8)
    answered: dict[int, str] = {}
    pending = set(range(1, world_size))
    while pending:
        for peer in sorted(pending):
            hello = f"tolaria/hello/{peer}"
            nonce = store.get(hello).decode() if store.check([hello]) else ""
            if nonce and answered.get(peer) != nonce:
                store.set(f"tolaria/reply/{nonce}", generation)
                answered[peer] = nonce
            if store.check([f"tolaria/ack/{generation}/{peer}"]):
                pending.discard(peer)
        if pending:
            waiting(f"ranks {sorted(pending)} did not join")
    return generation
