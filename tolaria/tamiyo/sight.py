"""What a policy sees of a run, by name and type instead of by key.

    from tolaria.tamiyo.sight import Sight

    def decide(self, state, reports):
        sees = Sight(state)
        if sees.conservative or not sees.free:
            return []
        best = max(sees.free[0].candidates, key=lambda c: c.signal, default=None)
        ...

Nothing is computed that the packet does not hold, and nothing is raised for what it leaves out: a number that was not
sent is None, a list of what was not sent is empty. `SystemState` stays within reach as ``sees.state``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tolaria.leyline.limits import MAX_MEASUREMENT
from tolaria.leyline.types import Command, SeedOp, SeedStage, SeedState, SystemState
from tolaria.tamiyo.policy import boundary_of, seed_command

LOSS_HISTORY = "loss_history/"
"""Prefix of training metrics with earlier validation losses: ``loss_history/1`` is one boundary ago."""

HISTORY = 16
"""So many earlier losses are sent, at most."""

SLOT_RANK = "slot_rank/"
"""Prefix of training metrics with the per-sample rank of each slot's tensor: 3 image, 2 tokens, 1 vector."""

BOUNDARIES_LEFT = "boundaries_left"
"""Training metric: boundaries until the planned end."""

CONSERVATIVE = "conservative"
"""Training metric: 1 in conservative mode, when every structural command would be refused."""

BUDGET, BUDGET_MB = "budget_parameters", "budget_mb"
"""Training metrics: parameters that may still be grown, and MiB of device memory where that is limited."""

FLOPS_PER_SAMPLE = "flops_per_sample"
"""Training metric: forward FLOPs of the present model."""

SIGNAL, COST, FLOPS = "signal/", "cost/", "flops/"
"""Prefixes of a DORMANT slot's metrics, each followed by a blueprint: L2 norm of the gradient that a new seed's
parameters would get, its number of parameters, and its forward FLOPs per sample."""

METRIC = "metric/"
"""Prefix of training metrics with the task's own ones."""

FORWARD = {
    SeedStage.GERMINATED: SeedOp.START_TRAINING,
    SeedStage.TRAINING: SeedOp.START_GRAFTING,
    SeedStage.BLENDING: SeedOp.STABILIZE,
    SeedStage.SHADOWING: SeedOp.EVALUATE,
    SeedStage.PROBATIONARY: SeedOp.FOSSILIZE,
}
"""The operation that leads a seed on to its next stage."""

GROWING = frozenset(FORWARD)
"""Stages of a seed that is neither part of the host yet nor gone: it may be commanded."""


@dataclass(frozen=True)
class Candidate:
    """A blueprint that GERMINATE would accept in a slot now.

    ``signal``: L2 norm of the gradient that its parameters would get, None if not measured; ``flops``: of one sample's
    forward pass, None if they cannot be counted.
    """

    blueprint: str
    signal: float | None
    parameters: int
    flops: float | None


@dataclass(frozen=True)
class SlotSight:
    """One slot and the seed in it. ``rank``: of what flows through it per sample, None if not sent."""

    state: SeedState
    rank: int | None = None

    @property
    def name(self) -> str:
        """What commands call it."""
        return self.state.seed_id

    @property
    def stage(self) -> SeedStage:
        """DORMANT for a free slot."""
        return self.state.stage

    @property
    def ready(self) -> bool:
        """Whether the gate before the next stage would open now; False for a slot without a seed."""
        return self._number("gate_ok", 0.0) > 0

    @property
    def waited(self) -> int:
        """Boundaries in the present stage."""
        return int(self._number("boundaries_in_stage", 0.0))

    @property
    def age(self) -> int:
        """Boundaries since the seed was germinated."""
        return self.state.age_epochs

    @property
    def alpha(self) -> float:
        """How far a BLENDING seed has come, 0 to 1."""
        return self._number("alpha", 0.0)

    @property
    def gradient_norm(self) -> float:
        """L2 norm of the seed's newest gradient, 0 where it has none."""
        return self.state.gradient_norm

    @property
    def parameters(self) -> int:
        """Of the seed."""
        return int(self._number("parameters", 0.0))

    @property
    def flops(self) -> float | None:
        """Of one sample's forward pass through the seed."""
        return self.state.metrics.get("flops")

    @property
    def fine_tuning(self) -> bool:
        """Whether a PROBATIONARY seed learns."""
        return self._number("fine_tuning", 0.0) > 0

    @property
    def contribution(self) -> float | None:
        """Validation loss without the seed minus with it; None until it was measured."""
        return self.state.metrics.get("contribution")

    @property
    def contribution_noise(self) -> float:
        """Standard error of the contribution."""
        return self._number("contribution_noise", 0.0)

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """What could grow in a DORMANT slot, in the trainer's order. Empty in conservative mode, and where growth is
        not measured (``kasmina.measure_signal``)."""
        sent = self.state.metrics
        names = dict.fromkeys(
            key.removeprefix(prefix) for key in sent for prefix in (COST, SIGNAL) if key.startswith(prefix)
        )
        return tuple(
            Candidate(n, sent.get(f"{SIGNAL}{n}"), int(sent.get(f"{COST}{n}", 0)), sent.get(f"{FLOPS}{n}"))
            for n in names
        )

    def advance(self, *, reason: str = "") -> Command:
        """The command that leads the seed on to its next stage. Raises ValueError for a slot without one that grows."""
        if self.stage not in FORWARD:
            stages = ", ".join(stage.name for stage in FORWARD)
            raise ValueError(f"slot {self.name!r} is {self.stage.name}: expected one of {stages}")
        return seed_command(FORWARD[self.stage], self.name, reason=reason)

    def _number(self, key: str, missing: float) -> float:
        return self.state.metrics.get(key, missing)


class Sight:
    """A state as a policy reads it. Cheap to make; what is asked for is read then."""

    def __init__(self, state: SystemState) -> None:
        self.state = state
        self._sent = state.training_metrics

    @property
    def boundary(self) -> int:
        """Number of the boundary; the first one is 1."""
        return boundary_of(self.state)

    @property
    def conservative(self) -> bool:
        """Whether the run is in conservative mode: commands to seeds, and anything that learns faster, are refused."""
        return self._sent.get(CONSERVATIVE, 0.0) > 0

    @property
    def boundaries_left(self) -> int | None:
        """Boundaries until the planned end."""
        left = self._sent.get(BOUNDARIES_LEFT)
        return None if left is None else int(left)

    @property
    def learning_rate(self) -> float | None:
        """The host's, now."""
        return self._sent.get("learning_rate")

    @property
    def parameters(self) -> int | None:
        """Of the whole model."""
        count = self._sent.get("parameters")
        return None if count is None else int(count)

    @property
    def flops_per_sample(self) -> float | None:
        """Of the forward pass of the present model."""
        return self._sent.get(FLOPS_PER_SAMPLE)

    @property
    def skipped_steps(self) -> int:
        """Steps of the run whose gradient was not finite."""
        return int(self._sent.get("skipped_steps", 0.0))

    @property
    def validation_noise(self) -> float | None:
        """Standard error of the validation loss."""
        return self._sent.get("validation_noise")

    @property
    def healthy(self) -> bool:
        """Whether the losses are numbers: NaN and infinities travel as the largest number that the wire carries."""
        newest = (self.state.validation_loss, self.state.training_loss)
        return all(math.isfinite(loss) and abs(loss) < MAX_MEASUREMENT for loss in newest)

    @cached_property
    def losses(self) -> tuple[float, ...]:
        """Validation losses of consecutive boundaries, newest first, this one's among them."""
        found = [self.state.validation_loss]
        while (loss := self._sent.get(f"{LOSS_HISTORY}{len(found)}")) is not None:
            found.append(loss)
        return tuple(found)

    @cached_property
    def task_metrics(self) -> Mapping[str, float]:
        """The task's own metrics by name."""
        return {k.removeprefix(METRIC): v for k, v in self._sent.items() if k.startswith(METRIC)}

    @property
    def budget_parameters(self) -> float:
        """Parameters that may still be grown; infinite where no limit was sent."""
        return self._sent.get(BUDGET, math.inf)

    @property
    def budget_mb(self) -> float:
        """MiB of device memory that may still be grown; infinite where there is no limit."""
        return self._sent.get(BUDGET_MB, math.inf)

    @cached_property
    def slots(self) -> tuple[SlotSight, ...]:
        """Every slot of the model, in the trainer's order; empty for a model without."""
        ranks = {seed.seed_id: self._sent.get(f"{SLOT_RANK}{seed.seed_id}") for seed in self.state.seeds}
        return tuple(
            SlotSight(seed, None if (rank := ranks[seed.seed_id]) is None else int(rank)) for seed in self.state.seeds
        )

    def in_stage(self, *stages: SeedStage) -> tuple[SlotSight, ...]:
        """The slots in one of these stages."""
        return tuple(slot for slot in self.slots if slot.stage in stages)

    @property
    def free(self) -> tuple[SlotSight, ...]:
        """The slots in which something could grow."""
        return self.in_stage(SeedStage.DORMANT)

    @property
    def growing(self) -> tuple[SlotSight, ...]:
        """The slots whose seed is on its way."""
        return self.in_stage(*GROWING)

    def slot(self, name: str) -> SlotSight | None:
        """The slot of this name, None where the model has none."""
        return next((slot for slot in self.slots if slot.name == name), None)
