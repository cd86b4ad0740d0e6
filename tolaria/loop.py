"""The training loop.

for every epoch
    for every group of microbatches                       tolaria/data.py
        fence opens     now and then: signals and losses, in flight while the step computes
        step            forward, backward, clip                         tolaria/step.py
        fence closes    one verdict for all ranks                       tolaria/lane.py
                        update
        boundary due?   measure -> policy -> decision -> apply          tolaria/measure.py, coordinator/
                        -> checkpoint due? -> telemetry                 tolaria/saving.py
        sound?          spike, NaN, drift, collapse, emergency          tolaria/guard.py
                        -> snapshot due?      or back to an earlier one tolaria/comeback.py
        asked?          what an operator ordered, on all ranks          tolaria/acts.py
        stop asked?     one agreed checkpoint, then leave
one last boundary, one last checkpoint, digests of all ranks compared
"""

import signal
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from tolaria.acts import Acts
from tolaria.alarm import HALT
from tolaria.data import Window
from tolaria.fence import Verdict
from tolaria.lane import ControlLane
from tolaria.measure import TRAIN_METERS
from tolaria.objective import Batch
from tolaria.parts import Parts
from tolaria.recovery.autopilot import Incident
from tolaria.recovery.checkpoint import Payload
from tolaria.recovery.page import Phase
from tolaria.step import StepResult
from tolaria.streams import rng_tensors
from tolaria.telemetry.meters import Meters
from tolaria.telemetry.pace import Pace
from tolaria.telemetry.split import Split

FINISHED = "finished"
STOPPED = "stopped"


class Trainer:
    """Runs the loop on this rank. Every rank runs the same loop; `run` is collective.

    ``until``: the step after which it stops as if asked to, without a change of what was planned; 0: none.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.until = 0
        self.state = parts.state
        self.acts = Acts(parts, self._payload)
        self.lane = ControlLane(
            parts.config, parts.state, parts.world, parts.guard, parts.alarm, parts.stop,
            asked=lambda: self.acts.docket.waiting,
        )  # fmt: skip
        self.meters = Meters(TRAIN_METERS)
        self._pace = Pace()
        self._asked = self._fetched = 0.0
        self._last_boundary_step = parts.state.step

    def run(self) -> str:
        """Train to the end or until asked to stop; returns FINISHED or STOPPED. The last checkpoint is committed.

        Raises PeerLost, CheckpointError when the last checkpoint could not be written, ReplicaMismatch, WalError,
        TrainingUnstable, RunHalted.
        """
        parts, state, guard, phases = self.parts, self.state, self.parts.guard, self.parts.step.phases
        outcome = self._begin()
        while outcome == FINISHED and not self._done():
            for window, group in self._groups():
                # ------------------------------------------------------------------------------------------
                with phases("fence"):
                    self.lane.open(window)
                result = parts.step(group, self._close_fence)
                incident = guard.judge(result.verdict) if result.verdict is not None else None
                epoch_ended = state.after_step(taken=result.taken)
                # ------------------------------------------------------------------------------------------
                with phases("bookkeeping"):
                    guard.stepped(window=window, taken=result.taken, loss=result.loss)
                    self._count(result)
                if incident is None and self._boundary_due(epoch_ended):
                    with phases("boundary"):
                        incident = self._boundary()
                if (incident := incident or guard.check(self._payload)) is not None:
                    self._go_back(incident)
                    outcome = self._act(asked=False)[1]
                    break
                if result.verdict is not None and result.verdict.stop_signal:
                    outcome = self._stop_asked(result.verdict.stop_signal)
                    break
                moved, outcome = self._act(asked=result.verdict is not None and result.verdict.asked)
                if moved or outcome != FINISHED or epoch_ended or self._done():
                    break
        if self._reached:
            outcome = STOPPED
        if outcome == FINISHED and self._last_boundary_step != state.step:
            self._boundary()
        parts.saver.save_last(self._payload)
        return outcome

    def _begin(self) -> str:
        """The first snapshot, so that there is always one to go back to, and what the log has for this step."""
        self.parts.events.step = self.state.step
        if self.parts.config.recovery.snapshot_steps:
            self.parts.guard.snapshot(self._payload())
            self.parts.comeback.forget_earlier_starts()
        self.parts.status.begin()
        return self._act(asked=False)[1]

    def _close_fence(self) -> Verdict | None:
        verdict = self.lane.close()
        if verdict is not None and verdict.level == HALT:
            with self.parts.step.phases("paused"):
                self.parts.alarm.freeze(self._save_newest_snapshot)
            self.lane.restart()
        return verdict

    def _save_newest_snapshot(self) -> None:
        """Make the newest snapshot durable: the state in hand is in the middle of a step."""
        payload = self.parts.comeback.newest_payload()
        self.parts.saver.finish()
        if payload is not None and payload.step > self.parts.record.checkpoint_step:
            self.parts.saver.save_now(payload)

    def _act(self, *, asked: bool) -> tuple[bool, str]:
        """Carry out what an operator ordered, and what the log has for this step: acts and returns in their order.

        Whether the run has other samples before it by that, and the outcome so far.
        """
        moved = False
        while True:
            while (effect := self.acts.make(asked=asked)) is not None:
                self.lane.restart()
                if effect.stop or effect.stop_signal:
                    return moved, self._stop_asked(effect.stop_signal or signal.SIGTERM, by_order=effect.stop)
                if effect.halt:
                    with self.parts.step.phases("paused"):
                        self.parts.alarm.freeze(self._save_newest_snapshot)
                if effect.go_back is not None:
                    went = self._go_back(effect.go_back)
                    self.acts.settled(went=went)
                    moved |= went
            if not self._take_effects():
                return moved, FINISHED
            moved = True

    # Going back

    def _go_back(self, incident: Incident | None) -> bool:
        """Return to an earlier state, and once more if its first boundary is no better. Whether the run is at one."""
        parts, went = self.parts, False
        while incident is not None:
            parts.alarm.page.enter(Phase.RESTORE, self.state.step)
            with parts.step.phases("rollback"):
                parts.saver.finish()
                came = parts.comeback.go_back(incident)
            if came is None:
                return went
            went = True
            self.lane.restart()
            saved = came.local_meta if came.local_meta is not None else came.first_meta
            parts.step.replica.tally.load_state_dict(saved["tally"])
            if came.local_meta is not None:
                self.meters.load_state_dict(came.local_meta["meters"])
            self._last_boundary_step = int(saved["last_boundary_step"])
            parts.coordinator.went_back(saved["coordinator"], came.text)
            parts.record.went_back(saved["record"], came.text)
            self.acts.docket.load_state_dict(saved.get("acts", {}))
            if incident.cause == "emergency":
                parts.alarm.answered(incident.level)
            parts.events.step = self.state.step
            parts.status.went_back()
            incident = self._boundary() if came.epoch_ended and self._boundary_due(True) else None
        return went

    def _take_effects(self) -> bool:
        """On the way again through what was logged: do what a return to this step decided. True if there was one."""
        ended = self.parts.comeback.take_effects()
        if ended and self._boundary_due(True):
            self._go_back(self._boundary())
        return ended is not None

    def _groups(self) -> Iterator[tuple[Window, list[Batch]]]:
        """The microbatches of each step to the end of the epoch, with the samples that they are of all ranks."""
        sampler = self.state.sampler
        batches = self.parts.loader.batches(self.parts.task.train, sampler.remaining(), seed=sampler.loader_seed)
        while (window := sampler.window) is not None:
            self._asked = time.perf_counter()
            self.parts.profiler.step(self.state.step)
            with self.parts.step.phases("data"):
                group = list(islice(batches, sampler.accumulation))
            self._fetched = time.perf_counter()
            if not group:
                return
            yield window, group

    def _done(self) -> bool:
        config, step = self.parts.config.train, self.state.step
        return self.state.sampler.epoch >= config.epochs or 0 < config.max_steps <= step or self._reached

    @property
    def _reached(self) -> bool:
        return 0 < self.until <= self.state.step

    def _stop_asked(self, number: int, *, by_order: bool = False) -> str:
        name = "order" if by_order else signal.Signals(number).name
        self.parts.events.emit("stop_requested", signal=name)
        self.parts.progress.note(f"{name}: saving a last checkpoint", label="stop")
        return STOPPED

    # Telemetry of steps

    def _count(self, result: StepResult) -> None:
        parts, state = self.parts, self.state
        parts.events.step = state.step
        seconds = time.perf_counter() - self._asked
        self._pace.add(result.alone_until - self._asked, seconds, self._fetched - self._asked)
        self.lane.stepped(seconds)
        if result.taken:
            self.meters.add("loss", result.loss)
        parts.status.stepped(result, seconds)

    def _boundary_due(self, epoch_ended: bool) -> bool:
        every = self.parts.config.train.boundary_steps
        return self.state.step % every == 0 if every else epoch_ended

    def _boundary(self) -> Incident | None:
        """One boundary. An incident when its validation is none to go on from; then the policy is not asked."""
        parts, state = self.parts, self.state
        split = Split()
        parts.alarm.at_boundary(state.step)
        state.boundary += 1
        self._last_boundary_step = state.step
        self.lane.restart()
        for slot, before, after in state.kasmina.tick(state.left_overs):
            parts.events.emit("seed_moved", slot=slot, before=before.name, after=after.name)
        parts.guard.begin_boundary()
        split.lap("guard")
        waited_s = parts.status.ledger.own("sync wait")
        report = parts.evaluator.measure(self.meters, self._pace.take(waited_s))
        split.lap("report")
        if (incident := parts.guard.boundary(report)) is not None:
            return incident
        split.lap("guard")
        applied = parts.coordinator.exchange(report)
        parts.saver.collect()
        parts.record.boundary(report, applied, split)
        parts.status.boundary(report)
        if applied.structure_changed:
            parts.guard.structure_changed()
        if applied.go_back is not None:
            return parts.guard.commanded(applied.go_back)
        parts.saver.save_if_due(self._payload)
        return None

    # What a checkpoint or a snapshot holds

    def _payload(self) -> Payload:
        return Payload(
            step=self.state.step,
            branch=self.parts.comeback.branch,
            acts=self.state.hand.acts,
            tensors=self.state.tensors(),
            meta=self.state.meta(),
            local_tensors=rng_tensors(self.parts.world.device),
            local_meta=self._local_meta(),
        )

    def _local_meta(self) -> dict[str, Any]:
        return {
            "meters": self.meters.state_dict(),
            "tally": self.parts.step.replica.tally.state_dict(),
            "last_boundary_step": self._last_boundary_step,
            "coordinator": self.parts.coordinator.state_dict(),
            "record": self.parts.record.state_dict(),
            "guard": self.parts.guard.state_dict(),
            "acts": self.acts.docket.state_dict(),
            "facts": self.parts.facts,
        }

    def load_local_meta(self, own: dict[str, Any] | None, first: dict[str, Any]) -> None:
        """Take over what this rank saved as its own: the running epoch's loss, the record, rank 0's memory.

        ``own`` is None when the run had another number of ranks: the memory of its rank 0 (``first``) then serves all,
        and only the loss of the running epoch begins anew.
        """
        if own is not None:
            self.meters.load_state_dict(own["meters"])
        saved = own if own is not None else first
        self.parts.step.replica.tally.load_state_dict(saved["tally"])
        self._last_boundary_step = int(saved["last_boundary_step"])
        self.parts.coordinator.load_state_dict(saved["coordinator"])
        self.parts.record.load_state_dict(saved["record"])
        self.parts.guard.load_state_dict(saved["guard"], whole=own is not None)
        self.acts.docket.load_state_dict(saved.get("acts", {}))
