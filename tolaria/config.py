"""The configuration of a run: one frozen dataclass per part, the unit in each name, relations checked.

Sources, later over earlier: defaults here, a TOML file (`--config`), flags (`--optim.lr 0.01`). Parsing and the
command line are in `tolaria/options.py`; this file imports nothing heavy, so a bad flag is answered at once.
"""

import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tolaria.config_aggregate import AggregateConfig
from tolaria.config_fields import BELOW_ONE, NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, Scalar, doc, require, require_range
from tolaria.config_profile import ProfileConfig
from tolaria.config_recovery import CheckpointConfig, RecoveryConfig, WatchdogConfig
from tolaria.config_tamiyo import TamiyoConfig
from tolaria.config_telemetry import TelemetryConfig
from tolaria.config_tuning import LRConfig, TuningConfig

# Run names and slot names travel as ids in messages, which are ASCII.
_NAME_CHARS = frozenset(string.ascii_letters + string.digits + "-_.")

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop", "adagrad", "nadam", "muon")
"""Names that ``optim.name`` takes, beside the import path of a class."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name, place and seed of the run, and what it goes on from."""

    name: str = doc("run", "name of the run, part of its directory's name")
    root: str = doc("runs", "folder that holds run directories")
    dir: str = doc("", "run directory; empty: <root>/<UTC time>-<name>")
    seed: int = doc(0, "seed of weights, sample order and dropout")
    resume: str = doc("no", "no | auto (newest run of this name, or start) | path of a run or checkpoint")
    allow_fresh: bool = doc(False, "start from nothing when every checkpoint is damaged")
    accept_changes: bool = doc(False, "resume although task, data, ranks, optimizer or versions are others than saved")

    def __post_init__(self) -> None:
        ok = (
            bool(self.name)
            and all(c in _NAME_CHARS for c in self.name)
            and self.name[0] not in ".-"
            and len(self.name) <= 64
        )
        require(ok, "run.name", self.name, "1 to 64 of a-z A-Z 0-9 - _ . starting with none of - .")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "0 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which task, with which arguments."""

    factory: str = doc("tolaria.tasks.digits:make_task", "package.module:function that returns a tolaria.Task")
    args: Mapping[str, Scalar] = doc({}, "keyword arguments of the factory")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batches, boundaries and clipping."""

    epochs: int = doc(10, "epochs to train")
    max_steps: int = doc(0, "stop after so many optimizer steps; 0: no limit")
    batch_size: int = doc(32, "samples per rank and microbatch")
    accumulation: int = doc(1, "microbatches per optimizer step")
    boundary_steps: int = doc(0, "optimizer steps between boundaries; 0: one boundary per epoch")
    clip_norm: float = doc(1.0, "largest gradient norm of the host, and of each seed by itself; 0: no clipping")
    debug: bool = doc(False, "one process, eager, anomaly detection")

    def __post_init__(self) -> None:
        require_range(self, "train", ONE_OR_MORE, "epochs", "batch_size", "accumulation")
        require_range(self, "train", NOT_NEGATIVE, "max_steps", "boundary_steps", "clip_norm")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Loading of samples."""

    num_workers: int = doc(0, "loader processes per rank; 0: load in the training process")
    timeout_s: float = doc(60.0, "seconds to wait for a loader process before it counts as stuck")
    validation_batch_size: int = doc(256, "samples per rank and validation batch")

    def __post_init__(self) -> None:
        require_range(self, "data", NOT_NEGATIVE, "num_workers")
        require_range(self, "data", POSITIVE, "timeout_s")
        require_range(self, "data", ONE_OR_MORE, "validation_batch_size")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    amp: Literal["bf16", "fp16", "off"] = doc("bf16", "autocast type; fp16 adds gradient scaling and needs CUDA")
    tf32: bool = doc(True, "TF32 matrix products on CUDA")
    channels_last: Literal["auto", "on", "off"] = doc("auto", "4-D tensors channels last; auto: Conv2d on CUDA")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Compilation of the training step."""

    enabled: bool = doc(True, "compile the training step with torch.compile")
    mode: Literal["default", "reduce-overhead", "max-autotune"] = doc("default", "torch.compile mode")
    cache: str = doc("run", "compiled code for the next start: run (.compile_cache beside the run) | torch | a folder")
    validation: Literal["auto", "on", "off"] = doc("auto", "compile validation too; auto: from 32 batches a rank on")
    structure_limit: int = doc(64, "model structures kept compiled; beyond it the run goes on eager")

    def __post_init__(self) -> None:
        require(bool(self.cache), "compile.cache", self.cache, "run, torch, or a folder")
        require(self.structure_limit >= 8, "compile.structure_limit", self.structure_limit, "8 or more")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer of the host and of every seed."""

    name: str = doc("adamw", "adamw | adam | sgd | rmsprop | adagrad | nadam | muon | package.module:Class")
    lr: float = doc(1e-3, "peak learning rate of the host")
    weight_decay: float = doc(0.01, "weight decay")
    beta1: float = doc(0.9, "first-moment decay (adam, adamw, nadam)")
    beta2: float = doc(0.999, "second-moment decay (adam, adamw, nadam); smoothing (rmsprop)")
    eps: float = doc(1e-8, "denominator term (all but sgd)")
    momentum: float = doc(0.9, "momentum (sgd, rmsprop, muon)")
    compile_step: bool = doc(False, "run the optimizer step through torch.compile instead of its fused kernel")

    def __post_init__(self) -> None:
        known = self.name in OPTIMIZERS or all(self.name.partition(":"))
        require(known, "optim.name", self.name, f"one of {', '.join(OPTIMIZERS)}, or package.module:Class")
        require(0 < self.lr <= 100, "optim.lr", self.lr, "more than 0, at most 100")
        require_range(self, "optim", BELOW_ONE, "weight_decay", "beta1", "beta2", "momentum")
        require_range(self, "optim", POSITIVE, "eps")


@dataclass(frozen=True, kw_only=True)
class KasminaConfig:
    """Slots, blending, and the thresholds of the gates."""

    slots: Mapping[str, str] = doc({}, "slots to attach, name -> module path; added to the task's own")
    blend: Literal["residual", "convex"] = doc("residual", "h + alpha*f(x), or (1-alpha)*h + alpha*f(x)")
    schedule: Literal["sigmoid", "linear", "cosine"] = doc("sigmoid", "course of alpha from 0 to 1")
    blend_steps: int = doc(100, "optimizer steps from alpha 0 to 1")
    signal: Literal["shadow", "straight_through"] = doc("shadow", "gradient of a TRAINING seed: exact, or cheap")
    output_ratio: float = doc(2.0, "largest |f| / |h| of a seed (straight_through and gate G3)")
    max_seed_parameters: int = doc(1_000_000, "most parameters of one seed")
    max_grown_parameters: int = doc(10_000_000, "most parameters of all seeds together")
    max_seed_mb: float = doc(0.0, "most MiB of one seed: parameters, gradients, optimizer state; 0: no limit")
    max_grown_mb: float = doc(0.0, "most MiB of all seeds together; 0: no limit")
    gradient_window: int = doc(5, "seed gradients that gate G1 wants finite and non-zero in a row")
    max_loss_ratio: float = doc(1.5, "gate G2: validation loss over that before the graft, at most")
    min_contribution: float = doc(0.0, "gate G4: validation loss without the seed minus with it, at least")
    min_certainty: float = doc(0.0, "gate G4: and above that by so many standard errors, at least")
    embargo_boundaries: int = doc(2, "boundaries that a culled slot stays closed")
    freeze_fossilized: bool = doc(False, "freeze the parameters of a FOSSILIZED seed")
    measure_signal: bool = doc(True, "measure at each boundary what gradient a seed would get in each free slot")
    candidates: str = doc("", "blueprints that are measured, with commas between; empty: all that fit")

    def __post_init__(self) -> None:
        require_range(
            self, "kasmina", ONE_OR_MORE,
            "blend_steps", "gradient_window", "max_seed_parameters", "max_grown_parameters",
        )  # fmt: skip
        require_range(self, "kasmina", POSITIVE, "output_ratio", "max_loss_ratio")
        require_range(
            self, "kasmina", NOT_NEGATIVE,
            "embargo_boundaries", "min_certainty", "max_seed_mb", "max_grown_mb",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistConfig:
    """Ranks: device, deadlines, threads."""

    device: Literal["auto", "cpu", "cuda"] = doc("auto", "device of every rank")
    timeout_s: float = doc(300.0, "seconds until a silent rank counts as lost in gradient collectives")
    control_timeout_s: float = doc(300.0, "seconds until a silent rank counts as lost elsewhere")
    threads: int = doc(0, "CPU threads per rank; 0: cores / local ranks")
    growth_bucket_mb: int = doc(25, "DDP bucket size in MiB")
    fence_share: float = doc(0.005, "share of the training time that agreeing on signals and losses may cost")
    fence_delay_ms: float = doc(50.0, "milliseconds of training until all ranks know of a signal, at most")
    fence_steps: int = doc(0, "optimizer steps between such agreements; 0: as the two keys above allow")

    def __post_init__(self) -> None:
        for key in ("timeout_s", "control_timeout_s"):
            require(1 <= getattr(self, key) <= 86400, f"dist.{key}", getattr(self, key), "1 to 86400")
        require_range(self, "dist", NOT_NEGATIVE, "threads")
        require(0 < self.fence_share <= 1, "dist.fence_share", self.fence_share, "more than 0, at most 1")
        require(1 <= self.fence_delay_ms <= 100, "dist.fence_delay_ms", self.fence_delay_ms, "1 to 100")
        require(0 <= self.fence_steps <= 64, "dist.fence_steps", self.fence_steps, "0 to 64")
        require_range(self, "dist", ONE_OR_MORE, "growth_bucket_mb")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics and progress."""

    interval_steps: int = doc(10, "optimizer steps between lines in metrics.jsonl")
    progress: Literal["auto", "plain", "off"] = doc("auto", "progress on the terminal")
    detail: Literal["quiet", "normal", "verbose"] = doc("normal", "quiet: start, problems, end; verbose: times as well")
    status_s: float = doc(1.0, "seconds between two writings of status.json, at least 0.1; 0: none is written")
    straggler_ratio: float = doc(3.0, "a rank's own time of so many times the others' is told; 0: not")

    def __post_init__(self) -> None:
        require_range(self, "log", ONE_OR_MORE, "interval_steps")
        status_s = self.status_s
        require(status_s == 0 or 0.1 <= status_s <= 3600, "log.status_s", status_s, "0, or 0.1 to 3600")
        ratio = self.straggler_ratio
        require(ratio == 0 or ratio > 1, "log.straggler_ratio", ratio, "0 or more than 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a run does. Written, resolved, to ``config.toml`` in the run directory."""

    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lr: LRConfig = field(default_factory=LRConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    kasmina: KasminaConfig = field(default_factory=KasminaConfig)
    aggregate: AggregateConfig = field(default_factory=AggregateConfig)
    tamiyo: TamiyoConfig = field(default_factory=TamiyoConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    log: LogConfig = field(default_factory=LogConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        deadline_s = self.tamiyo.deadline_ms / 1000
        require(
            deadline_s + 2 <= self.dist.control_timeout_s, "tamiyo.deadline_ms", self.tamiyo.deadline_ms,
            f"at least 2 s less than dist.control_timeout_s={self.dist.control_timeout_s}",
        )  # fmt: skip
        require(
            self.tamiyo.resend_ms < self.tamiyo.deadline_ms, "tamiyo.resend_ms", self.tamiyo.resend_ms,
            f"less than tamiyo.deadline_ms={self.tamiyo.deadline_ms}",
        )  # fmt: skip

        require(
            not (self.train.debug and self.compile.enabled), "compile.enabled", self.compile.enabled,
            "False with train.debug, which runs eager",
        )  # fmt: skip
        require(
            not (self.optim.compile_step and (self.precision.amp == "fp16" or self.train.debug)),
            "optim.compile_step", self.optim.compile_step, "False with precision.amp=fp16 and with train.debug",
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, ready for TOML or JSON."""
        return asdict(self)
