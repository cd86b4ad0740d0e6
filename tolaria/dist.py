"""Ranks, process groups and the few collectives that Tolaria uses.

Everything that crosses ranks outside DDP goes through `Peers`: fixed-size integer or byte tensors on a gloo
group of its own. No object collectives (they unpickle), no size that depends on one rank's data (a mismatch
aborts the other side). With one process there is no process group and each call returns at once.
"""

import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from tolaria.errors import ConfigError, PeerLost, ReplicaMismatch
from tolaria.frames import (
    FRAME_ATTEMPTS,
    FRAME_CAPACITY_BYTES,
    HEADER_BYTES,
    damaged_frames,
    make_frame,
    read_frame,
)
from tolaria.generation import agree_on_generation


@contextmanager
def _peer_errors(what: str) -> Iterator[None]:
    # torch.distributed reports a dead or silent peer as RuntimeError (DistBackendError is one).
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"{what}: another rank is gone or did not answer in time ({error})") from error


@contextmanager
def lost_peers() -> Iterator[None]:
    """What DDP and the process groups raise when another rank is gone comes out as PeerLost."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not (isinstance(error, dist.DistError) or "gloo" in text or "connection closed by peer" in text):
            raise
        what = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise PeerLost(f"lost another rank; that rank's own output says why ({what})") from error


class Gathering(NamedTuple):
    """Rows on their way, (ranks, n), to be read as a whole: row by row takes 4 us for each rank; what to wait for."""

    rows: torch.Tensor
    work: dist.Work | None

    def wait(self) -> torch.Tensor:
        """The rows when all are there. Raises PeerLost."""
        if self.work is not None:
            with _peer_errors("gather"):
                self.work.wait()
        return self.rows


class Peers:
    """The small collectives over one process group. Every method is collective: all ranks call it.

    Blocks until all ranks called it, at most the group's timeout; then, or when a rank dies, raises PeerLost.
    One instance belongs to one thread: the training thread and the checkpoint writer each have their own.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, world_size: int) -> None:
        self.group = group
        self.rank = rank
        self.world_size = world_size

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        """Reduce a CPU tensor in place over all ranks and return it."""
        if self.group is not None:
            with _peer_errors("all-reduce"):
                dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        return self.all_reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum over ranks, in place."""
        return self.all_reduce(tensor, dist.ReduceOp.MAX)

    def start_sum(self, tensor: torch.Tensor) -> dist.Work | None:
        """Start a sum of a CPU tensor over ranks; wait with `finish`. The tensor must stay untouched until then."""
        if self.group is None:
            return None
        with _peer_errors("fence"):
            work: dist.Work | None = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group, async_op=True)
            return work

    @staticmethod
    def finish(work: dist.Work | None) -> None:
        """Wait for a collective started with `start_sum`."""
        if work is not None:
            with _peer_errors("fence"):
                work.wait()

    def agree(self, ok: bool) -> bool:
        """True on all ranks if ``ok`` is true on every rank, else False on all ranks."""
        vote = torch.tensor([int(ok)], dtype=torch.int64)
        return bool(self.all_reduce(vote, dist.ReduceOp.MIN).item())

    def gather(self, row: Sequence[int]) -> list[list[int]]:
        """Every rank's row of int64 values, by rank. All rows must have one length."""
        return self.finish_gather(self.start_gather(row))

    def start_gather(self, row: Sequence[int]) -> Gathering:
        """Start to `gather`; ask for the rows with `finish_gather`."""
        return self._start_gather(torch.tensor(list(row), dtype=torch.int64))

    @staticmethod
    def finish_gather(gathering: Gathering) -> list[list[int]]:
        """Wait for the rows of a `start_gather`."""
        return gathering.wait().tolist()

    def gather_digests(self, digest: bytes) -> list[bytes]:
        """Every rank's 32-byte digest, by rank."""
        if len(digest) != 32:
            raise ValueError(f"a digest has 32 bytes, not {len(digest)}")
        mine = torch.frombuffer(bytearray(digest), dtype=torch.int64)
        whole = self._start_gather(mine).wait().numpy().tobytes()
        return [whole[start : start + 32] for start in range(0, len(whole), 32)]

    def _start_gather(self, mine: torch.Tensor) -> Gathering:
        if self.group is None:
            return Gathering(mine[None], None)
        rows = torch.empty(self.world_size, len(mine), dtype=mine.dtype)
        with _peer_errors("gather"):
            return Gathering(rows, dist.all_gather(list(rows.unbind()), mine, group=self.group, async_op=True))

    def require_equal(self, digest: bytes, what: str) -> None:
        """Raise ReplicaMismatch on every rank unless all ranks hold the same 32-byte digest."""
        digests = self.gather_digests(digest)
        if len(set(digests)) > 1:
            seen = ", ".join(f"rank {r}: {d.hex()[:12]}" for r, d in enumerate(digests))
            raise ReplicaMismatch(f"{what} differs over ranks ({seen})")

    def broadcast_frame(self, payload: bytes | None, capacity: int = FRAME_CAPACITY_BYTES) -> bytes:
        """Rank 0's bytes on every rank. Other ranks pass None.

        The frame has a fixed size, so the ranks can never disagree on it. Its sha256 is checked on arrival, and it is
        sent again to all when it arrived damaged on any; PeerLost on all ranks when that does not help.
        Raises ValueError on rank 0, before anything is sent, when the payload is too long.
        """
        for _ in range(FRAME_ATTEMPTS):
            body = self.send_frame(payload, capacity)
            if self.agree(body is not None) and body is not None:
                return body
        raise damaged_frames()

    def broadcast(self, payload: bytes | None) -> bytes:
        """Rank 0's bytes on every rank, however many. Other ranks pass None. Two frames."""
        size = len(payload) if payload is not None else 0
        told = self.broadcast_frame(struct.pack("!Q", size) if payload is not None else None, capacity=64)
        (size,) = struct.unpack("!Q", told)
        return self.broadcast_frame(payload, capacity=size + HEADER_BYTES)

    def send_frame(self, payload: bytes | None, capacity: int = FRAME_CAPACITY_BYTES) -> bytes | None:
        """One attempt of `broadcast_frame`; None where it arrived damaged.

        For those whose next collective tells anyway who got the right bytes; then, or after `FRAME_ATTEMPTS`, all send
        again or raise `damaged_frames`.
        """
        if self.group is None:
            if payload is None:
                raise ValueError("a single process must pass its own payload")
            return payload
        if self.rank == 0 and payload is None:
            raise ValueError("rank 0 must pass the payload")
        frame = make_frame(payload, capacity)
        with _peer_errors("broadcast"):
            dist.broadcast(frame, src=0, group=self.group)
        return read_frame(frame)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.agree(True)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks. ``peers`` is for the training thread, ``background`` for the writer."""

    global_rank: int
    local_rank: int
    world_size: int
    device: torch.device
    generation: str
    peers: Peers
    background: Peers
    data_group: dist.ProcessGroup | None

    @property
    def is_coordinator(self) -> bool:
        """Whether this is rank 0, which talks to the policy and decides."""
        return self.global_rank == 0

    def close(self) -> None:
        """Destroy the process groups. Local: does not wait for other ranks."""
        if self.data_group is not None:
            dist.destroy_process_group()


def _env_int(name: str) -> int:
    value = os.environ[name]
    if not value.isdigit():
        raise ConfigError(f"environment variable {name}={value!r}: expected a whole number, as torchrun sets it")
    return int(value)


def _pick_device(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"dist.device={device!r}: no CUDA device is visible; accepted here: auto, cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} visible")
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def init_world(*, device: str = "auto", timeout_s: float = 300.0, control_timeout_s: float = 300.0) -> World:
    """Join the other ranks as torchrun's environment says, or be a world of one without it.

    Collective over all ranks. ``device`` is "auto", "cpu" or "cuda"; ``timeout_s`` bounds gradient collectives,
    ``control_timeout_s`` the others. Raises PeerLost when ranks do not join in time.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        alone = Peers(None, 0, 1)
        return World(
            global_rank=0, local_rank=0, world_size=1, device=_pick_device(device, 0),
            generation=secrets.token_hex(8), peers=alone, background=alone, data_group=None,
        )  # fmt: skip
    rank, world_size = _env_int("RANK"), _env_int("WORLD_SIZE")
    local_rank = _env_int("LOCAL_RANK")
    chosen = _pick_device(device, local_rank)
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    with _peer_errors("start"):
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], _env_int("MASTER_PORT"), world_size,
            is_master=rank == 0 and not agent_has_store, timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )  # fmt: skip
        generation = agree_on_generation(store, rank, world_size, timeout_s)
        dist.init_process_group(
            backend="nccl" if chosen.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"tolaria/{generation}", store), rank=rank, world_size=world_size,
            timeout=timedelta(seconds=timeout_s), device_id=chosen if chosen.type == "cuda" else None,
        )  # fmt: skip
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=control_timeout_s))
        background = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return World(
        global_rank=rank, local_rank=local_rank, world_size=world_size, device=chosen, generation=generation,
        peers=Peers(control, rank, world_size), background=Peers(background, rank, world_size),
        data_group=dist.group.WORLD,
    )  # fmt: skip
