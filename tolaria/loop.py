"""The training loop.

for every epoch
    for every group of microbatches                       tolaria/data.py
        fence opens     flags of all ranks, in flight while the step computes
        step            forward, backward, clip, verdict, update        tolaria/step.py
        fence closes    one verdict for all ranks                       tolaria/fence.py
        boundary due?   measure -> policy -> decision -> apply          tolaria/measure.py, coordinator/
                        -> checkpoint due? -> telemetry
        stop asked?     one agreed checkpoint, then leave
one last boundary, one last checkpoint, digests of all ranks compared
"""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from tolaria.config import Config
from tolaria.coordinator.coordinator import Coordinator
from tolaria.data import Loader
from tolaria.dist import World
from tolaria.errors import CheckpointError
from tolaria.fence import Fence
from tolaria.measure import TRAIN_METERS, Evaluator
from tolaria.objective import Batch
from tolaria.process import StopFlag
from tolaria.record import RunRecord
from tolaria.recovery.checkpoint import CheckpointWriter, Payload
from tolaria.state import HOST_GROUP, TrainState, rng_tensors
from tolaria.step import StepResult, TrainStep
from tolaria.task import Task
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.meters import Meters, Rate
from tolaria.telemetry.metrics import MetricsLog
from tolaria.telemetry.progress import Progress, StepInfo

FINISHED = "finished"
STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything the loop works with, built in `tolaria/build.py`."""

    config: Config
    world: World
    task: Task
    state: TrainState
    loader: Loader
    step: TrainStep
    evaluator: Evaluator
    coordinator: Coordinator
    writer: CheckpointWriter
    record: RunRecord
    events: EventLog
    metrics: MetricsLog | None
    progress: Progress
    stop: StopFlag


class Trainer:
    """Runs the loop on this rank. Every rank runs the same loop; `run` is collective."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.state = parts.state
        self.fence = Fence(parts.world.peers)
        self.meters = Meters(TRAIN_METERS, parts.world.device)
        self._samples = Rate()
        self._last_boundary_step = parts.state.step

    def run(self) -> str:
        """Train to the end or until asked to stop; returns FINISHED or STOPPED. The last checkpoint is committed.

        Raises PeerLost, CheckpointError when the last checkpoint could not be written, ReplicaMismatch.
        """
        outcome = FINISHED
        while outcome == FINISHED and not self._done():
            for group in self._groups():
                # ------------------------------------------------------------------------------------------
                self.fence.open(stop_signal=self._signal())
                result = self.parts.step(group, self.fence.close)
                verdict = result.verdict
                epoch_ended = self.state.after_step(taken=result.taken)
                # ------------------------------------------------------------------------------------------
                self._count(result)
                if self._boundary_due(epoch_ended):
                    self._boundary()
                if verdict.stop_signal:
                    outcome = STOPPED
                    self._stop_asked(verdict.stop_signal)
                    break
                if epoch_ended or self._done():
                    break
        if outcome == FINISHED and self._last_boundary_step != self.state.step:
            self._boundary()
        self._save_last()
        return outcome

    def _groups(self) -> Iterator[list[Batch]]:
        sampler = self.state.sampler
        batches = self.parts.loader.batches(self.parts.task.train, sampler.remaining(), seed=sampler.loader_seed)
        while group := list(islice(batches, sampler.accumulation)):
            yield group

    def _done(self) -> bool:
        config = self.parts.config.train
        return self.state.sampler.epoch >= config.epochs or bool(
            config.max_steps and self.state.step >= config.max_steps
        )

    def _signal(self) -> int:
        name = self.parts.stop.signal_name
        return int(signal.Signals[name]) if name is not None else 0

    def _stop_asked(self, number: int) -> None:
        name = signal.Signals(number).name
        self.parts.events.emit("stop_requested", signal=name)
        self.parts.progress.note(f"{name}: saving a last checkpoint", label="stop")

    # Telemetry of steps

    def _count(self, result: StepResult) -> None:
        parts, state = self.parts, self.state
        parts.events.step = state.step
        self._samples.add(state.sampler.group_size)
        if result.taken:
            self.meters.add("loss", result.loss)
        if parts.metrics is not None and state.step % parts.config.log.interval_steps == 0:
            # Reading the loss waits for the device; once per interval that is what the line is for. It is this
            # rank's part of the step: the mean over ranks is in the boundary's event.
            alphas = {f"alpha/{n}": x.alpha_value for n, x in state.kasmina.seeds.items() if x.occupied}
            rate = state.lr.lr_at(HOST_GROUP, state.step - 1)
            parts.metrics.write(state.step, epoch=state.sampler.epoch, loss_rank0=float(result.loss), lr=rate, **alphas)
        if parts.progress.step_due():
            sampler = state.sampler
            parts.progress.step(
                StepInfo(
                    epoch=sampler.epoch + 1, epochs=parts.config.train.epochs,
                    epoch_step=sampler.cursor // sampler.group_size, epoch_steps=sampler.steps_per_epoch,
                    loss=float(result.loss), lr=state.lr.lr_at(HOST_GROUP, state.step), rate=self._samples.read(),
                )
            )  # fmt: skip

    # Boundary

    def _boundary_due(self, epoch_ended: bool) -> bool:
        every = self.parts.config.train.boundary_steps
        return self.state.step % every == 0 if every else epoch_ended

    def _boundary(self) -> None:
        parts, state = self.parts, self.state
        state.boundary += 1
        self._last_boundary_step = state.step
        for slot, before, after in state.kasmina.tick(state.left_overs):
            parts.events.emit("seed_moved", slot=slot, before=before.name, after=after.name)
        start = time.perf_counter()
        report = parts.evaluator.measure(self.meters)
        measure_ms = (time.perf_counter() - start) * 1e3
        self.meters.reset()
        applied = parts.coordinator.exchange(report)
        self._collect_saves()
        parts.record.boundary(report, applied, measure_ms)
        every = parts.config.checkpoint.every
        if every and state.boundary % every == 0:
            self._save_unless_busy()

    # Checkpoints

    def _save_unless_busy(self) -> None:
        busy = torch.tensor([int(self.parts.writer.in_flight)])
        # Ranks may see the end of a save at different moments; the skip must be everybody's.
        if self.parts.world.peers.max(busy).item():
            self.parts.record.counters["checkpoints_skipped"] += 1
            self.parts.events.emit("checkpoint_skipped", "warning", reason="the one before is still being written")
            return
        self._collect_saves()
        self.parts.writer.save(self._payload())

    def _save_last(self) -> None:
        if self._finish_save() is None and self.parts.record.checkpoint_step == self.state.step:
            return
        self.parts.evaluator.replica.synchronise_buffers()
        self.parts.writer.save(self._payload())
        failed = self._finish_save()
        if failed is not None:
            raise CheckpointError(f"the last checkpoint was not written: {failed}")

    def _finish_save(self) -> str | None:
        """Wait for the save in flight; its error, None when it was committed or there was none."""
        limit_s = self.parts.config.dist.timeout_s
        if not self.parts.writer.wait(limit_s):
            raise CheckpointError(f"a checkpoint was still being written after {limit_s:g} s (dist.timeout_s)")
        return self._collect_saves()

    def _collect_saves(self) -> str | None:
        """Record finished saves; the newest one's error, None when it was committed or there is none."""
        error = None
        for outcome in self.parts.writer.poll():
            self.parts.record.saved(outcome, is_coordinator=self.parts.world.is_coordinator)
            error = outcome.error
        return error

    def _payload(self) -> Payload:
        return Payload(
            step=self.state.step,
            tensors=self.state.tensors(),
            meta=self.state.meta(),
            local_tensors=rng_tensors(self.parts.world.device),
            local_meta=self._local_meta(),
        )

    def _local_meta(self) -> dict[str, Any]:
        return {
            "meters": self.meters.state_dict(),
            "last_boundary_step": self._last_boundary_step,
            "coordinator": self.parts.coordinator.state_dict(),
            "record": self.parts.record.state_dict(),
        }

    def load_local_meta(self, own: dict[str, Any] | None, first: dict[str, Any]) -> None:
        """Take over what this rank saved as its own: the running epoch's loss, the record, rank 0's memory.

        ``own`` is None when the run had another number of ranks: the memory of its rank 0 (``first``) then serves all,
        and only the loss of the running epoch begins anew.
        """
        if own is not None:
            self.meters.load_state_dict(own["meters"])
        saved = own if own is not None else first
        self._last_boundary_step = int(saved["last_boundary_step"])
        self.parts.coordinator.load_state_dict(saved["coordinator"])
        self.parts.record.load_state_dict(saved["record"])
