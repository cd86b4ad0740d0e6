"""The gates between stages: pure functions of what was measured, with the reason in words.

Everything a gate looks at is reduced over ranks before, so that all ranks come to the same answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tolaria.config import KasminaConfig
from tolaria.leyline.types import SeedGate


@dataclass(frozen=True)
class GateResult:
    """Whether a gate lets the seed pass, and why."""

    gate: SeedGate
    ok: bool
    reason: str


@dataclass
class Evidence:
    """What was measured of one seed. Losses are means over the validation set; norms are global gradient norms.

    ``contribution_noise``: standard error of the contribution, of the differences sample by sample.
    """

    gradient_norms: list[float] = field(default_factory=list)
    loss_before_graft: float = math.nan
    loss_now: float = math.nan
    loss_with: float = math.nan
    loss_without: float = math.nan
    contribution_noise: float = math.nan
    output_ratio: float = math.nan
    non_finite_outputs: int = 0
    shape_mismatch: str = ""

    @property
    def contribution(self) -> float:
        """Validation loss without the seed minus with it; NaN until both were measured."""
        return self.loss_without - self.loss_with


def g0_sanity(parameters: int, grown: int, config: KasminaConfig, *, bytes_each: int) -> GateResult:
    """Is there room for ``parameters`` more, with ``grown`` parameters of seeds in the model already?

    ``bytes_each``: device memory of one trained parameter, with its gradient and optimizer state. Snapshots are not
    counted: they lie in host memory, under a limit of their own.
    """
    gate = SeedGate.G0_SANITY
    if parameters == 0:
        return GateResult(gate, False, "the blueprint has no parameters")
    each = f" ({bytes_each} bytes a parameter, with gradient and optimizer state)"
    limits = (
        ("max_seed_parameters", config.max_seed_parameters, 0, 1.0, "parameters", ""),
        ("max_grown_parameters", config.max_grown_parameters, grown, 1.0, "parameters", ""),
        ("max_seed_mb", config.max_seed_mb or math.inf, 0, bytes_each / 2**20, "MiB", each),
        ("max_grown_mb", config.max_grown_mb or math.inf, grown, bytes_each / 2**20, "MiB", each),
    )
    for key, limit, held, unit, name, note in limits:
        if (held + parameters) * unit > limit:
            need = f"{held * unit:.7g} + {parameters * unit:.7g}" if held else f"{parameters * unit:.7g}"
            return GateResult(gate, False, f"{need} {name} exceed kasmina.{key}={limit:.7g}{note}")
    return GateResult(gate, True, f"{parameters} parameters fit")


def g1_gradient_health(norms: Sequence[float], window: int, whose: str) -> GateResult:
    """Were the last ``window`` gradient norms finite and above zero?"""
    gate = SeedGate.G1_GRADIENT_HEALTH
    if len(norms) < window:
        return GateResult(gate, False, f"{len(norms)} of {window} gradients of {whose} seen")
    recent = list(norms)[-window:]
    bad = [n for n in recent if not (math.isfinite(n) and n > 0)]
    if bad:
        return GateResult(gate, False, f"{len(bad)} of the last {window} gradients of {whose} were zero or not finite")
    return GateResult(gate, True, f"gradient norm of {whose} {recent[-1]:.3g}, {window} in a row finite and non-zero")


def g2_stability(alpha: float, evidence: Evidence, config: KasminaConfig) -> GateResult:
    """Is alpha at 1, and is the validation loss not much worse than before the graft?"""
    gate = SeedGate.G2_STABILITY
    if alpha < 1.0:
        return GateResult(gate, False, f"alpha is {alpha:.3f}, not 1")
    before, now = evidence.loss_before_graft, evidence.loss_now
    if not math.isfinite(now):
        return GateResult(gate, False, f"validation loss is {now}")
    if math.isfinite(before) and now > config.max_loss_ratio * before:
        return GateResult(gate, False, f"validation loss {now:.4g} exceeds {config.max_loss_ratio} x {before:.4g}")
    return GateResult(gate, True, f"alpha 1, validation loss {before:.4g} -> {now:.4g}")


def g3_interface(evidence: Evidence, config: KasminaConfig) -> GateResult:
    """Did the seed, probed in validation, keep shape, finiteness and scale?"""
    gate = SeedGate.G3_INTERFACE
    if evidence.shape_mismatch:
        return GateResult(gate, False, f"output shape {evidence.shape_mismatch}")
    if evidence.non_finite_outputs:
        return GateResult(gate, False, f"{evidence.non_finite_outputs} outputs are not finite")
    if not math.isfinite(evidence.output_ratio):
        return GateResult(gate, False, "not probed yet")
    if evidence.output_ratio > config.output_ratio:
        return GateResult(gate, False, f"|f|/|h| = {evidence.output_ratio:.3g} exceeds {config.output_ratio}")
    return GateResult(gate, True, f"shape kept, finite, |f|/|h| = {evidence.output_ratio:.3g}")


def g4_system_impact(evidence: Evidence, config: KasminaConfig) -> GateResult:
    """Is the counterfactual contribution at or above the threshold, and by enough standard errors?"""
    gate = SeedGate.G4_SYSTEM_IMPACT
    gain, noise = evidence.contribution, evidence.contribution_noise
    if not math.isfinite(gain):
        return GateResult(gate, False, "contribution not measured yet")
    known = math.isfinite(noise)
    told = f"contribution {gain:+.4g}" + (f" +- {noise:.2g}" if known else "")
    losses = f"validation loss {evidence.loss_without:.4g} without, {evidence.loss_with:.4g} with the seed"
    certain = not config.min_certainty or (known and gain - config.min_contribution >= config.min_certainty * noise)
    if gain >= config.min_contribution and not certain:
        return GateResult(gate, False, f"{told} is not {config.min_certainty:g} standard errors clear ({losses})")
    return GateResult(gate, gain >= config.min_contribution, f"{told} ({losses})")


def g5_reset(left_overs: Sequence[str]) -> GateResult:
    """Is nothing of the old seed left in the slot, the optimizer or the schedules?"""
    if left_overs:
        return GateResult(SeedGate.G5_RESET, False, "left over: " + ", ".join(left_overs))
    return GateResult(SeedGate.G5_RESET, True, "slot clean")
