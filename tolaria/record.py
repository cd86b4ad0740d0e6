"""What a run remembers of itself for its summary, and what a person sees while it goes. Rank 0; silent elsewhere."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from tolaria.coordinator.apply import Applied
from tolaria.leyline.types import SeedStage
from tolaria.leyline.words import describe
from tolaria.lives import SeedLives
from tolaria.measure import Report
from tolaria.recovery.checkpoint import SaveOutcome
from tolaria.state import HOST_GROUP, TrainState
from tolaria.telemetry.events import EventLog, Level
from tolaria.telemetry.pace import data_bound, slowness, stragglers
from tolaria.telemetry.progress import BoundaryRow, Progress, SeedCell
from tolaria.telemetry.split import Split
from tolaria.telemetry.summary import Score

# Stages in which a seed acts on the model's output.
ACTING = (SeedStage.BLENDING, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED)

MAX_TOLD = 64
"""Ranks whose numbers an event lists."""


class RunRecord:
    """Scores, latencies and checkpoints of a run so far. Written by the loop, read by the summary."""

    def __init__(self, state: TrainState, events: EventLog, progress: Progress, *, straggler_ratio: float) -> None:
        self.state = state
        self.events = events
        self.progress = progress
        self.parameters_start = state.parameter_count
        self.final: Score | None = None
        self.best: Score | None = None
        self.before_growth: Score | None = None
        self.latencies: list[dict[str, float]] = []
        self.checkpoint: Path | None = None
        self.checkpoint_step = -1
        self.lives = SeedLives(state)
        self.counters = {"checkpoints": 0, "checkpoint_failures": 0, "checkpoints_skipped": 0, "restarts": 0}
        self.seconds_before = 0.0
        self._straggler_ratio = straggler_ratio
        self._slow: list[int] = []
        self._data_bound = False
        self._committed = ""
        self._started = self._last_row = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the run over all its starts."""
        return self.seconds_before + time.monotonic() - self._started

    def boundary(self, report: Report, applied: Applied, split: Split) -> None:
        """Record one boundary: event, table row, scores. ``split``: its times so far, "report" and "guard"."""
        split.lap("rest")
        split.add(report.spent_ms, out_of="report")
        split.add(applied.latency_ms, out_of="rest")
        state = self.state
        score = Score(
            step=state.step,
            epoch=_epoch(state),
            loss=report.val_loss,
            accuracy=report.val_accuracy,
            metrics=dict(report.metrics),
        )
        self.final = score
        if self.best is None or score.accuracy > self.best.accuracy:
            self.best = score
        if self.before_growth is None and any(s.stage in ACTING for s in state.kasmina.seeds.values()):
            # Validated before this boundary's command took effect, so still without the seed.
            self.before_growth = score
        for ended in self.lives.boundary(report):
            self.events.emit("seed_judged", **ended.to_dict())
        self._row(report)
        self._tell_stragglers(report)
        for outcome in applied.outcomes:
            what = describe(outcome.command) if outcome.command is not None else "unreadable command"
            text = f"{what}: {outcome.reason}" if outcome.reason else what
            level: Level = "info" if outcome.applied else "warning"
            self.progress.note(text, label="tamiyo" if outcome.applied else "refused", level=level)
        split.lap("telemetry")
        # Its own line is the only thing that the boundary's times do not hold.
        latency = split.end()
        self.latencies.append(latency)
        self.events.note(
            "boundary", boundary=state.boundary, epoch=_epoch(state), train_loss=report.train_loss,
            val_loss=report.val_loss, val_accuracy=report.val_accuracy, metrics=dict(report.metrics),
            mode=state.mode.name, latency_ms={k: round(v, 3) for k, v in latency.items()},
            seeds={n: s.stage.name for n, s in state.kasmina.seeds.items()},
            val_noise=report.val_noise,
            signals={slot: _signals_of(metrics) for slot, metrics in report.signals.items()},
            flops_per_sample=report.flops,
            owners=_owners(report, state),
            # Told once: from each of a thousand ranks the times of a thousand ranks are 10 MB at every boundary.
            own_ms=[round(ms, 3) for ms in report.own_ms] if self.events.rank == 0 else [],
            data_ms=[round(ms, 3) for ms in report.data_ms] if self.events.rank == 0 else [],
        )  # fmt: skip

    def _tell_stragglers(self, report: Report) -> None:
        """Which ranks hold the others up; for people, once until it is over."""
        slow = stragglers(report.own_ms, self._straggler_ratio)
        for rank in slow:
            usual = median(ms for other, ms in enumerate(report.own_ms) if other != rank)
            self.events.emit("straggler", "warning", straggler=rank, own_ms=report.own_ms[rank], others_ms=usual,
                             data_ms=report.data_ms[rank])  # fmt: skip
            if rank not in self._slow:
                self.progress.note(slowness(rank, report.own_ms, report.data_ms), label="slow", level="warning")
        self._slow = slow
        bound = data_bound(report.data_ms, report.step_ms)
        if bound and not self._data_bound:
            self.events.emit("data_bound", "warning", data_ms=list(report.data_ms[:MAX_TOLD]), step_ms=report.step_ms)
            self.progress.note(bound, label="data", level="warning")
        self._data_bound = bool(bound)

    def _row(self, report: Report) -> None:
        now = time.monotonic()
        state = self.state
        cells = [SeedCell(slot=n, stage=s.stage.name, alpha=s.alpha_value) for n, s in state.kasmina.seeds.items()]
        self.progress.boundary(
            BoundaryRow(
                epoch=_epoch(state),
                step=state.step,
                train_loss=report.train_loss,
                val_loss=report.val_loss,
                val_accuracy=report.val_accuracy,
                lr=state.lr.lr_at(HOST_GROUP, state.step),
                seconds=now - self._last_row,
                seeds=[c for c in cells if c.stage != SeedStage.DORMANT.name],
                mode=state.mode.name,
                checkpoint=self._committed,
            )
        )
        self._committed = ""
        self._last_row = now

    def saved(self, outcome: SaveOutcome, *, is_coordinator: bool) -> None:
        """Record how a save ended."""
        if outcome.path is not None:
            self.checkpoint, self.checkpoint_step = outcome.path, outcome.step
            self.counters["checkpoints"] += 1
            self._committed = f"c{outcome.seq}"
        else:
            self.counters["checkpoint_failures"] += 1
        if not is_coordinator:
            return
        if outcome.error is not None:
            self.events.emit("checkpoint_failed", "error", saved_step=outcome.step, reason=outcome.error)
            self.progress.note(f"not saved: {outcome.error}", label="ckpt", level="error")
            return
        self.events.emit(
            "checkpoint_committed", saved_step=outcome.step, seq=outcome.seq, path=str(outcome.path),
            bytes=outcome.size, seconds=round(outcome.seconds, 4), blocked_seconds=round(outcome.blocked_seconds, 4),
        )  # fmt: skip
        if outcome.cleanup_error is not None:
            self.events.emit("checkpoint_cleanup_failed", "warning", reason=outcome.cleanup_error)

    def state_dict(self) -> dict[str, Any]:
        """What the summary of a resumed run needs, as JSON."""
        scores = {"final": self.final, "best": self.best, "before_growth": self.before_growth}
        return {
            "scores": {name: _score_to_json(score) for name, score in scores.items()},
            "lives": self.lives.state_dict(),
            "parameters_start": self.parameters_start,
            "latencies": self.latencies[-1000:],
            "counters": dict(self.counters),
            "seconds": self.seconds,
        }

    def went_back(self, saved: Mapping[str, Any], text: str) -> None:
        """Forget the scores and the seeds of what was undone; what was counted and timed stays."""
        self._load_scores(saved)
        # The newest checkpoint may be one of those that were undone; the last save must not take it for its own.
        self.checkpoint, self.checkpoint_step = None, -1
        self.progress.note(text, label="back", level="warning")

    def _load_scores(self, saved: Mapping[str, Any]) -> None:
        self.lives.load_state_dict(saved["lives"])
        for name, score in saved["scores"].items():
            setattr(self, name, _score_from_json(score))

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._load_scores(saved)
        self.parameters_start = int(saved["parameters_start"])
        self.latencies = [dict(entry) for entry in saved["latencies"]]
        self.counters.update(saved["counters"])
        self.seconds_before = float(saved["seconds"])


def _signals_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """The measured ones; what a blueprint costs is the same at every boundary."""
    return {name: value for name, value in metrics.items() if name.startswith("signal/")}


def _epoch(state: TrainState) -> int:
    """The epoch that is running, or that has just ended, counted from 1."""
    return state.sampler.epoch + bool(state.sampler.cursor)


def _owners(report: Report, state: TrainState) -> dict[str, dict[str, float]]:
    """How the samples of each seed counted, with the alpha at which the seed acted."""
    seeds = state.kasmina.seeds
    return {slot: {"alpha": seeds[slot].alpha_value, **found} for slot, found in report.owners.items()}


def _score_to_json(score: Score | None) -> dict[str, Any] | None:
    if score is None:
        return None
    return {**asdict(score), "loss": score.loss.hex(), "accuracy": score.accuracy.hex(),
            "metrics": {k: v.hex() for k, v in score.metrics.items()}}  # fmt: skip


def _score_from_json(saved: Mapping[str, Any] | None) -> Score | None:
    if saved is None:
        return None
    plain = Score(step=int(saved["step"]), epoch=int(saved["epoch"]), loss=0.0, accuracy=0.0)
    metrics = {k: float.fromhex(v) for k, v in saved["metrics"].items()}
    return replace(plain, loss=float.fromhex(saved["loss"]), accuracy=float.fromhex(saved["accuracy"]), metrics=metrics)
