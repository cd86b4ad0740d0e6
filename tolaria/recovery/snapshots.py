"""Snapshots: copies of a rank's state in memory, a few at a time, to go back to within milliseconds.

They lie in files of /dev/shm, so that they outlive the process: a start on the same machine goes on from the newest
that all ranks have (recovery/leftovers.py). A snapshot counts only once every rank has said that its own is equal.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tolaria.compare import tensor_hashes
from tolaria.recovery.arena import PAGE_BYTES, Arena, Header, Place, arena_path, json_sha256, places, table, view
from tolaria.recovery.shards import LOCAL, REPLICATED, encode_json
from tolaria.recovery.staging import Payload

PIECE_BYTES = 64 * 1024 * 1024
# Room for metadata to grow without a new mapping.
SPARE_BYTES = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class SnapshotInfo:
    """Which state a snapshot is. ``digest``: of the replicated part, equal on equal ranks; ``acts``: it has seen."""

    seq: int
    step: int
    branch: int
    generation: str
    digest: bytes
    acts: int = 0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state in memory. Tensors are views into it: valid until the ring overwrites them."""

    info: SnapshotInfo
    tensors: Mapping[str, Tensor]
    meta: dict[str, Any]
    local_tensors: Mapping[str, Tensor]
    local_meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A snapshot that is not confirmed yet. ``hashes``: of the replicated tensors by name."""

    info: SnapshotInfo
    hashes: dict[str, int]


@dataclass
class _Slot:
    arena: Arena
    places: dict[str, Place]
    info: SnapshotInfo | None = None
    confirmed: bool = False
    document: bytes = b""
    tensor_bytes: int = 0

    def views(self) -> dict[str, Tensor]:
        return {name: view(self.arena.memory, PAGE_BYTES, place) for name, place in self.places.items()}


APART = 5
"""Number of the slot that the ring does not go round by; the others are below."""


class SnapshotRing:
    """The snapshots of one rank. Training thread only; nothing here is collective.

    limit_bytes: of all slots together. ``survives``: they lie in ``directory``. ``disabled``: why there are none.
    """

    def __init__(
        self, *, run_id: str, generation: str, rank: int, run_dir: Path, slots: int, limit_bytes: int, directory: Path,
        pinned: bool,
    ) -> None:  # fmt: skip
        self.run_id = run_id
        self.generation = generation
        self.directory = directory
        self.survives = True
        self.disabled = ""
        self._rank = rank
        self._about = {"run": run_id, "dir": str(run_dir), "pid": os.getpid()}
        self._wanted = slots
        self._limit_bytes = limit_bytes
        self._pinned = pinned
        self._slots: dict[int, _Slot] = {}
        self._seq = 0

    def take(self, payload: Payload, *, apart: bool = False) -> Taken | None:
        """Copy a state into the oldest slot and hash it; it counts after `confirm`. None when there is no room for it.

        ``apart``: into a slot of its own, which only the next such snapshot overwrites; where there is no room for one
        more, into the oldest like any other.
        Blocks for the copy and one read of it. Raises ValueError or TypeError for content that cannot be stored.
        """
        meta, local_meta = encode_json(payload.meta, "meta"), encode_json(payload.local_meta, "local_meta")
        sources = {REPLICATED + name: tensor.detach() for name, tensor in payload.tensors.items()}
        sources |= {LOCAL + name: tensor.detach() for name, tensor in payload.local_tensors.items()}
        found, tensor_bytes = places(sources)
        rows_bytes = 160 * len(found) + sum(map(len, found))
        needed = PAGE_BYTES + tensor_bytes + len(meta) + len(local_meta) + rows_bytes + 1024
        slot = self._slot(found, needed, apart=apart)
        if slot is None:
            return None
        slot.arena.invalidate()
        slot.info, slot.confirmed = None, False
        views = slot.views()
        _copy(sources, views)
        hashes = tensor_hashes(views)
        own = {name.removeprefix(REPLICATED): hashes[name] for name in found if name.startswith(REPLICATED)}
        digest = _digest(payload.tensors, own, payload.meta)
        rows = json.dumps(table(found, hashes)).encode()
        slot.document = b'{"meta":' + meta + b',"local_meta":' + local_meta + b',"tensors":' + rows + b"}"
        slot.tensor_bytes = tensor_bytes
        self._seq += 1
        slot.info = SnapshotInfo(
            seq=self._seq,
            step=payload.step,
            branch=payload.branch,
            generation=self.generation,
            digest=digest,
            acts=payload.acts,
        )
        slot.arena.write(
            Header(
                seq=self._seq, step=payload.step, branch=payload.branch, tensor_bytes=tensor_bytes,
                json_bytes=len(slot.document), digest=digest, json_sha256=json_sha256(slot.document),
                about={"acts": payload.acts},
                valid=False,
            ),
            slot.document,
        )  # fmt: skip
        return Taken(info=slot.info, hashes=own)

    def confirm(self, seq: int) -> None:
        """The snapshot is equal on all ranks: it counts."""
        slot, _ = self._of(seq)
        slot.arena.validate()
        slot.confirmed = True

    def drop(self, seq: int) -> None:
        """The snapshot counts for nothing."""
        slot, _ = self._of(seq)
        slot.arena.invalidate()
        slot.info, slot.confirmed = None, False

    def held(self) -> list[SnapshotInfo]:
        """Those that count, newest last."""
        return sorted((s.info for s in self._slots.values() if s.info and s.confirmed), key=lambda info: info.seq)

    def get(self, seq: int) -> Snapshot:
        """A snapshot that was taken. Raises KeyError when there is none of this number."""
        slot, info = self._of(seq)
        return snapshot_of(info, slot.views(), json.loads(slot.document))

    def verify(self, seq: int) -> bool:
        """Whether its tensors still have the hashes they were taken with. Reads them once."""
        slot, _ = self._of(seq)
        hashes = {row[0]: row[4] for row in json.loads(slot.document)["tensors"]}
        return tensor_hashes(slot.views()) == hashes

    def live_digest(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
        """What the digest of a snapshot of this state would be. Reads every tensor once."""
        return _digest(tensors, tensor_hashes(tensors), meta)

    def drop_after(self, step: int, seq: int | None = None) -> None:
        """The run went back to ``step``, to the snapshot ``seq`` where it is one: what was taken later is void."""
        for info in self.held():
            if info.step > step or (seq is not None and info.seq > seq):
                self.drop(info.seq)

    def close(self, *, remove: bool) -> None:
        """Let the memory go; ``remove``: the files too. Twice does no harm."""
        for slot in self._slots.values():
            slot.arena.close(remove=remove)
        self._slots = {}

    def _of(self, seq: int) -> tuple[_Slot, SnapshotInfo]:
        for slot in self._slots.values():
            if slot.info is not None and slot.info.seq == seq:
                return slot, slot.info
        raise KeyError(f"no snapshot {seq}; held: {[info.seq for info in self.held()]}")

    def _slot(self, found: dict[str, Place], needed: int, *, apart: bool) -> _Slot | None:
        """The slot to overwrite: an empty one, else the oldest; made anew if it is too small."""
        count = min(self._wanted, self._limit_bytes // needed)
        if not count:
            self.disabled = f"a snapshot of {needed} bytes does not fit into {self._limit_bytes} bytes"
            return None
        one_more = self._limit_bytes // needed > count
        for number in [n for n in self._slots if n >= count and not (n == APART and one_more)]:
            self._slots.pop(number).arena.close(remove=True)
        number = APART if apart and one_more else min(range(count), key=self._age)
        old = self._slots.get(number)
        if old is None or old.arena.capacity < needed:
            if old is not None:
                del self._slots[number]
                old.arena.close(remove=True)
            self._slots[number] = _Slot(self._arena(number, needed + SPARE_BYTES), found)
        self._slots[number].places = found
        self.disabled = ""
        return self._slots[number]

    def _age(self, number: int) -> int:
        slot = self._slots.get(number)
        return slot.info.seq if slot is not None and slot.info is not None and slot.confirmed else -1

    def _arena(self, number: int, capacity: int) -> Arena:
        if self.survives:
            path = arena_path(self.directory, self.run_id, self.generation, self._rank, number)
            try:
                return Arena(capacity, path, self._about, pinned=self._pinned)
            except OSError as error:
                self.survives = False
                self.disabled = f"{path}: {error.strerror}; snapshots do not outlive this process"
        return Arena(capacity, None, self._about, pinned=self._pinned)


def snapshot_of(info: SnapshotInfo, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> Snapshot:
    """A snapshot from its tensors and its JSON."""
    return Snapshot(
        info=info,
        tensors={n.removeprefix(REPLICATED): t for n, t in tensors.items() if n.startswith(REPLICATED)},
        meta=document["meta"],
        local_tensors={n.removeprefix(LOCAL): t for n, t in tensors.items() if n.startswith(LOCAL)},
        local_meta=document["local_meta"],
    )


def copy_back(source: Mapping[str, Tensor], live: Mapping[str, Tensor], late: Callable[[], bool]) -> bool:
    """Copy tensors over those of the same names, in pieces; False, half done, when it was ``late()`` between two."""
    for names in _pieces(live):
        if late():
            return False
        _copy({name: source[name] for name in names}, {name: live[name] for name in names})
    return True


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    piece: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        piece.append(name)
        size += tensor.nbytes
        if size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _copy(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_([targets[name] for name in sources], list(sources.values()), non_blocking=True)
    # What comes next changes the sources, so the copies must have left the device.
    for device in {t.device for t in (*sources.values(), *targets.values()) if t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _digest(tensors: Mapping[str, Tensor], hashes: Mapping[str, int], meta: Mapping[str, Any]) -> bytes:
    whole = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{hashes[name]}|".encode())
    return whole.digest()
