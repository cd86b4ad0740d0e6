"""What two arms over the same data say about a change: in numbers with their noise, and in words. Pure."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from tolaria.telemetry.summary import NOISE_ERRORS

BLOCKS = 10
CURVE_POINTS = 40


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm. losses: of every step, over all ranks. val_loss, val_noise, accuracy: after its last step, None where
    it was not measured. ended: why it did not take all its steps, "" if it did. seconds: steps and validation."""

    losses: Sequence[float]
    ended: str = ""
    val_loss: float | None = None
    val_noise: float | None = None
    accuracy: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a change did, beside the same steps without it. Differences are changed minus control.

    steps: taken by both arms. train_steps: the last of them, over which the training loss is compared, step by step on
    the same data; train_error: the standard error of that mean, from blocks of steps in a row. val_difference,
    val_error: over the same validation samples, pairwise; the error says how far another sample of data of that size
    might be off, and nothing of other seeds. None: not known.
    """

    what: str
    at_step: int
    steps: int
    control: Arm
    changed: Arm
    train_steps: int = 0
    train_difference: float | None = None
    train_error: float | None = None
    val_difference: float | None = None
    val_error: float | None = None
    digest: str = ""

    @property
    def verdict(self) -> str:
        """One sentence."""
        for arm, other, name in ((self.changed, self.control, "with"), (self.control, self.changed, "without")):
            if arm.ended:
                alone = "" if other.ended else ", and not otherwise"
                return f"training failed after {len(arm.losses)} steps {name} the change{alone}: {arm.ended}"
        after = f"after {self.steps} step{'s' if self.steps != 1 else ''}"
        if self.val_difference is None or self.val_error is None:
            return f"too little validation data to tell {after}"
        size = with_error(self.val_difference, self.val_error)
        if self.val_difference == 0 or abs(self.val_difference) < NOISE_ERRORS * self.val_error:
            return f"no effect on the validation loss beyond its noise ({size}) {after}"
        return f"{'lowers' if self.val_difference < 0 else 'raises'} the validation loss by {size[1:]} {after}"

    def to_json(self) -> dict[str, Any]:
        """For the answer and the run's events: JSON without NaN, the losses of steps thinned out to a curve."""
        arms = {}
        for name in ("control", "changed"):
            arm: Arm = getattr(self, name)
            last = arm.losses[: self.steps][-self.train_steps :] if self.train_steps else ()
            arms[name] = {
                **asdict(arm), "steps": len(arm.losses), "losses": curve(arm.losses),
                "train_loss": mean(last) if last else None,
            }  # fmt: skip
        found = _plain({**asdict(self), **arms, "verdict": self.verdict})
        assert isinstance(found, dict)  # noqa: S101 - it was one
        return found


def compared(control: Sequence[float], changed: Sequence[float]) -> tuple[int, float | None, float | None]:
    """(steps, mean difference, its standard error) over the last half of the steps that both arms took.

    Differences of neighbouring steps resemble each other, so the error is that of the means of up to `BLOCKS` blocks.
    """
    both = min(len(control), len(changed))
    pairs = [b - a for a, b in zip(control[:both], changed[:both], strict=True)][both // 2 :]
    if not pairs or not all(map(math.isfinite, pairs)):
        return len(pairs), None, None
    count = min(BLOCKS, len(pairs))
    edges = [len(pairs) * at // count for at in range(count + 1)]
    means = [mean(pairs[a:b]) for a, b in pairwise(edges)]
    if count < 2:
        return len(pairs), mean(pairs), None
    centre = mean(means)
    spread = sum((m - centre) ** 2 for m in means) / (count - 1)
    return len(pairs), mean(pairs), math.sqrt(spread / count)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def with_error(value: float, error: float) -> str:
    """A signed difference with its standard error, both to the error's second digit: "-0.0114 +- 0.0009"."""
    if not 0 < error < math.inf:
        return f"{value:+.2g} +- {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:+.{decimals}f} +- {error:.{decimals}f}"


def curve(losses: Sequence[float]) -> list[float]:
    """At most `CURVE_POINTS` means of steps in a row."""
    count = min(CURVE_POINTS, len(losses))
    edges = [len(losses) * at // count for at in range(count + 1)] if count else []
    return [mean(losses[a:b]) for a, b in pairwise(edges)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
