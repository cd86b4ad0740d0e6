"""A run that is only simulated: packets as a trainer sends them, at the same boundaries the same numbers.

The seeds follow the policy: what it commands legally is done when its gate opens, what it does not is refused, and both
come back as field reports. Two boundaries are in conservative mode, in one the losses are no numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tolaria.kasmina.lifecycle import FORWARD, HOLDS_SEED, after_boundary, move
from tolaria.kit.judge import Fault, judge
from tolaria.leyline.limits import clip_measurement, clip_text
from tolaria.leyline.types import (
    Command,
    FieldOutcome,
    FieldReport,
    HardwareContext,
    PolicyRequest,
    SeedCommand,
    SeedOp,
    SeedStage,
    SeedState,
    SystemState,
)
from tolaria.tamiyo.sight import BOUNDARIES_LEFT, BUDGET, FLOPS_PER_SAMPLE, HISTORY, LOSS_HISTORY, SLOT_RANK

BOUNDARIES = 40
STEPS = 22
CONSERVATIVE_AT = (19, 20)
NOT_FINITE_AT = 23
LEVEL_FROM = 6
"""Boundary from which the loss is level, so that a policy has a reason to grow."""

_GATE_AFTER = {SeedStage.BLENDING: 3}
"""Boundaries in a stage until its gate opens; 1 for those that are not here."""
_KNOWN = {
    "conv_residual": (9328, 1_179_648.0, 1.7), "low_rank": (176, 16_384.0, 0.31), "identity": (16, 0.0, 0.09),
}  # fmt: skip
"""blueprint -> parameters, FLOPs, gradient, in the simulated slots."""
_HOST = (148, 36_000.0)
_EMBARGO = 2


@dataclass
class _Place:
    """A slot of the simulated model."""

    rank: int = 3
    stage: SeedStage = SeedStage.DORMANT
    blueprint: str = ""
    waited: int = 0
    age: int = 0
    fine_tuning: bool = False

    def enter(self, stage: SeedStage) -> None:
        self.stage, self.waited, self.fine_tuning = stage, 0, False

    @property
    def gate_opens(self) -> bool:
        return self.waited >= _GATE_AFTER.get(self.stage, 1)


@dataclass
class SimulatedRun:
    """``question`` gives the packet of the present boundary, ``answer`` takes the reply and goes on to the next.

    ``faults``: what was wrong with the last reply.
    """

    boundary: int = 1
    places: dict[str, _Place] = field(default_factory=lambda: {"early": _Place(), "late": _Place()})
    faults: list[Fault] = field(default_factory=list)
    _losses: list[float] = field(default_factory=list)
    _reports: list[FieldReport] = field(default_factory=list)

    def question(self) -> PolicyRequest:
        """Field reports are sent once: the simulated policy answered."""
        state = self._state()
        self._losses.insert(0, state.validation_loss)
        reports, self._reports = tuple(self._reports), []
        return PolicyRequest(state=state, field_reports=reports)

    def answer(self, asked: SystemState, commands: Sequence[bytes]) -> None:
        """Carry out what the trainer would, report on all, and go on by one boundary."""
        judged = judge(asked, commands)
        self.faults = [fault for _, fault in judged if fault is not None]
        for position, (command, fault) in enumerate(judged):
            reason = str(fault.reason) if fault is not None else self._carry_out(command)
            name = command.command_id if command is not None else f"boundary-{self.boundary}-{position}"
            self._report(name, command, reason)
        self.boundary += 1
        for place in self.places.values():
            place.waited += 1
            place.age += place.stage in HOLDS_SEED
            following = after_boundary(place.stage, place.waited, _EMBARGO)
            if following != place.stage:
                place.enter(following)

    def _carry_out(self, command: Command | None) -> str:
        """Empty, or why a gate refuses."""
        if command is None or not isinstance(command.payload, SeedCommand):
            return ""
        place, operation = self.places[command.target_seed_id], command.payload.operation
        found = move(place.stage, operation)
        if operation == FORWARD.get(place.stage) and not place.gate_opens:
            return "gate: not yet"
        if operation == SeedOp.FINE_TUNE:
            place.fine_tuning = True
            return ""
        if operation == SeedOp.GERMINATE:
            place.blueprint, place.age = command.payload.blueprint_id, 0
        place.enter(found.to)
        return ""

    def _report(self, command_id: str, command: Command | None, refused: str) -> None:
        self._reports.append(
            FieldReport(
                report_id=f"sim-{self.boundary}-{len(self._reports)}", command_id=command_id,
                training_run_id="simulated", outcome=FieldOutcome.ABORTED if refused else FieldOutcome.NEUTRAL,
                seed_id=command.target_seed_id if command is not None else "", issued_at_ns=self.boundary,
                notes=clip_text(refused or "applied"),
            )
        )  # fmt: skip

    def _state(self) -> SystemState:
        loss = _loss(self.boundary, sum(p.stage == SeedStage.FOSSILIZED for p in self.places.values()))
        sent = math.nan if self.boundary == NOT_FINITE_AT else loss
        metrics = {
            "learning_rate": 0.02,
            "conservative": float(self.boundary in CONSERVATIVE_AT),
            "parameters": float(_HOST[0] + sum(_cost(p.blueprint)[0] for p in self._occupied())),
            "skipped_steps": 3.0 if self.boundary > NOT_FINITE_AT else 0.0,
            BOUNDARIES_LEFT: float(BOUNDARIES - self.boundary),
            "validation_noise": 0.004,
            BUDGET: 1e7 - sum(_cost(p.blueprint)[0] for p in self._occupied()),
            FLOPS_PER_SAMPLE: _HOST[1] + sum(_cost(p.blueprint)[1] for p in self._occupied()),
            **{f"{LOSS_HISTORY}{back}": past for back, past in enumerate(self._losses[:HISTORY], 1)},
            **{f"{SLOT_RANK}{name}": float(place.rank) for name, place in self.places.items()},
        }
        return SystemState(
            packet_id=f"simulated:{self.boundary}", current_epoch=self.boundary, global_step=self.boundary * STEPS,
            validation_accuracy=max(0.0, 1 - loss / 2.4), validation_loss=clip_measurement(sent),
            training_loss=clip_measurement(sent * 0.9), timestamp_ns=self.boundary, training_run_id="simulated",
            experiment_name="policy test", hardware=HardwareContext(device_type="cpu", device_id="simulated"),
            seeds=tuple(self._seed(name, depth) for depth, name in enumerate(self.places)),
            training_metrics=metrics,
        )  # fmt: skip

    def _occupied(self) -> list[_Place]:
        return [place for place in self.places.values() if place.stage in HOLDS_SEED]

    def _seed(self, name: str, depth: int) -> SeedState:
        place = self.places[name]
        metrics = {"boundaries_in_stage": float(place.waited)}
        if place.stage == SeedStage.DORMANT and self.boundary not in CONSERVATIVE_AT:
            for blueprint, (parameters, flops, signal) in _KNOWN.items():
                metrics |= {f"cost/{blueprint}": float(parameters), f"flops/{blueprint}": flops}
                metrics[f"signal/{blueprint}"] = signal / (1 + depth)
        if place.stage not in HOLDS_SEED:
            return SeedState(seed_id=name, stage=place.stage, layer_depth=depth, metrics=metrics)
        parameters, flops, _ = _cost(place.blueprint)
        alpha = min(1.0, place.waited / 3) if place.stage == SeedStage.BLENDING else float(place.stage >= 5)
        metrics |= {
            "parameters": float(parameters), "flops": flops, "alpha": alpha, "fine_tuning": float(place.fine_tuning),
            "gate_ok": float(place.gate_opens),
        }  # fmt: skip
        if place.stage in (SeedStage.PROBATIONARY, SeedStage.FOSSILIZED):
            metrics |= {"contribution": 0.08 / (1 + depth), "contribution_noise": 0.01}
        norm = 0.0 if place.stage == SeedStage.GERMINATED else 0.4
        return SeedState(
            seed_id=name, stage=place.stage, gradient_norm=norm, learning_rate=0.002, layer_depth=depth,
            metrics=metrics, age_epochs=place.age, risk_score=0.0 if place.gate_opens else 1.0,
        )  # fmt: skip


def _cost(blueprint: str) -> tuple[int, float, float]:
    return _KNOWN.get(blueprint, (1000, 20_000.0, 0.5))


def _loss(boundary: int, grown: int) -> float:
    """Falls, then level but for a ripple; lower with each seed that stays."""
    level = 0.5 + 1.8 * math.exp(-min(boundary, LEVEL_FROM) / 1.5)
    return level * 0.8**grown * (1 + 0.004 * math.sin(2.4 * boundary))
