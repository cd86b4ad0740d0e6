"""The ledger of commands: what was asked, why, what became of it, and what the policy is told about it.

Rank 0 only. A refused command is reported at once as ABORTED; an applied one first as NEUTRAL ("applied") and, when
the observation window is over, by its effect on the validation loss. Reports are repeated until a boundary was
answered, so the policy gets each at least once, with one report_id.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tolaria.coordinator.plan import Outcome
from tolaria.leyline.limits import clip_measurement, clip_text, is_name
from tolaria.leyline.types import FieldOutcome, FieldReport, SeedCommand
from tolaria.leyline.words import describe
from tolaria.telemetry.summary import CommandRecord

MAX_PENDING = 64
NOTICEABLE = 0.01
"""Relative change of the validation loss below which a command counts as NEUTRAL."""


@dataclass(frozen=True)
class _Watched:
    record: CommandRecord
    seed_id: str
    blueprint_id: str
    due: int
    loss: float
    accuracy: float


class Ledger:
    """Commands and their field reports. Local to rank 0; saved with its checkpoint state."""

    def __init__(self, run_id: str, window: int, wall_ns: Callable[[], int]) -> None:
        self.records: dict[str, CommandRecord] = {}
        self._run_id = run_id
        self._window = window
        self._wall_ns = wall_ns
        self._pending: dict[str, FieldReport] = {}
        self._watched: list[_Watched] = []

    @property
    def pending(self) -> tuple[FieldReport, ...]:
        """Reports that no answered boundary has carried yet, oldest first."""
        return tuple(self._pending.values())

    def delivered(self, reports: tuple[FieldReport, ...]) -> None:
        """The policy answered a question that carried these reports."""
        for report in reports:
            self._pending.pop(report.report_id, None)

    def enter(
        self, outcome: Outcome, *, boundary: int, step: int, loss: float, accuracy: float, what: str = "",
        by: str = "", why: str = "",
    ) -> None:  # fmt: skip
        """Record one command's fate at a boundary whose validation gave ``loss`` and ``accuracy``.

        ``by``: the operator who ordered it, with ``what`` and ``why``; the policy is not told of those.
        """
        command = outcome.command
        record = CommandRecord(
            step=step,
            boundary=boundary,
            command_id=outcome.command_id,
            what=describe(command) if command is not None else what or "unreadable command",
            reason=why or (command.reason if command is not None else ""),
            by=by,
            outcome="applied" if outcome.applied else "refused",
            effect="" if outcome.applied else outcome.reason,
        )
        self.records[record.command_id] = record
        blueprint = command.payload.blueprint_id if command and isinstance(command.payload, SeedCommand) else ""
        seed_id = command.target_seed_id if command else ""
        fate = FieldOutcome.NEUTRAL if outcome.applied else FieldOutcome.ABORTED
        notes = "applied" if outcome.applied else f"{outcome.code}: {outcome.reason}"
        if not by:
            self._report(0, record.command_id, fate, seed_id, blueprint, {}, 0, notes)
        if outcome.applied and (command is not None or not by):
            due = boundary + self._window
            self._watched.append(_Watched(record, seed_id, blueprint, due, loss, accuracy))

    def observe(self, boundary: int, loss: float, accuracy: float) -> list[CommandRecord]:
        """Judge the commands whose observation window ends at this boundary; their finished records."""
        due = [w for w in self._watched if boundary >= w.due]
        self._watched = [w for w in self._watched if boundary < w.due]
        return [self._judge(watched, boundary, loss, accuracy) for watched in due]

    def _judge(self, watched: _Watched, boundary: int, loss: float, accuracy: float) -> CommandRecord:
        outcome = _verdict(watched.loss, loss)
        window = boundary - watched.record.boundary
        before = f" {watched.accuracy:.1%} ->" if math.isfinite(watched.accuracy) else ""
        effect = f"loss {watched.loss:.4f} -> {loss:.4f}, accuracy{before} {accuracy:.1%} in {window} boundaries"
        record = replace(watched.record, outcome=outcome.name.lower(), effect=effect)
        self.records[record.command_id] = record
        pairs = {"loss_before": watched.loss, "loss_after": loss, "accuracy_after": accuracy}
        metrics = {name: clip_measurement(value) for name, value in pairs.items() if math.isfinite(value)}
        if record.by:
            return record
        self._report(1, record.command_id, outcome, watched.seed_id, watched.blueprint_id, metrics, window, effect)
        return record

    def _report(
        self,
        number: int,
        command_id: str,
        outcome: FieldOutcome,
        seed_id: str,
        blueprint_id: str,
        metrics: Mapping[str, float],
        window: int,
        notes: str,
    ) -> None:
        report_id = _report_id(command_id, number)
        self._pending[report_id] = FieldReport(
            report_id=report_id,
            command_id=command_id,
            training_run_id=self._run_id,
            outcome=outcome,
            seed_id=seed_id,
            blueprint_id=blueprint_id,
            metrics=metrics,
            observation_window_epochs=window,
            issued_at_ns=self._wall_ns(),
            notes=clip_text(notes),
        )
        while len(self._pending) > MAX_PENDING:
            del self._pending[next(iter(self._pending))]

    def undone(self, former: Mapping[str, CommandRecord], reason: str) -> None:
        """The run went back to a state that does not know these commands yet: they are reported as aborted."""
        for command_id, record in former.items():
            if record == self.records.get(command_id) or record.outcome in ("refused", "undone"):
                continue
            self.records[command_id] = replace(record, outcome="undone", effect=reason)
            if not record.by:
                self._report(2, command_id, FieldOutcome.ABORTED, "", "", {}, 0, f"undone: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """Records, open observations and unsent reports, as JSON."""
        return {
            "records": [asdict(r) for r in self.records.values()],
            "pending": [{**asdict(r), "outcome": int(r.outcome)} for r in self._pending.values()],
            "watched": [{**asdict(w), "loss": w.loss.hex(), "accuracy": w.accuracy.hex()} for w in self._watched],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.records = {r["command_id"]: CommandRecord(**r) for r in state["records"]}
        reports = [FieldReport(**{**r, "outcome": FieldOutcome(r["outcome"])}) for r in state["pending"]]
        self._pending = {r.report_id: r for r in reports}
        self._watched = [
            _Watched(
                CommandRecord(**w["record"]), w["seed_id"], w["blueprint_id"], int(w["due"]),
                float.fromhex(w["loss"]), float.fromhex(w["accuracy"]),
            )
            for w in state["watched"]
        ]  # fmt: skip


def _report_id(command_id: str, number: int) -> str:
    # A command's id may be as long as an id can be, so that nothing can be added to it.
    plain = f"{command_id}:{number}"
    return plain if is_name(plain) else f"{hashlib.sha256(command_id.encode()).hexdigest()}:{number}"


def _verdict(before: float, after: float) -> FieldOutcome:
    if not math.isfinite(after):
        return FieldOutcome.REGRESSION
    if not math.isfinite(before) or after < before * (1 - NOTICEABLE):
        return FieldOutcome.SUCCESS
    return FieldOutcome.REGRESSION if after > before * (1 + NOTICEABLE) else FieldOutcome.NEUTRAL
