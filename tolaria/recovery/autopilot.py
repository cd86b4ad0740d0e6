"""When a run goes back by itself, how far, when it gives up. Pure: numbers to an incident, an incident to a plan.

Every judgement is made on values that are equal on all ranks (the loss reduced over them, whether the step was taken),
so all ranks come to the same conclusion without asking each other.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, NamedTuple, TypeAlias

from tolaria.config_recovery import RecoveryConfig
from tolaria.data import Window

REMEMBERED_STEPS = 64
COLLAPSE_HISTORY = 8

Cause: TypeAlias = Literal["loss_spike", "non_finite", "collapse", "drift", "command", "emergency", "undo"]
ASKED_FOR = ("command", "undo")
"""Causes with which nothing is wrong: somebody wants the run to be elsewhere."""


class StepFact(NamedTuple):
    """One step that is over: its number (counted from 1), the window of its samples, its mean loss over all ranks."""

    step: int
    window: Window
    taken: bool
    loss: float

    @property
    def samples(self) -> int:
        """How many the loss is the mean of."""
        _, start, end = self.window
        return end - start


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Why the run should not go on from where it is.

    ``step``: where it was noticed. ``first``: the first step that may be to blame; states after fewer steps are
    sound. ``windows``: the samples of the steps to blame, oldest first. ``checkpoint``: the number of the one to go
    back to, where that was asked for. ``before_act``: the operator's act that the state must not have seen.
    """

    cause: Cause
    level: int
    reason: str
    step: int
    first: int
    windows: tuple[Window, ...] = ()
    checkpoint: int | None = None
    before_act: int | None = None


class SpikeWatch:
    """Judges the loss of each step against the running median of those before. Equal on all ranks."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._bad: list[StepFact] = []
        self._steps: deque[StepFact] = deque(maxlen=REMEMBERED_STEPS)

    def add(self, fact: StepFact) -> Incident | None:
        """One more step; an incident if it is a spike, or the last of too many without a finite gradient."""
        self._steps.append(fact)
        if not fact.taken or not math.isfinite(fact.loss):
            self._bad.append(fact)
            if fact.taken or len(self._bad) >= self._config.non_finite_steps:
                what = f"{len(self._bad)} steps in a row" if len(self._bad) > 1 else f"step {fact.step}"
                return self._incident("non_finite", f"loss or gradient not finite in {what}", self._bad)
            return None
        self._bad = []
        if len(self._losses) >= self._config.spike_min_losses:
            reason = self._spike(fact)
            if reason is not None:
                return self._incident("loss_spike", reason, [fact])
        self._losses.append(fact.loss)
        return None

    def _spike(self, fact: StepFact) -> str | None:
        """Why the loss is one; None if it is not.

        The mean over few samples scatters more than that over many, so an epoch's short last step is judged as if
        the samples that it lacks had the usual loss.
        """
        if fact.loss <= self._config.spike_ratio * min(self._losses):
            return None  # the median is no less than the least, which is found in a tenth of the time
        usual = median(self._losses)
        bound = self._config.spike_ratio * usual
        if usual <= 0 or fact.loss <= bound:
            return None
        share = fact.samples / max(step.samples for step in self._steps)
        if usual + (fact.loss - usual) * share <= bound:
            return None
        times = fact.loss / usual
        often = f"{times:.1f}" if times < 100 else f"{times:,.0f}"
        return f"loss {fact.loss:.4g} is {often} times the running median {usual:.4g}"

    def reset(self) -> None:
        """Forget the losses: another structure has another usual loss."""
        self._losses.clear()

    def widened(self, incident: Incident, times: int) -> Incident:
        """The same incident with 2**times - 1 steps before it put under suspicion as well."""
        extra = [f for f in self._steps if f.step < incident.first][-(2**times - 1) :] if times else []
        if not extra:
            return incident
        windows = (*(f.window for f in extra), *incident.windows)
        return Incident(
            cause=incident.cause, level=incident.level, reason=incident.reason, step=incident.step,
            first=extra[0].step, windows=windows,
        )  # fmt: skip

    def _incident(self, cause: Cause, reason: str, blamed: Sequence[StepFact]) -> Incident:
        windows = tuple(fact.window for fact in blamed)
        return Incident(
            cause=cause, level=3, reason=reason, step=blamed[-1].step, first=blamed[0].step, windows=windows
        )

    def state_dict(self) -> dict[str, Any]:
        """Losses and remembered steps, as JSON without rounding."""
        return {
            "losses": [loss.hex() for loss in self._losses],
            "steps": [fact_to_json(f) for f in self._steps],
            "bad": [fact_to_json(f) for f in self._bad],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._losses = deque(map(float.fromhex, state["losses"]), maxlen=self._config.spike_window)
        self._steps = deque(map(fact_from_json, state["steps"]), maxlen=REMEMBERED_STEPS)
        self._bad = [fact_from_json(f) for f in state["bad"]]


def fact_to_json(fact: StepFact) -> list[Any]:
    """As JSON without rounding."""
    return [fact.step, list(fact.window), fact.taken, fact.loss.hex()]


def fact_from_json(saved: Sequence[Any]) -> StepFact:
    """What `fact_to_json` made JSON of."""
    step, (epoch, start, end), taken, loss = saved
    return StepFact(step=step, window=(epoch, start, end), taken=taken, loss=float.fromhex(loss))


def collapse(losses: Iterable[float], accuracies: Iterable[float], ratio: float) -> str | None:
    """Why the newest validation is a collapse, None if it is not. Oldest first, the newest is judged."""
    *before, loss = losses
    *former, accuracy = accuracies
    if not math.isfinite(loss):
        return f"validation loss is {loss}"
    if not before:
        return None
    best, reached = min(before[-COLLAPSE_HISTORY:]), max(former[-COLLAPSE_HISTORY:])
    # A ratio says nothing of losses that may be negative.
    if 0 < best < loss / ratio and accuracy < reached / 2:
        return f"validation loss {best:.4g} -> {loss:.4g}, accuracy {reached:.1%} -> {accuracy:.1%}"
    return None


@dataclass(frozen=True)
class Attempt:
    """What the next return does beside going back. ``older``: so many snapshots further back than the newest one.
    ``held``: conservative until a command ends it. ``stop``: no further return; why."""

    older: int = 0
    held: bool = False
    stop: str = ""


def plan_attempt(incident: Incident, earlier: Sequence[int], config: RecoveryConfig) -> Attempt:
    """``earlier``: the steps from which the run went back before, in its whole life."""
    recent = [step for step in earlier if abs(incident.step - step) < config.attempt_steps]
    if len(recent) > config.attempts:
        return Attempt(
            stop=f"{incident.reason}; the run has gone back {len(recent)} times within {config.attempt_steps} steps "
            f"(from steps {', '.join(map(str, recent[-8:]))}), last in conservative mode, and it happened again"
        )
    return Attempt(older=len(recent), held=len(recent) == config.attempts)


def same_place(incident: Incident, earlier: Sequence[int], config: RecoveryConfig) -> int:
    """How many of the earlier returns began where this incident is, give or take the median's window."""
    return min(5, sum(abs(incident.step - step) <= config.spike_window for step in earlier))
