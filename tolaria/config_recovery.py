"""The configuration of everything that keeps a run alive: checkpoints, snapshots, going back, the watchdog."""

from dataclasses import dataclass
from typing import Literal

from tolaria.config_fields import NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, doc, require, require_range


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = doc(1, "boundaries between checkpoints; 0: only the last one")
    keep: int = doc(3, "newest checkpoints to keep; the newest good one and pinned ones stay beside them")
    good_after: int = doc(2, "healthy boundaries until a checkpoint counts as good")

    def __post_init__(self) -> None:
        require_range(self, "checkpoint", NOT_NEGATIVE, "every")
        require(self.keep >= 2, "checkpoint.keep", self.keep, "2 or more")
        require_range(self, "checkpoint", NOT_NEGATIVE, "good_after")


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """Snapshots in host memory, and when the run goes back to one by itself."""

    snapshot_steps: int = doc(50, "optimizer steps between snapshots in host memory; 0: none")
    snapshots: int = doc(2, "snapshots kept, 1 to 5")
    snapshot_memory_mb: int = doc(0, "most MiB of a rank's snapshots; 0: a rank's part of half the free memory")
    snapshot_dir: str = doc("/dev/shm", "where snapshots lie, so that they outlive the processes")  # noqa: S108
    spike_ratio: float = doc(15.0, "a loss of so many times the running median is an incident")
    spike_window: int = doc(50, "losses in the running median")
    spike_min_losses: int = doc(10, "losses seen before the first judgement, also after a change of structure")
    non_finite_steps: int = doc(3, "skipped steps in a row that are an incident")
    collapse_ratio: float = doc(5.0, "validation loss of so many times the best, at half its accuracy, is a collapse")
    attempts: int = doc(3, "returns within attempt_steps; then one more in conservative mode, then the run stops")
    attempt_steps: int = doc(1000, "optimizer steps in which returns count together")
    rewarm_steps: int = doc(0, "steps of LR re-warm after a return, from a tenth of the rate; 0: none")
    command_boundaries: int = doc(10, "boundaries in which the policy may ask for one return")
    prepare_ms: int = doc(150, "milliseconds to find the snapshot on all ranks")
    commit_ms: int = doc(250, "milliseconds to copy it back")
    confirm_ms: int = doc(100, "milliseconds to compare the ranks after it")
    drift_steps: int = doc(10, "optimizer steps between comparisons of a slice of the ranks' states; 0: boundaries")
    drift_mb: int = doc(16, "MiB of state compared at once")
    halt_wait_s: float = doc(60.0, "seconds that a halted run waits to be cleared before it saves and leaves")

    def __post_init__(self) -> None:
        require_range(
            self, "recovery", NOT_NEGATIVE,
            "snapshot_steps", "snapshot_memory_mb", "rewarm_steps", "drift_steps", "halt_wait_s",
        )  # fmt: skip
        require(1 <= self.snapshots <= 5, "recovery.snapshots", self.snapshots, "1 to 5")
        for key in ("spike_ratio", "collapse_ratio"):
            require(getattr(self, key) > 1, f"recovery.{key}", getattr(self, key), "more than 1")
        require_range(
            self, "recovery", ONE_OR_MORE,
            "spike_window", "spike_min_losses", "non_finite_steps", "attempts", "attempt_steps", "command_boundaries",
            "prepare_ms", "commit_ms", "confirm_ms", "drift_mb",
        )  # fmt: skip
        require(
            self.spike_min_losses <= self.spike_window, "recovery.spike_min_losses", self.spike_min_losses,
            f"at most recovery.spike_window={self.spike_window}",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """The process beside the ranks that ends a stuck one: limits in seconds."""

    mode: Literal["auto", "on", "off"] = doc("auto", "auto: under torchrun only")
    heartbeat_s: float = doc(10.0, "silence of a whole process (stopped, or the interpreter lock held)")
    start_s: float = doc(1800.0, "start: import, data, loading of a checkpoint")
    compile_s: float = doc(3600.0, "compilation of one structure")
    step_s: float = doc(600.0, "one optimizer step with its data")
    boundary_s: float = doc(1800.0, "one boundary: validation, policy, commands")
    save_s: float = doc(600.0, "what a save keeps the loop waiting, and the last save")
    restore_s: float = doc(120.0, "one return to an earlier state")

    def __post_init__(self) -> None:
        require_range(
            self, "watchdog", POSITIVE,
            "heartbeat_s", "start_s", "compile_s", "step_s", "boundary_s", "save_s", "restore_s",
        )  # fmt: skip
