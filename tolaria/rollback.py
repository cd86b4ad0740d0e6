"""How a run goes back: from a snapshot in memory within half a second, or from a checkpoint.

fast      PREPARE  do all ranks hold the same snapshot? the return is written to the log    deadline 150 ms
          COMMIT   copied into the tensors that are there; seeds, groups, LR, RNG           deadline 250 ms
          CONFIRM  hash of the live state = hash of the snapshot, on all ranks              deadline 100 ms
durable   every hash of the checkpoint verified on fresh tensors -> the return is logged -> swapped in -> compared

Everything runs in the training thread, so nothing is left behind when a deadline passes: the copy stops between two
pieces, and the durable tier overwrites whatever it had done. Before the log says so, nothing is touched.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tolaria.config_recovery import RecoveryConfig
from tolaria.dist import World
from tolaria.errors import CheckpointMismatch, TaskError, WalError
from tolaria.objective import Batch
from tolaria.recovery.checkpoint import Accept, Loaded, load_newest
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.journal import Journal
from tolaria.recovery.snapshots import Snapshot, SnapshotInfo, SnapshotRing, copy_back
from tolaria.recovery.timeline import Return
from tolaria.replica import Replica
from tolaria.state import TrainState
from tolaria.streams import load_rng_tensors
from tolaria.telemetry.events import EventLog

MakeReturn = Callable[[int, Mapping[str, Any]], Return]
"""From the step and the meta of the state that is gone back to."""


class _DeadlineMissed(Exception):
    pass


@dataclass(frozen=True, kw_only=True)
class Restored:
    """An earlier state that is in force again on every rank. ``source``: the snapshot or checkpoint, for people.

    ``local_meta``: what this rank had saved as its own; None from a run of another size. ``milliseconds`` by phase.
    """

    taken: Return
    source: str
    branch: int
    local_meta: dict[str, Any] | None
    first_meta: dict[str, Any]
    milliseconds: dict[str, float] = field(default_factory=dict)


class Rollback:
    """Restores earlier states. Every method is collective; all ranks call it at the same step with the same target."""

    def __init__(
        self,
        state: TrainState,
        replica: Replica,
        world: World,
        config: RecoveryConfig,
        events: EventLog,
        *,
        ring: SnapshotRing,
        journal: Journal,
        checkpoints: Path,
        sample: Callable[[int], Batch],
    ) -> None:
        self.state = state
        self.replica = replica
        self.world = world
        self.config = config
        self.events = events
        self.ring = ring
        self.journal = journal
        self._checkpoints = checkpoints
        self._sample = sample

    def fast(self, target: SnapshotInfo | None, make_return: MakeReturn) -> Restored | None:
        """Go back to a snapshot; None when that failed on any rank, and the durable tier has to do it.

        Blocks for the three deadlines, and longer only for the compile of a structure not seen before. Raises PeerLost,
        WalError on all ranks.
        """
        spent: dict[str, float] = {}
        clock = _Clock(spent)
        snapshot = self.ring.get(target.seq) if target is not None else None
        held = [*_position(target), int.from_bytes(target.digest[:7], "big")] if target is not None else [-1] * 4
        rows = self.world.peers.gather(held)
        if snapshot is None or target is None or any(row != rows[0] for row in rows):
            return None
        taken = make_return(target.step, snapshot.meta)
        self._log(taken)
        failure = clock.over("prepare", self.config.prepare_ms)
        if not failure:
            failure = self._copy(snapshot, clock)
        if not self.world.peers.agree(not failure):
            self._tell_failed("commit", failure)
            return None
        digest = self.ring.live_digest(self.state.tensors(), self.state.meta())
        sound = all(seen == target.digest for seen in self.world.peers.gather_digests(digest))
        clock.over("confirm", self.config.confirm_ms)
        if not sound:
            self._tell_failed("confirm", "the restored state is not the snapshot's")
            return None
        self.replica.warm_up(self._sample)
        self.ring.drop_after(target.step, target.seq)
        return Restored(
            taken=taken, source=f"snapshot of step {target.step}", branch=target.branch, milliseconds=spent,
            local_meta=snapshot.local_meta, first_meta=snapshot.local_meta,
        )  # fmt: skip

    def _copy(self, snapshot: Snapshot, clock: "_Clock") -> str:
        end = time.monotonic() + self.config.commit_ms / 1e3

        def copy(source: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
            if not copy_back(source, live, lambda: time.monotonic() > end):
                raise _DeadlineMissed(f"the copy took longer than {self.config.commit_ms} ms (recovery.commit_ms)")

        failure = ""
        try:
            self._swap_in(snapshot.tensors, snapshot.meta, snapshot.local_tensors, copy=copy)
        except (_DeadlineMissed, CheckpointMismatch, TaskError, RuntimeError) as error:
            failure = f"{type(error).__name__}: {error}"
        clock.over("commit", self.config.commit_ms)
        return failure

    def durable(self, accepts: Accept, make_return: MakeReturn) -> Restored | None:
        """Go back to the newest sound checkpoint that ``accepts`` (asked on rank 0); None if there is none.

        Blocks for reading and hashing it. No save may be in flight. Raises CheckpointError, PeerLost, WalError.
        """
        start = time.perf_counter()
        loaded = load_newest(
            self._checkpoints, self.world.peers, FileOps(), accept=accepts, known=self.journal.known_manifests,
            report=lambda kind, details: self.events.emit(kind, "error", **details), allow_fresh=True,
        )  # fmt: skip
        if loaded is None:
            return None
        taken = make_return(loaded.step, loaded.meta)
        self._log(taken)
        read = time.perf_counter()
        self._swap_in(loaded.tensors, loaded.meta, loaded.local_tensors)
        live = self.ring.live_digest(self.state.tensors(), self.state.meta())
        self.world.peers.require_equal(live, "the state after going back")
        self.replica.warm_up(self._sample)
        self.ring.drop_after(loaded.step)
        spent = {"read": (read - start) * 1e3, "swap": (time.perf_counter() - read) * 1e3}
        return Restored(
            taken=taken, source=_name(loaded), branch=loaded.branch, local_meta=loaded.local_meta,
            first_meta=loaded.first_meta, milliseconds=spent,
        )  # fmt: skip

    def _swap_in(
        self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], local: Mapping[str, Tensor] | None, **how: Any
    ) -> None:
        for group in self.state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self.state.load(tensors, meta, **how):
            self.replica.rebuild(afresh=True)
        if local is not None:
            load_rng_tensors(local, self.world.device)

    def _log(self, taken: Return) -> None:
        """The return becomes durable before anything is touched; all ranks know of it, or none goes on."""
        failure = ""
        try:
            self.journal.went_back(taken)
        except WalError as error:
            failure = str(error)
        if not self.world.peers.agree(not failure):
            raise WalError(failure or "rank 0 cannot write its log; nothing was restored")

    def _tell_failed(self, phase: str, reason: str) -> None:
        self.events.emit("fast_return_failed", "error", phase=phase, reason=reason or "on another rank")


class _Clock:
    """Notes how long each phase took."""

    def __init__(self, spent: dict[str, float]) -> None:
        self._spent = spent
        self._since = time.perf_counter()

    def over(self, phase: str, limit_ms: float) -> str:
        """End a phase; the reason if it took longer than its limit, else nothing."""
        now = time.perf_counter()
        self._spent[phase] = (now - self._since) * 1e3
        self._since = now
        late = self._spent[phase] > limit_ms
        return f"{phase} took {self._spent[phase]:.0f} ms where {limit_ms:g} ms are allowed" if late else ""


def _position(info: SnapshotInfo) -> list[int]:
    return [info.seq, info.step, info.branch]


def _name(loaded: Loaded) -> str:
    return f"checkpoint {loaded.path.name}"
