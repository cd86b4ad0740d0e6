"""How far one command may take one thing of one group: in all, and at one boundary. Pure; refuses with the bound."""

import math

from tolaria.config_tuning import LRConfig, TuningConfig
from tolaria.errors import CommandRefused
from tolaria.leyline.types import BETA1, BETA2, CLIP_NORM, LR, MOMENTUM, WEIGHT_DECAY

ROUNDING = 1e-6
"""Numbers come as 32-bit floats: what misses a bound by this much of it, after a few steps, was meant to meet it."""
_FACTORS = {WEIGHT_DECAY: "weight_decay_factor", CLIP_NORM: "clip_norm_factor"}
_CHANGES = {BETA1: "beta_change", BETA2: "beta_change", MOMENTUM: "momentum_change"}


def check_scale(
    config: TuningConfig, lr_config: LRConfig, group: str, key: str, value: float, *, old: float, settled: float
) -> float:
    """The total factor to which ``lr`` or ``lr_scale`` (``key``) of ``value`` brings a group that stands at ``old``.

    ``settled``: the group's rate at the effective step without any command and any brake. Raises CommandRefused.
    """
    if not (math.isfinite(value) and value > 0):
        raise CommandRefused("invalid_factor", f"{key}={value:g}: expected a finite number above 0")
    if key == LR:
        check_range(config, LR, group, settled * old, value)
        if settled <= 0:
            raise CommandRefused("bad_parameter", f"lr of {group!r}: its schedule is at 0, which no factor changes")
    wanted = value / settled if key == LR else old * value
    low, high = lr_config.min_scale, lr_config.max_scale
    scale = min(max(wanted, low), high)
    # What was asked for, a rate or a factor, is what a refusal speaks of.
    what, unit = ("lr", settled) if key == LR else ("total factor of the lr", 1.0)
    if not math.isclose(wanted, scale, rel_tol=ROUNDING):
        bound = (
            f"at most {high * unit:g} (lr.max_scale)" if wanted > high else f"at least {low * unit:g} (lr.min_scale)"
        )
        raise CommandRefused(
            "lr_out_of_bounds", f"{what} of {group!r} {old * unit:g} -> {wanted * unit:g}: allowed {bound}"
        )
    _by_factor(what, group, old * unit, scale * unit, config.lr_factor, "lr_factor")
    check_rate(config, group, settled * old, settled * scale)
    return scale


def check_rate(config: TuningConfig, group: str, old: float, new: float) -> None:
    """Whether a factor may take a settled rate from ``old`` to ``new``: within tuning.min_lr and tuning.max_lr or, from
    outside, not further out. Raises CommandRefused."""
    if new > max(old, config.max_lr * (1 + ROUNDING)) or new < min(old, config.min_lr * (1 - ROUNDING)):
        check_range(config, LR, group, old, new)


def check_range(config: TuningConfig, key: str, group: str, old: float, new: float) -> None:
    """Whether ``new`` lies within ``tuning.min_<key>`` and ``tuning.max_<key>``. Raises CommandRefused."""
    low, high = getattr(config, f"min_{key}"), getattr(config, f"max_{key}")
    if low <= new <= high:
        return
    bound = f"at most {high:g} (tuning.max_{key})" if new > high else f"at least {low:g} (tuning.min_{key})"
    raise CommandRefused("out_of_bounds", f"{key} of {group!r} {old:g} -> {new:g}: allowed {bound}")


def check_change(config: TuningConfig, group: str, key: str, old: float, new: float) -> None:
    """Whether a hyperparameter other than the learning rate may go from ``old`` to ``new``. Raises CommandRefused."""
    check_range(config, key, group, old, new)
    if key == MOMENTUM and (old == 0) != (new == 0):
        raise CommandRefused(
            "out_of_bounds", f"momentum of {group!r} {old:g} -> {new:g}: not to or from 0, which keeps no buffers"
        )
    if key in _FACTORS:
        if old > 0 and new > 0:
            _by_factor(key, group, old, new, getattr(config, _FACTORS[key]), _FACTORS[key])
        return
    most = getattr(config, _CHANGES[key])
    if abs(new - old) > most * (1 + ROUNDING):
        _refuse_rate(key, group, old, new, max(0.0, old - most), old + most, _CHANGES[key])


def _by_factor(key: str, group: str, old: float, new: float, factor: float, name: str) -> None:
    if not old / factor * (1 - ROUNDING) <= new <= old * factor * (1 + ROUNDING):
        _refuse_rate(key, group, old, new, old / factor, old * factor, name)


def _refuse_rate(key: str, group: str, old: float, new: float, low: float, high: float, name: str) -> None:
    raise CommandRefused(
        "rate_limited",
        f"{key} of {group!r} {old:g} -> {new:g}: one boundary allows {low:g} to {high:g} (tuning.{name})",
    )
