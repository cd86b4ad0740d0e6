"""The host's learning-rate schedules: shares of the peak rate as pure functions of the step."""

import math

from tolaria.config import LRConfig


def host_share(config: LRConfig, step: int, total_steps: int) -> float:
    """Warm-up and schedule of the host at ``step`` as a share of the peak rate, in [0, 1]. Pure.

    The warm-up rises linearly and reaches 1 at ``warmup_steps``; the end of the schedule is its last step,
    ``decay_steps`` or else ``total_steps`` minus 1, and the share stays there for every later step.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    end = (config.decay_steps or total_steps) - 1
    match config.policy:
        case "constant":
            return 1.0
        case "step":
            return config.step_factor ** ((step - config.warmup_steps) // config.step_every)
        case "linear":
            return _fall(config.final_ratio, _progress(step, config.warmup_steps, end))
        case "cosine":
            progress = _progress(step, config.warmup_steps, end)
            return _fall(config.final_ratio, 0.5 * (1.0 - math.cos(math.pi * progress)))
        case "wsd":
            decay_steps = round(config.wsd_decay_share * (end + 1))
            if decay_steps == 0:
                return 1.0
            start = max(config.warmup_steps, end - decay_steps)
            return _fall(config.final_ratio, _progress(step, start, end))


def _progress(step: int, start: int, end: int) -> float:
    """0 up to ``start``, 1 from ``end`` on, linear between; a span that is empty counts as past only after it."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (end - start)) if end > start else 1.0


def _fall(final_ratio: float, progress: float) -> float:
    """From exactly 1 to exactly ``final_ratio``."""
    return (1.0 - progress) + final_ratio * progress
