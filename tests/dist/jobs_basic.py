"""Jobs for test_dist.py; each runs on every rank."""

import hashlib
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.dist.jobs_resume import own_rank
from tolaria.dist import init_world
from tolaria.errors import PeerLost, ReplicaMismatch


def collectives() -> dict[str, object]:
    """Use every collective once and return what this rank saw."""
    world = init_world(device="cpu", timeout_s=20, control_timeout_s=20)
    peers = world.peers
    payload = b"decision" * 100 if world.is_coordinator else None
    mine = hashlib.sha256(str(world.global_rank).encode()).digest()
    try:
        peers.require_equal(mine, "test state")
        mismatch = ""
    except ReplicaMismatch as error:
        mismatch = str(error)
    flags = torch.tensor([world.global_rank, 7], dtype=torch.int64)
    peers.finish(peers.start_sum(flags))
    found = {
        "rank": world.global_rank,
        "generation": world.generation,
        "sum": peers.sum(torch.tensor([1.0 + world.global_rank], dtype=torch.float64)).tolist(),
        "started_sum": flags.tolist(),
        "agree_all": peers.agree(True),
        "agree_some": peers.agree(world.global_rank == 0),
        "gathered": peers.gather([world.global_rank, -1]),
        "digests": [d.hex() for d in peers.gather_digests(mine)],
        "frame": hashlib.sha256(peers.broadcast_frame(payload)).hexdigest(),
        "long": hashlib.sha256(peers.broadcast(payload * 1000 if payload else None)).hexdigest(),
        "mismatch": mismatch,
    }
    world.close()
    return found


def damaged_frame(*, times: int) -> dict[str, object]:
    """A broadcast whose first ``times`` arrivals at rank 1 have a flipped bit."""
    world = init_world(device="cpu", timeout_s=20, control_timeout_s=20)
    broadcast, arrivals = dist.broadcast, []

    def flipping(tensor: torch.Tensor, src: int, group: dist.ProcessGroup) -> None:
        broadcast(tensor, src=src, group=group)
        arrivals.append(tensor.numel())
        if own_rank() == 1 and len(arrivals) <= times:
            tensor[40] ^= 1

    try:
        with patch.object(dist, "broadcast", flipping):
            seen = world.peers.broadcast_frame(b"decision" if world.is_coordinator else None).decode()
    except PeerLost as error:
        seen = str(error)
    world.close()
    return {"seen": seen, "arrivals": len(arrivals)}
