"""Grow when the validation loss is level beyond its noise; keep what pays, remove what does not.

    level loss -> GERMINATE -> START_TRAINING -> START_GRAFTING -> STABILIZE -> EVALUATE -> FOSSILIZE or CULL
                                                                               undecided: FINE_TUNE, then judged

What grows where is chosen by the gradient that a new seed would get, set against what it costs (`worth.offers`). Each
decision is a function of the packet, so a restarted policy goes on as the old one would have; only a trainer that
sends no `LOSS_HISTORY` makes it remember losses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tolaria.leyline.limits import MAX_COMMANDS, MAX_MEASUREMENT, clip_text, is_name
from tolaria.leyline.types import Command, FieldReport, SeedOp, SeedStage, SeedState, SystemState
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policies import trend, worth
from tolaria.tamiyo.policies.trend import Course, Trend
from tolaria.tamiyo.policies.worth import Offer, Verdict
from tolaria.tamiyo.policy import Policy, boundary_of
from tolaria.tamiyo.sight import BOUNDARIES_LEFT, COST, HISTORY, LOSS_HISTORY, SIGNAL, Sight

AUTO = "auto"
_BLUEPRINT_OF_RANK = {1: "residual_mlp", 2: "residual_mlp", 3: "conv_residual"}

_NEXT = {
    SeedStage.GERMINATED: (SeedOp.START_TRAINING, "gradients of the host healthy, {waited} after germination"),
    SeedStage.TRAINING: (SeedOp.START_GRAFTING, "trained behind the host for {waited}, gradient {norm:.3g}"),
    SeedStage.BLENDING: (SeedOp.STABILIZE, "alpha {alpha:g} after {waited}, validation loss within bounds"),
    SeedStage.SHADOWING: (SeedOp.EVALUATE, "output probed for {waited}: finite and in scale"),
}
"""What follows once a stage's gate would pass, and why."""

_SINCE_CHANGE = {
    SeedStage.FOSSILIZED: 1, SeedStage.CULLED: 0, SeedStage.EMBARGOED: 1, SeedStage.RESETTING: 1, SeedStage.DORMANT: 2,
}  # fmt: skip
"""Losses of the present structure beside those in the slot's stage: PROBATIONARY outputs what FOSSILIZED does, and
CULLED and RESETTING last a boundary each, in which nothing acts."""


_BOUNDS = (
    ("patience", int, trend.FEWEST, HISTORY), ("seeds_at_once", int, 1, 256), ("train_boundaries", int, 1, 10**6),
    ("blend_boundaries", int, 1, 10**6), ("payoff_boundaries", int, 0, 10**6), ("stall_boundaries", int, 1, 10**6),
    ("fine_tune_boundaries", int, 0, 10**6), ("min_delta", float, 0.0, 0.99), ("confidence", float, 0.51, 0.999),
    ("flops_weight", float, 0.0, 10.0), ("z", float, 0.0, 100.0), ("min_contribution", float, -1e9, 1e9),
    ("host_share", float, 0.0, 100.0),
)  # fmt: skip
"""Settings with their type and the least and the most that is accepted; a whole number is a float too."""


@dataclass(kw_only=True, eq=False)
class HeuristicPolicy(Policy):
    """The built-in policy. "Boundaries" are its unit of time, losses are the task's (nats in the built-in ones).

    blueprint: name of the blueprint to grow, or "auto": by measured gradient and cost; by the slot's shape if the
        trainer sends none. One that is named grows also where it was not measured.
    patience: boundaries of the shortest trend that is judged, 4 to 16; an unclear one is judged over all it may see.
    min_delta: the fall of the loss in ``patience`` boundaries that is worth waiting for, as a share of the loss.
    confidence: probability, one-sided, beyond which a trend is believed.
    flops_weight: how much a seed's FLOPs count against its gradient when it is chosen; 0: not at all, 1: in full.
    seeds_at_once: seeds that are germinated together, each in a slot of its own.
    train_boundaries: boundaries a seed trains behind the host before it is grafted.
    blend_boundaries: boundaries that a graft is expected to take; only for what could not be judged before the end.
    payoff_boundaries: boundaries that must be left after a seed was judged for it to be worth growing.
    stall_boundaries: boundaries a seed may wait for a gate before it is culled.
    z: standard errors by which a contribution must clear, or miss, what is needed to be decided.
    fine_tune_boundaries: boundaries that an undecided seed learns at full weight before it is judged again; 0: none.
    min_contribution: validation loss without the seed minus with it that a seed must reach to be kept.
    host_share: of the loss that the seed's FLOPs would buy by training the host alone for longer, the share that the
        seed must bring when it is judged, long before it has learned all it will; 0: not compared.
    """

    version = "heuristic-2"

    blueprint: str = AUTO
    patience: int = 5
    min_delta: float = 0.05
    confidence: float = 0.8
    flops_weight: float = 0.5
    seeds_at_once: int = 1
    train_boundaries: int = 2
    blend_boundaries: int = 3
    payoff_boundaries: int = 2
    stall_boundaries: int = 6
    z: float = 2.0
    fine_tune_boundaries: int = 2
    min_contribution: float = 0.0
    host_share: float = 0.5

    def __post_init__(self) -> None:
        self._remembered: dict[int, float] = {}
        for name, kind, least, most in _BOUNDS:
            value = getattr(self, name)
            # By type, since True is an int.
            if type(value) not in {int, kind} or not least <= value <= most:
                what = "a whole number" if kind is int else "a number"
                raise ValueError(f"{name}={value!r}: expected {what}, {least:.10g} to {most:.10g}")
        if type(self.blueprint) is not str or not is_name(self.blueprint):
            raise ValueError(f"blueprint={self.blueprint!r}: expected the name of a blueprint, or {AUTO}")

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        """At most one command for each growing seed, or GERMINATE when none grows."""
        losses = self._losses(state)
        sees = Sight(state)
        if sees.conservative:
            return []
        if sees.growing:
            commands = [self._advance(slot.state, state, losses) for slot in sees.growing]
            return [command for command in commands if command is not None][:MAX_COMMANDS]
        return self._grow(sees, losses)

    def _losses(self, state: SystemState) -> list[float]:
        """Validation losses of consecutive boundaries, newest first: the packet's; remembered ones if it has none."""
        now = boundary_of(state)
        if f"{LOSS_HISTORY}1" in state.training_metrics:
            self._remembered.clear()
            return [*Sight(state).losses[: HISTORY + 1]]
        # After a rollback the undone ones are forgotten.
        self._remembered = {b: loss for b, loss in self._remembered.items() if now - HISTORY <= b < now}
        losses = [state.validation_loss]
        while (loss := self._remembered.get(now - len(losses))) is not None:
            losses.append(loss)
        self._remembered[now] = state.validation_loss
        return losses

    # Growing

    def _grow(self, sees: Sight, losses: Sequence[float]) -> list[Command]:
        left = sees.boundaries_left
        if not sees.free or (left is not None and left < self._course()):
            return []
        reason = self._level(losses[: _settled(sees.state.seeds)])
        if reason is None:
            return []
        chosen = self._choose(sees)
        return [do.germinate(o.slot, o.blueprint, reason=_fitting(reason, str(o) if o.score else "")) for o in chosen]

    def _course(self) -> int:
        """Boundaries that a seed needs from GERMINATE to where it has paid: one each to start training, to be probed
        and to be judged, beside the stages that last longer."""
        return 3 + self.train_boundaries + self.blend_boundaries + self.payoff_boundaries

    def _choose(self, sees: Sight) -> list[Offer]:
        """One offer for each slot that is to grow. Without measured gradients, or where the blueprint that is named was
        not among those measured: the first free slots."""
        free = [slot.state for slot in sees.free]
        keys = {key for slot in free for key in slot.metrics}
        own = {SIGNAL + self.blueprint, COST + self.blueprint}
        if any(key.startswith(SIGNAL) for key in keys) and (self.blueprint == AUTO or keys & own):
            wanted = None if self.blueprint == AUTO else self.blueprint
            sent = sees.state.training_metrics
            ranked = worth.offers(free, sent, blueprint=wanted, flops_weight=self.flops_weight)
            return worth.at_once(ranked, self.seeds_at_once, sees.budget_parameters)
        chosen = []
        for slot in sees.free[: self.seeds_at_once]:
            rank = 1 if slot.rank is None else slot.rank
            fits = _BLUEPRINT_OF_RANK.get(rank, "residual_mlp") if self.blueprint == AUTO else self.blueprint
            chosen.append(Offer(slot.name, fits, 0.0, 0, 1.0, 0.0))
        return chosen

    def _level(self, newest: Sequence[float]) -> str | None:
        """Why growth is due, or None: the loss still falls, or what was seen of it does not tell."""
        found = None
        for points in (self.patience, HISTORY + 1):
            seen = newest[:points]
            if len(seen) < self.patience or max(map(abs, seen)) >= MAX_MEASUREMENT:
                return None
            found = trend.fit(seen[::-1])
            worth_having = self.min_delta * abs(found.level)
            told = trend.course(found, ahead=self.patience, worth=worth_having, confidence=self.confidence)
            if told == Course.FALLING:
                return None
            if told == Course.LEVEL:
                return self._in_words(found)
        # All that may be seen does not tell: then what there may be of a fall is not worth more waiting.
        if found is not None and found.points == HISTORY + 1 and found.fall * self.patience < worth_having:
            return self._in_words(found)
        return None

    def _in_words(self, found: Trend) -> str:
        per = self.patience / abs(found.level) if found.level else 0.0
        return (
            f"loss {found.level:.4g} level: fall {found.fall * per:.1%} +- {found.error * per:.1%} in "
            f"{self.patience} boundaries, {self.min_delta:.1%} wanted"
        )

    # Growing seeds

    def _advance(self, seed: SeedState, state: SystemState, losses: Sequence[float]) -> Command | None:
        """The next operation on a growing seed; None: wait."""
        waited = int(seed.metrics.get("boundaries_in_stage", 0.0))
        alpha = seed.metrics.get("alpha", 0.0)
        if seed.stage == SeedStage.PROBATIONARY:
            return self._judge(seed, waited, state, losses)
        if seed.stage == SeedStage.BLENDING and alpha < 1.0:
            return None
        trained = seed.stage != SeedStage.TRAINING or waited >= self.train_boundaries
        if trained and seed.metrics.get("gate_ok", 0.0) > 0:
            operation, reason = _NEXT[seed.stage]
            numbers = {"waited": _boundaries(waited), "alpha": alpha, "norm": seed.gradient_norm}
            return do.seed_command(operation, seed.seed_id, reason=reason.format(**numbers))
        return self._cull_if_stalled(seed, waited)

    def _judge(self, seed: SeedState, waited: int, state: SystemState, losses: Sequence[float]) -> Command | None:
        contribution = seed.metrics.get("contribution")
        if contribution is None:
            return self._cull_if_stalled(seed, waited)
        noise = seed.metrics.get("contribution_noise", 0.0)
        host = self.host_share * self._alternative(seed, state, losses)
        needed = max(self.min_contribution, host)
        told = worth.judge(contribution, noise=noise, needed=needed, z=self.z)
        why = f"contribution {contribution:+.4g} +- {noise:.2g}, needed {needed:.4g}"
        why += " (what its FLOPs would give the host)" if needed > self.min_contribution else ""
        last = state.training_metrics.get(BOUNDARIES_LEFT, 2.0) < 2
        if told == Verdict.UNDECIDED and waited <= self.fine_tune_boundaries and not last:
            tuned = seed.metrics.get("fine_tuning", float(waited > 1))
            return None if tuned else do.fine_tune(seed.seed_id, reason=f"{why}: undecided within {self.z:g} errors")
        if told != Verdict.PAYS:
            return do.cull(seed.seed_id, reason=why)
        if seed.metrics.get("gate_ok", 0.0) > 0:
            return do.fossilize(seed.seed_id, reason=why)
        return self._cull_if_stalled(seed, waited)

    def _alternative(self, seed: SeedState, state: SystemState, losses: Sequence[float]) -> float:
        """What the host would shed for the seed's FLOPs, by its trend before the seed was germinated."""
        sent = state.training_metrics
        # The loss at which it was germinated is as many boundaries ago as the seed is old.
        before = losses[seed.age_epochs : _settled(s for s in state.seeds if s is not seed)][: self.patience]
        ratio = worth.cost_ratio(seed, sent)
        if ratio is None or len(before) < self.patience:
            return 0.0
        found = trend.fit(before[::-1])
        certain = found.fall - trend.t_quantile(self.confidence, found.points - 2) * found.error
        now, left = boundary_of(state), sent.get(BOUNDARIES_LEFT, 0.0)
        middle = now - seed.age_epochs - (self.patience - 1) / 2
        return worth.host_alternative(certain, at=max(0.0, middle), end=now + left, left=left, ratio=ratio)

    def _cull_if_stalled(self, seed: SeedState, waited: int) -> Command | None:
        allowed = self.stall_boundaries + (self.train_boundaries if seed.stage == SeedStage.TRAINING else 0)
        if waited < allowed:
            return None
        reason = f"{_boundaries(waited)} in {seed.stage.name} and its gate still refuses"
        return do.cull(seed.seed_id, reason=reason)


def _settled(seeds: Iterable[SeedState]) -> int:
    """How many of the newest losses are those of the present structure, as far as the slots tell; at least 1."""
    known = [
        int(seed.metrics["boundaries_in_stage"]) + _SINCE_CHANGE[seed.stage]
        for seed in seeds
        if seed.stage in _SINCE_CHANGE and "boundaries_in_stage" in seed.metrics
    ]
    return max(1, min(known, default=HISTORY + 1))


def _fitting(first: str, second: str) -> str:
    """Both texts, or as much of them as the wire takes."""
    return clip_text("; ".join(part for part in (first, second) if part))


def _boundaries(number: int) -> str:
    return "1 boundary" if number == 1 else f"{number} boundaries"
