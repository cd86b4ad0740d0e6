"""Learning-rate schedules: what share of the run's peak rate a group has, as pure functions of the step."""

import math
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from tolaria.config_tuning import LRConfig

Kind: TypeAlias = Literal["host", "seed"]

WARMUP_START = 0.01  # share of its rate with which a seed starts under seed_warmup
REWARM_START = 0.1  # share of every rate right after a return to an earlier state
ADAPTIVE_START = 0.1  # share of the host's rate with which a seed starts under morpho_adaptive


def checked_rate(base_lr: float) -> float:
    """``base_lr`` as it is. Raises ValueError unless it is a finite number above 0."""
    if not (math.isfinite(base_lr) and base_lr > 0):
        raise ValueError(f"base_lr={base_lr!r}: expected a finite number above 0")
    return base_lr


def policy_of(config: LRConfig, name: str, kind: Kind) -> str:
    """The policy of a group: that of the first pattern in ``lr.group_policies`` which its name matches, else the
    one that its kind has."""
    return _policy_and_key(config, name, kind)[0]


def frozen_by(config: LRConfig, name: str, kind: Kind) -> str:
    """The key that gives a group the policy "frozen", "lr.seed_policy" or the like; empty when it has another one."""
    policy, key = _policy_and_key(config, name, kind)
    return key if policy == "frozen" else ""


def _policy_and_key(config: LRConfig, name: str, kind: Kind) -> tuple[str, str]:
    for pattern, policy in config.group_policies.items():
        if fnmatchcase(name, pattern):
            return policy, f"lr.group_policies.{pattern}"
    return (config.policy, "lr.policy") if kind == "host" else (config.seed_policy, "lr.seed_policy")


def group_share(
    config: LRConfig, policy: str, kind: Kind, step: int, total_steps: int, *, age: int, progress: float
) -> float:
    """Share of the peak rate at ``step``, at least 0. Pure.

    ``age``: steps since the group's warm-up began; ``progress``: how far it is blended in, 0 to 1. Both matter to the
    policies of seeds only, which follow the host's schedule. A seed under a host's policy has ``seed_ratio`` of it.
    """
    match policy:
        case "frozen":
            return 0.0
        case "seed_warmup":
            return host_share(config, config.policy, step, total_steps) * _warmup_share(config, max(0, age))
        case "morpho_adaptive":
            start = min(ADAPTIVE_START, config.seed_ratio)
            rising = start * (1.0 - progress) + config.seed_ratio * progress
            return host_share(config, config.policy, step, total_steps) * rising
        case _:
            return host_share(config, policy, step, total_steps) * (1.0 if kind == "host" else config.seed_ratio)


def settled_share(config: LRConfig, name: str, kind: Kind, step: int, total_steps: int) -> float:
    """`group_share` of a group with every warm-up behind it: the host's, the seed's, and that of its blending. Pure."""
    policy, settled = policy_of(config, name, kind), max(step, config.warmup_steps)
    return group_share(config, policy, kind, settled, total_steps, age=config.seed_warmup_steps, progress=1.0)


def rewarm_share(step: int, start: int, steps: int) -> float:
    """From a tenth at ``start`` to 1 after ``steps`` steps; always 1 with 0 steps. Pure."""
    return min(1.0, REWARM_START + (1.0 - REWARM_START) * max(0, step - start) / steps) if steps else 1.0


def host_share(config: LRConfig, policy: str, step: int, total_steps: int) -> float:
    """Warm-up and schedule of the host at ``step`` as a share of the peak rate, in [0, 1]. Pure.

    The warm-up rises linearly and reaches 1 at ``warmup_steps``. The schedule ends with its last step, number
    ``decay_steps`` (or else ``total_steps``) minus 1, and every later step has the same share as that one.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if policy == "step":
        return config.step_factor ** ((step - config.warmup_steps) // config.step_every)
    progress = _decay_progress(config, policy, step, config.decay_steps or total_steps)
    # Two products instead of one difference, so that both ends are met exactly.
    return (1.0 - progress) + config.final_ratio * progress


def _warmup_share(config: LRConfig, age: int) -> float:
    ratio, steps = config.seed_ratio, config.seed_warmup_steps
    return ratio if age >= steps else ratio * (WARMUP_START + (1.0 - WARMUP_START) * age / steps)


def _decay_progress(config: LRConfig, policy: str, step: int, length: int) -> float:
    """How much of the way from the peak to ``final_ratio`` is done, 0 to 1."""
    match policy:
        case "linear":
            return _elapsed(step, config.warmup_steps, length - 1)
        case "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * _elapsed(step, config.warmup_steps, length - 1)))
        case "wsd":
            decaying = round(config.wsd_decay_share * length)
            start = max(config.warmup_steps, length - 1 - decaying)
            return _elapsed(step, start, length - 1) if decaying else 0.0
        case _:  # constant
            return 0.0


def _elapsed(step: int, start: int, end: int) -> float:
    """0 up to ``start``, 1 from ``end`` on, linear between; an empty span is past right after its start."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (end - start)) if end > start else 1.0
