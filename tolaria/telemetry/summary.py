"""summary.json, and what a person reads at the end of a run."""

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tolaria.errors import RunDirError
from tolaria.telemetry.lines import to_json

NOISE_ERRORS = 2.0
"""A contribution closer to nothing than so many standard errors is taken for noise."""

PACKAGES = ("tolaria", "torch", "numpy", "safetensors", "protobuf", "pyzmq")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Validation over all ranks at one boundary; ``accuracy`` in [0, 1], ``metrics`` the task's further ones."""

    step: int
    epoch: int
    loss: float
    accuracy: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CommandRecord:
    """One command and what became of it.

    ``what`` says what was asked ("germinate late with conv_residual"), ``outcome`` is applied, refused, or the field
    report's (success, neutral, regression, aborted); ``effect`` tells it in numbers. ``by``: the operator who ordered
    it, empty for the policy.
    """

    step: int
    boundary: int
    command_id: str
    what: str
    reason: str = ""
    outcome: str = ""
    effect: str = ""
    by: str = ""


@dataclass(frozen=True, kw_only=True)
class SeedRecord:
    """One seed that lived, or a slot in which none ever did (without blueprint).

    ``stage``: as it is now; of one that is gone CULLED or CANCELLED, ``ended_in`` what it had come to, and
    ``ended_step`` when. ``contribution``: validation loss without the seed minus with it, as last measured;
    ``contribution_noise``: the standard error of that. None: not measured.
    ``flops``: of one sample's forward pass through the seed, None if unknown. ``train_flops``: what its own forward and
    backward passes took so far, over all ranks (not the second pass through the host of a seed that learns behind it).
    ``forward_ms``: milliseconds of one validation batch's forward pass with the seed at work and without, taken in
    turns, means over ranks, the least of all that were measured.
    ``step_ms_before``: wall time of a training step, data included, median between the two boundaries before the seed
    was germinated; ``step_ms``: the same between the last two between which it was at work. Means over ranks. What else
    changed between the two is in them as well.
    """

    slot: str
    blueprint: str
    stage: str
    parameters: int
    alpha: float
    contribution: float | None = None
    contribution_noise: float | None = None
    command_id: str = ""
    born_step: int = 0
    ended_step: int | None = None
    ended_in: str = ""
    flops: int | None = None
    train_flops: int = 0
    forward_ms: Sequence[float] = ()
    step_ms_before: float | None = None
    step_ms: float | None = None

    @property
    def verdict(self) -> str:
        """ "pays", "harmful", "within noise" (less than `NOISE_ERRORS` errors from nothing) or "not measured"."""
        gain, noise = self.contribution, self.contribution_noise
        if gain is None:
            return "not measured"
        if gain == 0 or (noise is not None and abs(gain) < NOISE_ERRORS * noise):
            return "within noise"
        return "pays" if gain > 0 else "harmful"

    def to_dict(self) -> dict[str, Any]:
        """As in summary.json and in events, with the verdict."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True, kw_only=True)
class IncidentRecord:
    """One time that the run went wrong, and what was done. ``step``: where it was noticed. ``to_step`` and ``source``:
    what it went back to, None and "" when it gave up."""

    step: int
    cause: str
    level: int
    reason: str
    to_step: int | None = None
    source: str = ""
    milliseconds: float = 0.0
    samples_left_out: int = 0
    conservative: bool = False


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Everything in summary.json.

    ``outcome``: "finished", "stopped" (asked to), "unstable" (gave up) or "halted" (by an emergency).
    ``before_growth`` is the last validation before the first seed acted on the model's output, None if none did.
    ``goodput``: seconds of rank 0 by what they were spent on, over all starts (`tolaria/telemetry/goodput.py`); their
    sum is ``seconds``. ``rank_times``: by rank, seconds of compute, data wait and sync wait in this start, steps done
    again included. ``latency_ms``: per part of the boundary, see `latency_split`. ``state_digest``: rank -> hex.
    ``profile``: the page of the profiler, "" without one. ``resume``: the command that goes on from here.
    """

    outcome: str
    name: str
    run_id: str
    run_dir: str
    seed: int
    epochs: int
    steps: int
    seconds: float
    world_size: int
    device: str
    final: Score | None
    best: Score | None
    before_growth: Score | None
    parameters_start: int
    parameters_end: int
    seeds: Sequence[SeedRecord] = ()
    commands: Sequence[CommandRecord] = ()
    incidents: Sequence[IncidentRecord] = ()
    boundaries: int = 0
    latency_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    mode: str = "normal"
    checkpoint: str = ""
    profile: str = ""
    resume: str = ""
    state_digest: Mapping[int, str] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)
    goodput: Mapping[str, float] = field(default_factory=dict)
    rank_times: Sequence[Mapping[str, float]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: NaN and infinities as strings, ranks as text."""
        whole = {**asdict(self), "seeds": [seed.to_dict() for seed in self.seeds]}
        return {"schema": 1, **{key: to_json(value) for key, value in whole.items()}}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def latency_split(boundaries: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """p50, p99 and max by part over boundaries that each give milliseconds by part. Pure."""
    parts: dict[str, list[float]] = {}
    for boundary in boundaries:
        for part, value_ms in boundary.items():
            parts.setdefault(part, []).append(value_ms)
    return {part: _spread(sorted(values)) for part, values in parts.items()}


def _spread(values: list[float]) -> dict[str, float]:
    p99 = values[min(len(values) - 1, round(0.99 * (len(values) - 1)))]
    return {"p50": round(statistics.median(values), 4), "p99": round(p99, 4), "max": round(values[-1], 4)}


def write_summary(path: Path, summary: RunSummary) -> None:
    """Write summary.json whole or not at all (temporary file, fsync, rename). Rank 0, local, waits for the disk.

    Raises RunDirError and leaves a former summary as it was when the file cannot be written.
    """
    data = json.dumps(summary.to_dict(), indent=2, ensure_ascii=True) + "\n"
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise RunDirError(f"{path}: cannot be written ({error.strerror})") from error
