"""Grow when the validation loss stops falling; keep what helps, remove what does not.

    plateau -> GERMINATE -> START_TRAINING -> START_GRAFTING -> STABILIZE -> EVALUATE -> FOSSILIZE or CULL

One seed at a time and one operation per boundary. It reads only the state that it is given, so a restarted policy
goes on as the old one would have, provided the trainer sends recent losses (`LOSS_HISTORY`).
"""

from collections.abc import Sequence

from tolaria.leyline.types import Command, FieldReport, SeedOp, SeedStage, SeedState, SystemState
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import Policy, boundary_of

LOSS_HISTORY = "loss_history/"
"""Prefix of training metrics with earlier validation losses: ``loss_history/1`` is one boundary ago."""

SLOT_RANK = "slot_rank/"
"""Prefix of training metrics with the per-sample rank of each slot's tensor: 3 image, 2 tokens, 1 vector."""

BOUNDARIES_LEFT = "boundaries_left"
"""Training metric: boundaries until the planned end. Nothing is germinated that could not be judged by then."""

CONSERVATIVE = "conservative"
"""Training metric: 1 in conservative mode, when every structural command would be refused."""

_BLUEPRINT_OF_RANK = {1: "residual_mlp", 2: "residual_mlp", 3: "conv_residual"}

_NEXT = {
    SeedStage.GERMINATED: (
        SeedOp.START_TRAINING,
        "gradients of the host healthy, {waited} after germination",
    ),
    SeedStage.TRAINING: (SeedOp.START_GRAFTING, "trained behind the host for {waited}, gradient {norm:.3g}"),
    SeedStage.BLENDING: (SeedOp.STABILIZE, "alpha {alpha:g} after {waited}, validation loss within bounds"),
    SeedStage.SHADOWING: (SeedOp.EVALUATE, "output probed for {waited}: finite and in scale"),
}
"""What follows once a stage's gate would pass, and why."""

_GROWING = frozenset({*_NEXT, SeedStage.PROBATIONARY})


class HeuristicPolicy(Policy):
    """The built-in policy.

    blueprint: name of the blueprint to grow, or "auto": by the shape of the slot's tensor.
    patience: boundaries over which the loss must have improved.
    min_delta: smallest improvement that counts, as a share of the loss before.
    train_boundaries: boundaries a seed trains behind the host before it is grafted.
    stall_boundaries: boundaries a seed may wait for a gate before it is culled.
    fine_tune_boundaries: boundaries a probationary seed learns at full weight before it is judged; 0: none.
    min_contribution: validation loss without the seed minus with it that a seed must reach to be kept.
    """

    version = "heuristic-1"

    def __init__(
        self,
        *,
        blueprint: str = "auto",
        patience: int = 2,
        min_delta: float = 0.01,
        train_boundaries: int = 2,
        stall_boundaries: int = 6,
        fine_tune_boundaries: int = 0,
        min_contribution: float = 0.0,
    ) -> None:
        whole = {"patience": (patience, 1), "train_boundaries": (train_boundaries, 1)}
        whole |= {"stall_boundaries": (stall_boundaries, 1), "fine_tune_boundaries": (fine_tune_boundaries, 0)}
        for name, (value, least) in whole.items():
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number, {least} or more")
        if not 0 <= min_delta < 1:
            raise ValueError(f"min_delta={min_delta!r}: expected 0 <= value < 1")
        self._blueprint = blueprint
        self._patience = patience
        self._min_delta = min_delta
        self._train_boundaries = train_boundaries
        self._stall_boundaries = stall_boundaries
        self._fine_tune_boundaries = fine_tune_boundaries
        self._min_contribution = min_contribution
        self._losses: dict[int, float] = {}

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        """At most one command for each growing seed, or one GERMINATE when none grows."""
        self._remember(state)
        if state.training_metrics.get(CONSERVATIVE, 0.0) > 0:
            return []
        growing = [seed for seed in state.seeds if seed.stage in _GROWING]
        if growing:
            commands = [self._advance(seed) for seed in growing]
            return [command for command in commands if command is not None]
        command = self._grow(state)
        return [] if command is None else [command]

    def _remember(self, state: SystemState) -> None:
        """Keep the losses of the two windows that `_plateau` compares; after a rollback forget the undone ones."""
        now = boundary_of(state)
        window = range(now - 2 * self._patience, now)
        for back in range(1, 2 * self._patience + 1):
            loss = state.training_metrics.get(f"{LOSS_HISTORY}{back}")
            if loss is not None:
                self._losses[now - back] = loss
        self._losses = {boundary: loss for boundary, loss in self._losses.items() if boundary in window}
        self._losses[now] = state.validation_loss

    def _plateau(self, now: int) -> str | None:
        """Why growth is due, or None: the loss still falls, or too little of it was seen."""
        recent = [self._losses.get(now - back) for back in range(self._patience)]
        before = [loss for boundary, loss in self._losses.items() if boundary <= now - self._patience]
        known = [loss for loss in recent if loss is not None]
        if len(known) < self._patience or not before:
            return None
        best, reference = min(known), min(before)
        if best < reference - self._min_delta * abs(reference):
            return None
        return (
            f"validation loss {best:.4g}, {reference:.4g} before: "
            f"not {self._min_delta:.1%} better in {_boundaries(self._patience)}"
        )

    def _grow(self, state: SystemState) -> Command | None:
        free = [seed for seed in state.seeds if seed.stage == SeedStage.DORMANT]
        settled = [s.metrics.get("boundaries_in_stage", 0.0) for s in state.seeds if s.stage == SeedStage.FOSSILIZED]
        if not free or (settled and min(settled) < self._patience):
            return None
        left = state.training_metrics.get(BOUNDARIES_LEFT)
        # One boundary each to train, graft, stabilize, evaluate, and judge, beside the stages that last longer.
        if left is not None and left < self._train_boundaries + self._fine_tune_boundaries + 5:
            return None
        reason = self._plateau(boundary_of(state))
        if reason is None:
            return None
        slot = free[0].seed_id
        return do.germinate(slot, self._blueprint_for(slot, state), reason=reason)

    def _blueprint_for(self, slot: str, state: SystemState) -> str:
        if self._blueprint != "auto":
            return self._blueprint
        rank = int(state.training_metrics.get(f"{SLOT_RANK}{slot}", 1))
        return _BLUEPRINT_OF_RANK.get(rank, "residual_mlp")

    def _advance(self, seed: SeedState) -> Command | None:
        """The next operation on a growing seed; None: wait."""
        waited = int(seed.metrics.get("boundaries_in_stage", 0.0))
        alpha = seed.metrics.get("alpha", 0.0)
        if seed.stage == SeedStage.PROBATIONARY:
            return self._judge(seed, waited)
        if seed.stage == SeedStage.BLENDING and alpha < 1.0:
            return None
        trained = seed.stage != SeedStage.TRAINING or waited >= self._train_boundaries
        if trained and seed.metrics.get("gate_ok", 0.0) > 0:
            operation, reason = _NEXT[seed.stage]
            numbers = {"waited": _boundaries(waited), "alpha": alpha, "norm": seed.gradient_norm}
            return do.seed_command(operation, seed.seed_id, reason=reason.format(**numbers))
        return self._cull_if_stalled(seed, waited)

    def _judge(self, seed: SeedState, waited: int) -> Command | None:
        contribution = seed.metrics.get("contribution")
        if contribution is None:
            return self._cull_if_stalled(seed, waited)
        against = f"contribution {contribution:+.4g}, needed {self._min_contribution:.4g}"
        if waited < self._fine_tune_boundaries:
            # A seed without gradient is not being fine-tuned yet; asking again would only repeat the command.
            return None if seed.gradient_norm > 0 else do.fine_tune(seed.seed_id, reason=against)
        if contribution < self._min_contribution:
            return do.cull(seed.seed_id, reason=against)
        if seed.metrics.get("gate_ok", 0.0) > 0:
            return do.fossilize(seed.seed_id, reason=against)
        return self._cull_if_stalled(seed, waited)

    def _cull_if_stalled(self, seed: SeedState, waited: int) -> Command | None:
        allowed = self._stall_boundaries + (self._train_boundaries if seed.stage == SeedStage.TRAINING else 0)
        if waited < allowed:
            return None
        reason = f"{_boundaries(waited)} in {seed.stage.name} and its gate still refuses"
        return do.cull(seed.seed_id, reason=reason)


def _boundaries(number: int) -> str:
    return "1 boundary" if number == 1 else f"{number} boundaries"
