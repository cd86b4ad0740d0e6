"""The configuration of what changes while a run learns: learning-rate schedules, and the bounds of commands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tolaria.config_fields import BELOW_ONE, NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, SHARE, doc, require, require_range

POLICIES = ("constant", "linear", "cosine", "step", "wsd", "seed_warmup", "morpho_adaptive", "frozen")


@dataclass(frozen=True, kw_only=True)
class LRConfig:
    """Schedules of the learning rate, and how far commands may take it from them."""

    policy: Literal["constant", "linear", "cosine", "step", "wsd"] = doc("cosine", "schedule of the host")
    warmup_steps: int = doc(0, "steps of linear warm-up")
    final_ratio: float = doc(0.1, "last learning rate as a share of the peak (linear, cosine, wsd)")
    decay_steps: int = doc(0, "steps until the end of the schedule; 0: the planned length of the run")
    step_every: int = doc(1000, "steps between drops (step)")
    step_factor: float = doc(0.5, "factor of each drop (step)")
    wsd_decay_share: float = doc(0.2, "share of the run that decays (wsd)")
    seed_policy: Literal["seed_warmup", "morpho_adaptive", "frozen"] = doc("seed_warmup", "schedule of seeds")
    seed_ratio: float = doc(1.0, "seed learning rate as a share of the host's, after warm-up")
    seed_warmup_steps: int = doc(20, "steps of a seed's warm-up, from 0.01 of its rate")
    group_policies: Mapping[str, str] = doc({}, "policy of single groups: name or shell pattern -> any policy")
    conservative_factor: float = doc(1.0, "factor on every rate while in conservative mode; 1: none")
    min_scale: float = doc(0.01, "smallest total factor that commands may reach")
    max_scale: float = doc(10.0, "largest total factor that commands may reach")

    def __post_init__(self) -> None:
        require_range(self, "lr", NOT_NEGATIVE, "warmup_steps", "decay_steps", "seed_warmup_steps")
        require_range(self, "lr", ONE_OR_MORE, "step_every")
        require_range(self, "lr", SHARE, "final_ratio", "step_factor", "wsd_decay_share", "seed_ratio")
        for pattern, policy in self.group_policies.items():
            require(policy in POLICIES, f"lr.group_policies.{pattern}", policy, f"one of {', '.join(POLICIES)}")
        require(
            0 < self.conservative_factor <= 1, "lr.conservative_factor", self.conservative_factor, "above 0, at most 1"
        )
        require(0 < self.min_scale <= 1, "lr.min_scale", self.min_scale, "more than 0, at most 1")
        require(1 <= self.max_scale <= 1000, "lr.max_scale", self.max_scale, "1 to 1000")


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """How far commands may take the optimizer, in all and at one boundary. 0, as "off", is no matter of factors."""

    lr_factor: float = doc(10.0, "largest factor by which one boundary raises or lowers a group's rate")
    min_lr: float = doc(1e-10, "smallest rate that commands may lead to, apart from warm-ups and the like")
    max_lr: float = doc(100.0, "largest such rate; lr.min_scale and lr.max_scale hold besides")
    min_weight_decay: float = doc(0.0, "smallest weight decay")
    max_weight_decay: float = doc(0.5, "largest weight decay")
    weight_decay_factor: float = doc(10.0, "largest factor on weight decay at one boundary")
    min_clip_norm: float = doc(0.01, "smallest bound of a group's gradient norm; 0 would allow to end clipping")
    max_clip_norm: float = doc(1000.0, "largest bound of a group's gradient norm")
    clip_norm_factor: float = doc(10.0, "largest factor on that bound at one boundary")
    min_beta1: float = doc(0.0, "smallest first-moment decay")
    max_beta1: float = doc(0.99, "largest first-moment decay")
    min_beta2: float = doc(0.5, "smallest second-moment decay or smoothing")
    max_beta2: float = doc(0.9999, "largest second-moment decay or smoothing")
    min_momentum: float = doc(0.0, "smallest momentum; never to or from 0, which keeps no buffers")
    max_momentum: float = doc(0.999, "largest momentum")
    beta_change: float = doc(0.1, "largest change of a beta at one boundary")
    momentum_change: float = doc(0.1, "largest change of momentum at one boundary")
    undo_depth: int = doc(64, "commands that can be undone, the newest ones")

    def __post_init__(self) -> None:
        require_range(self, "tuning", ONE_OR_MORE, "lr_factor", "weight_decay_factor", "clip_norm_factor", "undo_depth")
        require_range(self, "tuning", SHARE, "beta_change", "momentum_change")
        require_range(self, "tuning", POSITIVE, "min_lr")
        require_range(self, "tuning", NOT_NEGATIVE, "min_clip_norm")
        for name in ("weight_decay", "beta1", "beta2", "momentum"):
            require_range(self, "tuning", BELOW_ONE, f"min_{name}", f"max_{name}")
        for name in ("lr", "weight_decay", "clip_norm", "beta1", "beta2", "momentum"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            require(low <= high, f"tuning.max_{name}", high, f"at least tuning.min_{name}={low:g}")
