"""Coming back: from an incident to an earlier state that the run goes on from, or to the decision to give up.

    how often lately?      more often: further back, then conservative mode, then stop with a report
    where to?              a snapshot in memory, or the newest good checkpoint
    what else?             samples left out, conservative mode, learning rate warmed up again
    -> tolaria/rollback.py restores; the log knows of it before anything is touched

What a return decides takes effect at the step it goes to, also when a later start comes by that step again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from tolaria.config_recovery import RecoveryConfig
from tolaria.data import Window
from tolaria.dist import World
from tolaria.errors import CheckpointError, TrainingUnstable
from tolaria.guard import CONSERVATIVE, Guard
from tolaria.mode import Hand, Mode
from tolaria.recovery.autopilot import ASKED_FOR, Attempt, Incident, plan_attempt, same_place
from tolaria.recovery.checkpoint import Accept, Payload
from tolaria.recovery.journal import Journal
from tolaria.recovery.leftovers import sweep
from tolaria.recovery.snapshots import SnapshotInfo, SnapshotRing
from tolaria.recovery.timeline import Return, made, on_timeline
from tolaria.rollback import MakeReturn, Restored, Rollback
from tolaria.state import HAND, TrainState
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.summary import IncidentRecord


@dataclass(frozen=True, kw_only=True)
class CameBack:
    """What the loop has to know of a return: what this rank had saved as its own, whether the epoch ended by it.

    ``text``: for people.
    """

    local_meta: Mapping[str, Any] | None
    first_meta: Mapping[str, Any]
    epoch_ended: bool
    text: str


class Comeback:
    """One per rank, called by the loop. ``branch``: the number of the course that the run is on."""

    def __init__(
        self,
        config: RecoveryConfig,
        state: TrainState,
        world: World,
        events: EventLog,
        *,
        guard: Guard,
        rollback: Rollback,
        ring: SnapshotRing,
        journal: Journal,
        branch: int = 0,
    ) -> None:
        self.config = config
        self.state = state
        self.world = world
        self.events = events
        self.guard = guard
        self.rollback = rollback
        self.ring = ring
        self.journal = journal
        self.branch = events.branch = branch
        self._ahead = journal.ahead(branch, state.step)
        self._spent: dict[int, tuple[str, float]] = {}
        self._gave_up: list[IncidentRecord] = []

    def go_back(self, incident: Incident) -> CameBack | None:
        """Return to an earlier state. Collective; no save may be in flight. None when a command asked for a checkpoint
        that turns out to be damaged: nothing has changed then.

        Raises TrainingUnstable when it came to this too often, CheckpointError when there is nothing to go back to.
        """
        earlier = [r.from_step for r in made(self.journal.returns) if r.cause not in ASKED_FOR]
        attempt = Attempt() if incident.cause in ASKED_FOR else plan_attempt(incident, earlier, self.config)
        if attempt.stop:
            self._give_up(incident, attempt.stop)
        if incident.windows:
            incident = self.guard.widened(incident, same_place(incident, earlier, self.config))
        self.events.emit(
            "incident", "error", cause=incident.cause, emergency_level=incident.level, reason=incident.reason,
            first=incident.first, samples=self.state.sampler.samples(incident.windows),
        )  # fmt: skip
        restored = self._restore(incident, attempt)
        if restored is not None:
            return self._resume(incident, restored)
        if incident.cause in ASKED_FOR:
            self.events.emit("return_failed", "error", reason="the state asked for is damaged or gone")
            return None
        raise CheckpointError(f"{incident.reason}; there is no snapshot and no checkpoint to go back to")

    def _give_up(self, incident: Incident, reason: str) -> NoReturn:
        self._gave_up.append(
            IncidentRecord(step=incident.step, cause=incident.cause, level=incident.level, reason=reason)
        )
        self.events.emit("gave_up", "critical", cause=incident.cause, reason=reason)
        raise TrainingUnstable(reason)

    def _restore(self, incident: Incident, attempt: Attempt) -> Restored | None:
        """From memory or from the disk, whichever suits the incident, else from the other."""
        make_return = self._maker(incident, attempt)
        if incident.checkpoint is not None:
            return self.rollback.durable(self._accepts(incident), make_return)
        if incident.level >= CONSERVATIVE or incident.cause in ("drift", "undo"):
            found = self.rollback.fast(self._pick(incident, attempt.older), make_return)
            return found or self.rollback.durable(self._accepts(incident), make_return)
        found = self.rollback.durable(self._accepts(incident), make_return)
        return found or self.rollback.fast(self._pick(incident, attempt.older), make_return)

    def _maker(self, incident: Incident, attempt: Attempt) -> MakeReturn:
        left_out = {window for taken in self.journal.returns for window in taken.skip}
        skip = tuple(sorted({*self.state.sampler.skipped, *left_out, *incident.windows}))
        spike = incident.cause in ("loss_spike", "non_finite")
        before_it = self.journal.branch

        def make_return(step: int, meta: Mapping[str, Any]) -> Return:
            return Return(
                branch=self.journal.branch + 1,
                # The fast way has written its return down, and then it failed.
                instead_of=self.journal.branch if self.journal.branch > before_it else 0,
                to_step=step, to_boundary=int(meta["boundary"]), from_step=incident.step,
                to_acts=Hand(**meta.get(HAND, {})).acts, paused=self.state.hand.paused,
                at_boundary=self.state.boundary, level=incident.level, cause=incident.cause, reason=incident.reason,
                skip=skip, conservative=incident.level >= CONSERVATIVE or attempt.held, held=attempt.held,
                rewarm=self.config.rewarm_steps if spike else 0,
            )  # fmt: skip

        return make_return

    def _resume(self, incident: Incident, restored: Restored) -> CameBack:
        own = restored.local_meta if restored.local_meta is not None else restored.first_meta
        self.guard.load_state_dict(own["guard"], whole=restored.local_meta is not None)
        self.branch = self.events.branch = restored.branch
        self._spent[restored.taken.branch] = (restored.source, round(sum(restored.milliseconds.values()), 1))
        self.events.emit(
            "went_back", "warning", cause=incident.cause, reason=incident.reason, from_step=incident.step,
            to_step=restored.taken.to_step, source=restored.source, branch=restored.taken.branch,
            conservative=restored.taken.conservative, milliseconds={k: round(v, 2) for k, v in
            restored.milliseconds.items()},
        )  # fmt: skip
        self._ahead = self.journal.ahead(self.branch, self.state.step)
        epoch_ended = bool(self.take_effects())
        return CameBack(
            local_meta=restored.local_meta, first_meta=restored.first_meta, epoch_ended=epoch_ended,
            text=f"{incident.reason}; went back to {restored.source}",
        )  # fmt: skip

    @property
    def returning(self) -> int | None:
        """The acts that the run had seen where it went back to this very step, while that is still to be gone through
        again; else None. Acts up to there come first. Local, equal on all ranks."""
        due = self._ahead and self._ahead[0].to_step == self.state.step
        return self._ahead[0].to_acts if due else None

    def take_effects(self) -> bool | None:
        """What the returns to this very step decided: samples left out, mode, re-warm, whether the run stands still.
        Local, alike on all ranks.

        None when there is none; else whether nothing is left of the epoch by it.
        """
        state, ended = self.state, None
        while self.returning is not None:
            taken = self._ahead.pop(0)
            state.hand = replace(state.hand, paused=taken.paused)
            state.sampler.skip(taken.skip)
            if taken.conservative:
                state.mode = Mode(conservative=True, reason=f"{taken.cause} at step {taken.from_step}", held=taken.held)
            if taken.rewarm:
                state.lr.rewarm(state.step, taken.rewarm)
            self.branch = self.events.branch = taken.branch
            ended = state.sampler.turn_over() or bool(ended)
        return ended

    def forget_earlier_starts(self) -> None:
        """With a snapshot of this start on every rank, those that earlier starts left are not needed. Collective."""
        # Every rank must have its own before one deletes what a restart would otherwise go on from.
        if self.world.peers.agree(bool(self.ring.held())) and self.ring.survives:
            sweep(self.ring.run_id, self.ring.generation, self.ring.directory)

    def newest_payload(self) -> Payload | None:
        """The newest snapshot as the content of a checkpoint; None if there is none. Local."""
        held = self.ring.held()
        if not held:
            return None
        snapshot = self.ring.get(held[-1].seq)
        return Payload(
            step=snapshot.info.step, branch=snapshot.info.branch, acts=snapshot.info.acts,
            tensors=snapshot.tensors, meta=snapshot.meta,
            local_tensors=snapshot.local_tensors, local_meta=snapshot.local_meta,
        )  # fmt: skip

    def _pick(self, incident: Incident, older: int) -> SnapshotInfo | None:
        """The newest snapshot from before the trouble, or one ``older`` steps back in the ring."""
        returns, limit = self.journal.returns, incident.before_act
        held = [i for i in self.ring.held() if i.step < incident.first and (limit is None or i.acts < limit)]
        sound = [i for i in held if on_timeline(returns, i.branch, i.step, i.acts)]
        return sound[max(0, len(sound) - 1 - older)] if sound else None

    def _accepts(self, incident: Incident) -> Accept:
        """Which checkpoints the durable tier may take: the one asked for; those from before an act; else the good
        ones; else any before it."""
        ladder = self.journal.ladder
        if incident.before_act is not None:
            before = self._before_act(incident)
            return lambda seq, step, branch: seq in before
        if incident.checkpoint is not None:
            return lambda seq, step, branch: seq == incident.checkpoint
        best = ladder.newest_good
        if best is not None:
            return lambda seq, step, branch: seq in ladder.rungs and ladder.rungs[seq].good
        return lambda seq, step, branch: self.journal.accepts(seq, step, branch) and step < incident.first

    def reaches(self, incident: Incident) -> bool:
        """Whether there is a snapshot or a checkpoint from before an act. Local; rank 0 knows the checkpoints."""
        return self._pick(incident, 0) is not None or bool(self._before_act(incident))

    def _before_act(self, incident: Incident) -> set[int]:
        rungs, limit = self.journal.ladder.rungs.values(), incident.before_act
        return {r.seq for r in rungs if limit is not None and r.acts < limit and r.step < incident.first}

    @property
    def incidents(self) -> list[IncidentRecord]:
        """Every return of the run, also of its earlier starts, and why it gave up if it did."""
        found, known = [], set[Window]()
        for taken in made(self.journal.returns):
            source, spent = self._spent.get(taken.branch, (f"step {taken.to_step}", 0.0))
            left_out = sum(end - start for _, start, end in set(taken.skip) - known)
            known |= set(taken.skip)
            found.append(
                IncidentRecord(
                    step=taken.from_step, cause=taken.cause, level=taken.level, reason=taken.reason,
                    to_step=taken.to_step, source=source, milliseconds=spent, samples_left_out=left_out,
                    conservative=taken.conservative,
                )
            )  # fmt: skip
        return found + self._gave_up
