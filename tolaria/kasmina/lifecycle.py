"""The life of a seed as a table: which operation leads from which stage to which, through which gate.

    DORMANT -GERMINATE-> GERMINATED -START_TRAINING-> TRAINING -START_GRAFTING-> BLENDING -STABILIZE-> SHADOWING
            -EVALUATE-> PROBATIONARY -(FINE_TUNE)- -FOSSILIZE-> FOSSILIZED
    GERMINATED..PROBATIONARY -CULL-> CULLED -> EMBARGOED -> RESETTING -> DORMANT     (by itself, one per boundary)
    GERMINATED, TRAINING     -CANCEL-> RESETTING -> DORMANT                          (no embargo)

Pure: no tensors, no clocks.
"""

import math
from dataclasses import dataclass

from tolaria.errors import CommandRefused
from tolaria.leyline.types import SeedGate, SeedOp, SeedStage

S, Op, G = SeedStage, SeedOp, SeedGate


@dataclass(frozen=True)
class Move:
    """One legal change of stage. ``gate`` must pass first; None: no gate."""

    to: SeedStage
    gate: SeedGate | None


_CULLABLE = (S.GERMINATED, S.TRAINING, S.BLENDING, S.SHADOWING, S.PROBATIONARY)

MOVES: dict[tuple[SeedStage, SeedOp], Move] = {
    (S.DORMANT, Op.GERMINATE): Move(S.GERMINATED, G.G0_SANITY),
    (S.GERMINATED, Op.START_TRAINING): Move(S.TRAINING, G.G1_GRADIENT_HEALTH),
    (S.TRAINING, Op.START_GRAFTING): Move(S.BLENDING, G.G1_GRADIENT_HEALTH),
    (S.BLENDING, Op.STABILIZE): Move(S.SHADOWING, G.G2_STABILITY),
    (S.SHADOWING, Op.EVALUATE): Move(S.PROBATIONARY, G.G3_INTERFACE),
    (S.PROBATIONARY, Op.FINE_TUNE): Move(S.PROBATIONARY, None),
    (S.PROBATIONARY, Op.FOSSILIZE): Move(S.FOSSILIZED, G.G4_SYSTEM_IMPACT),
    (S.GERMINATED, Op.CANCEL): Move(S.RESETTING, None),
    (S.TRAINING, Op.CANCEL): Move(S.RESETTING, None),
    **{(stage, Op.CULL): Move(S.CULLED, None) for stage in _CULLABLE},
}

FORWARD: dict[SeedStage, SeedOp] = {
    S.GERMINATED: Op.START_TRAINING,
    S.TRAINING: Op.START_GRAFTING,
    S.BLENDING: Op.STABILIZE,
    S.SHADOWING: Op.EVALUATE,
    S.PROBATIONARY: Op.FOSSILIZE,
}
"""The operation that leads a seed on to the next stage."""

GRADIENT_WEIGHT: dict[SeedStage, float] = {S.GERMINATED: 0.01, S.TRAINING: 0.1, S.SHADOWING: 0.5}
"""Share of a seed in the multi-seed aggregation, by stage; BLENDING weighs alpha, a fine-tuned PROBATIONARY 1."""

HOLDS_SEED = frozenset({*_CULLABLE, S.FOSSILIZED})
"""Stages in which the slot holds a module with parameters and optimizer state."""


def move(stage: SeedStage, operation: SeedOp) -> Move:
    """The move for an operation in a stage, or CommandRefused("illegal_transition") that lists the legal ones."""
    found = MOVES.get((stage, operation))
    if found is None:
        legal = ", ".join(o.name for (s, o) in MOVES if s == stage) or "none"
        raise CommandRefused("illegal_transition", f"{operation.name} is not legal in {stage.name}; legal: {legal}")
    return found


def after_boundary(stage: SeedStage, boundaries_in_stage: int, embargo_boundaries: int) -> SeedStage:
    """The stage that follows by itself at a boundary (RESETTING leaves only through gate G5, checked by the caller)."""
    if stage == S.CULLED:
        return S.EMBARGOED
    if stage == S.EMBARGOED and boundaries_in_stage >= embargo_boundaries:
        return S.RESETTING
    if stage == S.RESETTING:
        return S.DORMANT
    return stage


def alpha_at(schedule: str, position: int, steps: int) -> float:
    """Alpha after ``position`` of ``steps`` optimizer steps: exactly 0 at 0, exactly 1 from ``steps`` on.

    sigmoid: sigma((t - 0.5) * 2 * pi * tau) with tau = 2, rescaled so that it reaches 0 and 1 exactly.
    """
    if position <= 0:
        return 0.0
    if position >= steps:
        return 1.0
    t = position / steps
    if schedule == "linear":
        return t
    if schedule == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * t)
    if schedule == "sigmoid":
        tau = 2.0
        low, high = _sigmoid(-math.pi * tau), _sigmoid(math.pi * tau)
        return (_sigmoid((t - 0.5) * 2 * math.pi * tau) - low) / (high - low)
    raise ValueError(f"schedule={schedule!r}: expected sigmoid, linear or cosine")


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
