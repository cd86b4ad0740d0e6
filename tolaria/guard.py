"""The guard: watches a run step by step and says when it should not go on from where it is.

    after every step      spike or NaN?         loss over all ranks against its running median
    every drift_steps     replicas equal?       one slice of the state, hashed on every rank
    every snapshot_steps  snapshot              copy, hash, vote: only a state that is equal everywhere counts
    at every boundary     collapse? healthy?    validation against its best; checkpoints become good
    -> Incident; what is done about it: tolaria/comeback.py

All that it judges by is equal on every rank, so every rank comes to the same incident at the same step.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tolaria.config_recovery import RecoveryConfig
from tolaria.data import Window
from tolaria.dist import World
from tolaria.fence import Verdict
from tolaria.leyline.types import RollbackCommand
from tolaria.measure import Report
from tolaria.phases import Phases, unseen
from tolaria.recovery.autopilot import (
    COLLAPSE_HISTORY,
    Cause,
    Incident,
    SpikeWatch,
    StepFact,
    collapse,
    fact_from_json,
    fact_to_json,
)
from tolaria.recovery.checkpoint import Payload
from tolaria.recovery.journal import Journal
from tolaria.recovery.sentinel import Look, Sentinel
from tolaria.recovery.snapshots import SnapshotRing
from tolaria.state import TrainState
from tolaria.telemetry.events import EventLog

ELEVATED, CONSERVATIVE = 2, 3


class Guard:
    """One per rank, called by the loop. Methods say whether they are collective."""

    def __init__(
        self,
        config: RecoveryConfig,
        state: TrainState,
        world: World,
        events: EventLog,
        *,
        ring: SnapshotRing,
        journal: Journal,
        sentinel: Sentinel,
        synchronise: Callable[[], None],
        phases: Phases = unseen,
    ) -> None:
        self.config = config
        self.state = state
        self.world = world
        self.events = events
        self.ring = ring
        self.journal = journal
        self.sentinel = sentinel
        # Running statistics of a forward pass differ over ranks until rank 0's are sent to all.
        self._synchronise = synchronise
        self._phases = phases
        self._watch = SpikeWatch(config)
        self._look: Look | None = None
        # With this rank's part of the loss, until a fence brings the mean over all of them.
        self._untold: list[StepFact] = []
        self._validations: list[tuple[float, float]] = []

    # Every step

    @property
    def losses(self) -> list[float]:
        """This rank's parts of the losses that the next fence is to carry, oldest first."""
        return [fact.loss for fact in self._untold]

    def judge(self, verdict: Verdict) -> Incident | None:
        """What the fence says of steps that are over, and of emergencies. Local, the same on every rank."""
        if verdict.level in (ELEVATED, CONSERVATIVE):
            return self._incident("emergency", verdict.level, f"emergency of level {verdict.level}")
        for loss in verdict.losses:
            incident = self._watch.add(self._untold.pop(0)._replace(loss=loss))
            if incident is not None:
                return incident
        return None

    def stepped(self, *, window: Window, taken: bool, loss: float) -> None:
        """A step is over. ``loss``: this rank's part of it. Local."""
        scaler = self.state.scaler
        # A float16 scaler that looks for its scale skips steps without anything being wrong.
        searching = not taken and scaler.is_enabled() and scaler.get_scale() > 1.0
        self._untold.append(StepFact(self.state.step, window, taken or searching, loss))

    def check(self, payload: Callable[[], Payload]) -> Incident | None:
        """Compare the ranks and take a snapshot, when due. Collective."""
        config, step = self.config, self.state.step
        turn = step // config.drift_steps if config.drift_steps else 0
        if config.drift_steps and step % config.drift_steps == 0 and (found := self._compare(turn)) is not None:
            return found
        if config.snapshot_steps and step % config.snapshot_steps == 0:
            return self.snapshot(payload())
        return None

    def snapshot(self, payload: Payload, *, apart: bool = False) -> Incident | None:
        """Keep this state in memory if it is equal on all ranks. Collective: one or two small collectives.

        ``apart``: beside the ones that come and go, until the next that is kept apart.
        """
        with self._phases("checkpoint"):
            return self._snapshot(payload, apart=apart)

    def _snapshot(self, payload: Payload, *, apart: bool) -> Incident | None:
        self._synchronise()
        taken = self.ring.take(payload, apart=apart)
        digests = self.world.peers.gather_digests(taken.info.digest if taken is not None else bytes(32))
        if taken is None or bytes(32) in digests:
            if taken is not None:
                self.ring.drop(taken.info.seq)
            return None
        if len(set(digests)) == 1:
            self.ring.confirm(taken.info.seq)
            return None
        self.ring.drop(taken.info.seq)
        drift = self.sentinel.compare(taken.hashes)
        return self._drifted(drift.reason) if drift is not None else None

    def _compare(self, turn: int) -> Incident | None:
        drift = self.sentinel.judge(self._looked(turn))
        return self._drifted(drift.reason) if drift is not None else None

    def _looked(self, turn: int) -> Look:
        self._synchronise()
        rank = self.sentinel.trace(turn)
        if rank is not None:
            self.events.emit(
                "drift_traced", "error", astray=rank, reason="gone through again, its state came out other"
            )
        return self.sentinel.look(turn)

    def _drifted(self, reason: str) -> Incident:
        return self._incident("drift", ELEVATED, reason)

    # Boundaries

    def begin_boundary(self) -> None:
        """Start to compare the ranks: the answer comes while they validate. Collective, does not wait."""
        self._look = self._looked(self.state.boundary)

    def boundary(self, report: Report) -> Incident | None:
        """Judge a validation, and the comparison of the ranks that has begun with the boundary. Collective."""
        look, self._look = self._look, None
        drift = self.sentinel.judge(look if look is not None else self._looked(self.state.boundary))
        self._validations.append((report.val_loss, report.val_accuracy))
        del self._validations[: -COLLAPSE_HISTORY - 1]
        losses, accuracies = zip(*self._validations, strict=True)
        reason = collapse(losses, accuracies, self.config.collapse_ratio)
        if reason is not None:
            return self._incident("collapse", ELEVATED, reason)
        if drift is not None:
            return self._drifted(drift.reason)
        for rung in self.journal.healthy_boundary():
            self.events.emit("checkpoint_good", seq=rung.seq, saved_step=rung.step)
        return None

    def commanded(self, command: RollbackCommand, *, why: str = "") -> Incident:
        """The return that a command asks for. Local; rank 0 knows the checkpoint and has found that there is one.

        ``why``: what an operator said beside the command.
        """
        incident = self._incident("command", ELEVATED, command.reason or why or f"asked for: {command.target}")
        seq = self.journal.target_of(command) if self.world.is_coordinator else None
        return replace(incident, checkpoint=seq if seq is not None else -1)  # on no rank one of another cause

    def structure_changed(self) -> None:
        """Another structure has another usual loss and another validation. Local."""
        self._watch.reset()
        self._validations.clear()

    def widened(self, incident: Incident, times: int) -> Incident:
        """The same incident with more of the steps before it put under suspicion, the more often it came. Local."""
        return self._watch.widened(incident, times)

    def _incident(self, cause: Cause, level: int, reason: str) -> Incident:
        step = self.state.step
        return Incident(cause=cause, level=level, reason=reason, step=step, first=step + 1)

    # Memory

    def state_dict(self) -> dict[str, Any]:
        """What the guard remembers, as JSON; losses not yet "told" are this rank's own, the rest is equal on all."""
        return {
            "watch": self._watch.state_dict(),
            "untold": [fact_to_json(fact) for fact in self._untold],
            "validations": [[loss.hex(), accuracy.hex()] for loss, accuracy in self._validations],
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, whole: bool) -> None:
        """Take over what `state_dict` gave. ``whole``: it is this very rank's; else some last losses are unknown."""
        self._watch.load_state_dict(saved["watch"])
        self._untold = [fact_from_json(fact) for fact in saved["untold"]] if whole else []
        self._validations = [(float.fromhex(x), float.fromhex(y)) for x, y in saved["validations"]]
