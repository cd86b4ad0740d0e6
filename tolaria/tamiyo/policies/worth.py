"""What a seed is worth: which one to grow where, and whether one that has grown is kept. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from tolaria.leyline.types import SeedState
from tolaria.tamiyo.sight import BUDGET, COST, FLOPS, FLOPS_PER_SAMPLE, SIGNAL


@dataclass(frozen=True)
class Offer:
    """A blueprint that could grow in a slot. ``flops``: those of the model with it, relative to the model without."""

    slot: str
    blueprint: str
    signal: float
    parameters: int
    flops: float
    score: float

    def __str__(self) -> str:
        return f"gradient {self.signal:.2g}, {self.parameters:,} parameters, FLOPs x{self.flops:.3g}"


def offers(
    free: Iterable[SeedState], training_metrics: Mapping[str, float], *, blueprint: str | None, flops_weight: float
) -> list[Offer]:
    """What fits the budget, best first; only ``blueprint`` unless that is None. Empty if no signal was sent.

    To first order a step that moves each of a seed's n parameters by the same small amount, which is what Adam does,
    lowers the loss in proportion to at most ``signal * sqrt(n)``. Set against what a step then costs, this is

        score = signal * sqrt(n) / (FLOPs with the seed / FLOPs without) ** flops_weight

    the gain of a step at a weight of 0, the gain of a FLOP at 1. Equal scores: the smaller one, then by name.
    """
    budget = training_metrics.get(BUDGET, math.inf)
    host = training_metrics.get(FLOPS_PER_SAMPLE, 0.0)
    found = []
    for slot in free:
        for key, signal in slot.metrics.items():
            name = key.removeprefix(SIGNAL)
            if name == key or signal <= 0 or (blueprint is not None and name != blueprint):
                continue
            parameters = int(slot.metrics.get(f"{COST}{name}", 1))
            if parameters > budget:
                continue
            ratio = 1 + slot.metrics.get(f"{FLOPS}{name}", 0.0) / host if host > 0 else 1.0
            score = signal * math.sqrt(parameters) / ratio**flops_weight
            found.append(Offer(slot.seed_id, name, signal, parameters, ratio, score))
    return sorted(found, key=lambda offer: (-offer.score, offer.parameters, offer.slot, offer.blueprint))


def at_once(ranked: Iterable[Offer], most: int, budget: float) -> list[Offer]:
    """The best of ``ranked`` for up to ``most`` slots, one in each, that fit a budget of parameters together."""
    chosen: list[Offer] = []
    for offer in ranked:
        spent = sum(other.parameters for other in chosen)
        if len(chosen) < most and offer.slot not in {o.slot for o in chosen} and spent + offer.parameters <= budget:
            chosen.append(offer)
    return chosen


class Verdict(Enum):
    """What a measured contribution says."""

    PAYS = "pays"
    UNDECIDED = "undecided"
    COSTS = "does not pay"


def judge(contribution: float, *, noise: float, needed: float, z: float) -> Verdict:
    """Is ``contribution`` (loss without the seed minus with it) at least ``needed``, beyond ``z`` standard errors?"""
    if contribution - z * noise >= needed:
        return Verdict.PAYS
    return Verdict.UNDECIDED if contribution + z * noise >= needed else Verdict.COSTS


def cost_ratio(seed: SeedState, training_metrics: Mapping[str, float]) -> float | None:
    """What an active seed costs over what the model without it does: FLOPs, or parameters if no FLOPs were sent."""
    for own, whole in (("flops", FLOPS_PER_SAMPLE), ("parameters", "parameters")):
        cost, total = seed.metrics.get(own, 0.0), training_metrics.get(whole, 0.0)
        if 0 < cost < total:
            return cost / (total - cost)
    return None


def host_alternative(fall: float, *, at: float, end: float, left: float, ratio: float) -> float:
    """Loss that the host would shed without the seed, for the FLOPs that the seed takes to the end of the run.

    ``fall``: loss per boundary that the host was certain to shed around boundary ``at``; ``end``: the last boundary;
    ``left``: boundaries until then; ``ratio``: see `cost_ratio`. The FLOPs buy ``left * ratio`` boundaries beyond the
    end. A loss falls ever slower, roughly with the logarithm of time (a power law with a small exponent, as in Kaplan
    et al. 2020, arXiv 2001.08361), so what one boundary sheds goes with 1 / time:

        integral of fall * at / t from end to end + left * ratio = fall * at * log(1 + left * ratio / end)
    """
    return max(0.0, fall) * at * math.log1p(left * ratio / end) if end > 0 else 0.0
