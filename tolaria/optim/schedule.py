"""The host's learning-rate schedules: shares of the peak rate as pure functions of the step."""

import math

from tolaria.config import LRConfig


def checked_rate(base_lr: float) -> float:
    """``base_lr`` as it is. Raises ValueError unless it is a finite number above 0."""
    if not (math.isfinite(base_lr) and base_lr > 0):
        raise ValueError(f"base_lr={base_lr!r}: expected a finite number above 0")
    return base_lr


def host_share(config: LRConfig, step: int, total_steps: int) -> float:
    """Warm-up and schedule of the host at ``step`` as a share of the peak rate, in [0, 1]. Pure.

    The warm-up rises linearly and reaches 1 at ``warmup_steps``. The schedule ends with its last step, number
    ``decay_steps`` (or else ``total_steps``) minus 1, and every later step has the same share as that one.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.policy == "step":
        return config.step_factor ** ((step - config.warmup_steps) // config.step_every)
    progress = _decay_progress(config, step, config.decay_steps or total_steps)
    # Two products instead of one difference, so that both ends are met exactly.
    return (1.0 - progress) + config.final_ratio * progress


def _decay_progress(config: LRConfig, step: int, length: int) -> float:
    """How much of the way from the peak to ``final_ratio`` is done, 0 to 1."""
    match config.policy:
        case "linear":
            return _elapsed(step, config.warmup_steps, length - 1)
        case "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * _elapsed(step, config.warmup_steps, length - 1)))
        case "wsd":
            decaying = round(config.wsd_decay_share * length)
            start = max(config.warmup_steps, length - 1 - decaying)
            return _elapsed(step, start, length - 1) if decaying else 0.0
        case "constant" | "step":
            return 0.0


def _elapsed(step: int, start: int, end: int) -> float:
    """0 up to ``start``, 1 from ``end`` on, linear between; an empty span is past right after its start."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (end - start)) if end > start else 1.0
