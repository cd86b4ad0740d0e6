"""A run once more: a directory of its own, the log of the first, no policy, the same ranks, to the same step.

    RUN2/FENCE, wal/      made here: another run, with the decisions, returns and acts of the first already in its log
    RUN2/replay.log       what the ranks print
    torchrun ... -m tolaria.cli.replay_rank STEP --config RUN/config.toml ...

A start that comes by a boundary in its log takes the decision from there, so nothing in training knows of a replay.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tolaria import errors
from tolaria.errors import RunDirError, TaskError, TolariaError
from tolaria.options import resolve
from tolaria.process import boot_id
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import Wal, WalKind, WalRecord
from tolaria.replay.course import Course, log_of
from tolaria.replay.trace import Difference, Place, differences, trace_of, unknown_place
from tolaria.rundir.ownership import Fence, write_fence
from tolaria.telemetry.summary import versions
from tolaria.view.files import RunFiles

LOG_NAME = "replay.log"
POLL_S = 0.2
ENDED_S = 30.0

# What a replay does without: whom it would ask, what it would save on the way, and whom it would tell.
_OFF = (
    "--run.resume=no", "--tamiyo.policy=none", "--tamiyo.endpoint=", "--tamiyo.shadow=", "--tamiyo.record=false",
    "--checkpoint.every=0", "--recovery.snapshot_steps=0", "--profile.enabled=false", "--log.progress=off",
    "--telemetry.publish=", "--telemetry.prometheus=", "--telemetry.tensorboard=", "--telemetry.wandb=",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """How a replay came out. ``digests``: rank -> its whole state at the end, hex; empty when it did not get there.

    ``compared``: how many of each kind of place. ``failure``: why it ended early, "" when it did not.
    """

    folder: Path
    digests: dict[int, str]
    compared: dict[str, int]
    differences: list[Difference]
    failure: str
    seconds: float


def prepare(course: Course, folder: Path, fs: FileOps) -> list[str]:
    """Make the directory of the replay; the command that starts it.

    Raises RunDirError when it cannot be made, ConfigError or TaskError when the run cannot be started again.
    """
    flags = [f"--config={course.path / 'config.toml'}", f"--run.dir={folder}", *_OFF, *_task_flags(course)]
    resolve(flags, {})
    try:
        if os.path.lexists(folder):
            raise RunDirError(f"{folder}: is there already; name another with --to")
        fs.mkdir(folder)
        run_id = secrets.token_hex(16)
        fence = Fence(generation="replay", run_id=run_id, boot_id=boot_id(), pid=os.getpid(), agent=None)
        write_fence(folder, fence, fs)
    except OSError as error:
        raise RunDirError(f"{folder}: cannot be made ({error.strerror or error})") from error
    wal, _ = Wal.open(
        folder / "wal", run_id=run_id, generation="replay", facts=course.facts, fs=fs, check_owner=lambda: None
    )
    try:
        for record in course.records:
            wal.append(record.kind, record.body)
    finally:
        wal.close()
    ranks = ["-m", "tolaria.cli.replay_rank", str(course.until), *flags]
    if course.world_size == 1:
        return [sys.executable, *ranks]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={course.world_size}"]
    return [sys.executable, *torchrun, "--max-restarts=0", *ranks]


def _task_flags(course: Course) -> list[str]:
    """The task by the name that the log has, where the run got it from a script and not from its configuration."""
    recorded = str(course.facts["task.factory"])
    if recorded == resolve([f"--config={course.path / 'config.toml'}"], {}).task.factory:
        return []
    module, _, name = recorded.partition(":")
    if module == "__main__" or "<" in name:
        raise TaskError(
            f"{course.path}: its task was {recorded}, which cannot be imported; make it a function of a module, so "
            "that it has a name that others can import"
        )
    return [f"--task.factory={recorded}"]


def run(command: Sequence[str], course: Course, folder: Path, tell: Callable[[int], None]) -> Replayed:
    """Start the replay, wait for it, compare. ``tell``: the step it is at, now and then.

    Raises the error that the ranks ended with, unless they did something that the log has not: that is a difference.
    """
    started = time.monotonic()
    files = RunFiles(folder)
    with (folder / LOG_NAME).open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                tell(_last_step(folder / "metrics.jsonl"))
        finally:
            _end(process)
    seconds = time.monotonic() - started
    unknown = _unknown(files, log_of(folder, FileOps()))
    failure = "" if process.returncode == 0 else _failure(files, folder)
    if failure and not unknown:
        raise _error(files, f"the replay failed: {failure} (see {folder / LOG_NAME})")
    summary = files.summary() if not failure else None
    digests = {int(rank): str(d) for rank, d in summary["state_digest"].items()} if summary is not None else {}
    compared, found = _compare(course, files, unknown)
    return Replayed(
        folder=folder, digests=digests, compared=compared, differences=found, failure=failure, seconds=seconds
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(ENDED_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _compare(course: Course, files: RunFiles, unknown: dict[Place, Any]) -> tuple[dict[str, int], list[Difference]]:
    own = [r for r in log_of(files.path, FileOps()) if r.start > 1 or r.kind not in _FATES]
    recorded = trace_of(RunFiles(course.path), course.records, course.step)
    replayed = trace_of(files, own, course.step) | unknown
    counts: dict[str, set[int]] = {}
    for place in recorded.keys() & replayed.keys():
        counts.setdefault(place.kind, set()).add(place.number or place.step)
    return {kind: len(found) for kind, found in counts.items()}, differences(recorded, replayed, course.records)


_FATES = (WalKind.APPLIED, WalKind.ABORTED)


def _unknown(files: RunFiles, records: Sequence[WalRecord]) -> dict[Place, Any]:
    """What the replay did that the log does not have: decisions of its own, incidents."""
    found: dict[Place, Any] = {}
    for event in files.events({"incident", "decision"}):
        if event["rank"] == 0 and event["kind"] == "incident":
            reason = f"{event['cause']}: {event['reason']}"
            found[unknown_place(int(event["step"]), 0, "an incident that the log does not have")] = reason
        elif event["rank"] == 0:
            what = "a boundary that the log does not have"
            found[unknown_place(int(event["step"]), int(event["boundary"]), what)] = event["reason"]
    return found


def warnings_of(course: Course) -> list[str]:
    """What is not as it was when the run was recorded, so that equality can not be expected."""
    files, config = RunFiles(course.path), resolve([f"--config={course.path / 'config.toml'}"], {})
    found = [f"a later start of the run changed {change}" for change in course.changed]
    for start in files.events({"run_started"}):
        now = versions()
        names = sorted({*now, *start["versions"]})
        found += [
            f"{name} was {start['versions'].get(name, 'absent')}, is {now.get(name, 'absent')}"
            for name in names if start["versions"].get(name) != now.get(name)
        ]  # fmt: skip
        recorded, here = str(start["device"]), "cuda" if torch.cuda.is_available() else "cpu"
        if config.dist.device == "auto" and not recorded.startswith(here):
            found.append(f"it was recorded on {recorded}, here it runs on {here}")
    return list(dict.fromkeys(found))


# When it fails


def _failure(files: RunFiles, folder: Path) -> str:
    """What the ranks said last, in one line."""
    failed = list(files.events({"run_failed"}))
    if failed:
        return " ".join(str(failed[0]["reason"]).split())
    said = [line for line in (folder / LOG_NAME).read_text(errors="replace").splitlines() if "tolaria:" in line]
    return said[0].removeprefix("tolaria: ") if said else "its ranks ended without a word"


def _error(files: RunFiles, text: str) -> TolariaError:
    """The error with the exit code of what the ranks failed by."""
    failed = list(files.events({"run_failed"}))
    kind = getattr(errors, str(failed[0]["error"]), RunDirError) if failed else RunDirError
    return kind(text) if kind in (errors.ConfigError, errors.TaskError, errors.WalError) else RunDirError(text)


def _last_step(path: Path) -> int:
    """The newest step in a file of metrics, 0 as long as there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    marks = [line.partition(b'"step":')[2].split(b",")[0].strip() for line in lines]
    return next((int(mark) for mark in reversed(marks) if mark.isdigit()), 0)
