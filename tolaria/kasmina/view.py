"""A slot as the policy sees it."""

import math

from tolaria.kasmina.candidates import flops_of
from tolaria.kasmina.gates import GateResult
from tolaria.kasmina.seed import Seed
from tolaria.leyline.types import SeedState


def seed_state(seed: Seed, *, depth: int, gate: GateResult | None, learning_rate: float) -> SeedState:
    """``gate``: the one on the seed's way forward, as it stands now; ``depth``: the slot's place among the slots."""
    evidence = seed.evidence
    metrics = {
        "parameters": float(seed.parameter_count),
        "alpha": seed.alpha_value,
        "boundaries_in_stage": float(seed.boundaries_in_stage),
        "fine_tuning": float(seed.fine_tuning),
        "gate_ok": float(gate is None or gate.ok),
    }
    flops = flops_of(seed.blueprint, seed.shape)
    metrics |= {"flops": float(flops)} if flops is not None else {}
    measured = {"contribution": evidence.contribution, "contribution_noise": evidence.contribution_noise}
    norm = evidence.gradient_norms[-1] if evidence.gradient_norms else 0.0
    return SeedState(
        seed_id=seed.slot,
        stage=seed.stage,
        gradient_norm=norm if math.isfinite(norm) else 0.0,
        learning_rate=learning_rate,
        layer_depth=depth,
        metrics=metrics | {name: value for name, value in measured.items() if math.isfinite(value)},
        age_epochs=seed.age_boundaries,
        risk_score=0.0 if gate is None or gate.ok else 1.0,
    )
