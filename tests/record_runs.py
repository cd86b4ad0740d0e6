"""Makes tests/recorded: what short real runs of two ranks told of themselves when something happened to them.

    python -m tests.record_runs [NAME...]

Tests of what is seen of a run read these; they are made anew when the events change.
"""

import contextlib
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.faults.test_processes import flags, let_go, wait_until_held
from tests.torchrun import ROOT, Job, launch

RECORDED = Path(__file__).resolve().parent / "recorded"
KEPT = ("events.jsonl", "metrics.jsonl", "summary.json", "config.toml", "status.json")
FEW = ("--train.epochs", "6")


def spike(folder: Path) -> None:
    """A loss out of bounds, and three steps without a number."""
    with _start(folder, ["--config", str(ROOT / "launch/configs/spike.toml"), "--dist.device", "cpu"]) as job:
        job.finish()


def silent_policy(folder: Path) -> None:
    """The policy does not answer at four boundaries; the breaker opens."""
    quick = ["--tamiyo.deadline_ms", "250", "--tamiyo.resend_ms", "100", "--tamiyo.breaker_failures", "2"]
    with _held(folder, "--tamiyo.policy", "tests.recorded_tasks:Silent", *quick, "--train.epochs", "14") as job:
        job.finish()


def restarted(folder: Path) -> None:
    """Rank 1 is killed, torchrun starts all again."""
    flagged = [*flags(folder), *FEW, "--recovery.snapshot_steps", "10"]
    with launch(folder, flagged, max_restarts=1) as job:
        wait_until_held(job, folder)
        job.rank(1).kill()
        let_go(folder)
        job.finish()


def stuck(folder: Path) -> None:
    """Rank 1 is stopped; the watchdog ends it, torchrun starts all again."""
    flagged = [*flags(folder), *FEW, "--recovery.snapshot_steps", "10", "--watchdog.heartbeat_s", "1.5"]
    with launch(folder, flagged, max_restarts=1) as job:
        wait_until_held(job, folder)
        job.rank(1).send_signal(signal.SIGSTOP)
        job.wait_until(lambda: job.events("rank_stuck") or None, "the watchdog's word")
        let_go(folder)
        job.finish()


def killed(folder: Path) -> None:
    """Everything is killed in the middle of an epoch."""
    with launch(folder, flags(folder)) as job:
        wait_until_held(job, folder)
        for process in job.processes():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        job.wait()


def failed(folder: Path) -> None:
    """Loading raises on rank 1."""
    with launch(folder, flags(folder, hold=False, raise_at=23)) as job:
        assert job.wait() != 0


def unstable(folder: Path) -> None:
    """Every batch from one on is no number: the run goes back, and again, and gives up."""
    flagged = flags(folder, hold=False, nan_from=35, nan_to=100_000)
    keys = {"attempts": 1, "snapshot_steps": 3, "snapshots": 5}
    with launch(folder, [*flagged, *(f"--recovery.{key}={value}" for key, value in keys.items())]) as job:
        assert job.wait() != 0


def slow_rank(folder: Path) -> None:
    """Rank 1 waits for its data in every step."""
    flagged = flags(folder, hold=False)
    flagged = [flag for flag in flagged if not flag.startswith("--task")]
    with launch(folder, [*flagged, "--task", "tests.recorded_tasks:make_slow_task", *FEW]) as job:
        job.finish()


def unsaved(folder: Path) -> None:
    """The folder of checkpoints is no folder for a while."""
    with launch(folder, [*flags(folder), "--train.epochs", "12"]) as job:
        wait_until_held(job, folder)
        place = folder / "run" / "ckpt"
        place.rename(folder / "away")
        place.touch()
        let_go(folder)
        job.wait_until(lambda: len(job.events("checkpoint_failed")) >= 2 or None, "a save that fails")
        place.unlink()
        (folder / "away").rename(place)
        job.finish()


def _start(folder: Path, flagged: list[str]) -> Job:
    return launch(folder, flagged)


def _held(folder: Path, *more: str) -> Job:
    return launch(folder, [*flags(folder, hold=False), *more])


SITUATIONS: tuple[Callable[[Path], None], ...] = (
    spike, silent_policy, restarted, stuck, killed, failed, unstable, slow_rank, unsaved,
)  # fmt: skip


def record(make: Callable[[Path], None]) -> None:
    """Have a run in which it happens, and keep its files."""
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    target = RECORDED / make.__name__
    try:
        make(folder)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in KEPT:
            if (folder / "run" / name).exists():
                (target / name).write_text(_portable((folder / "run" / name).read_text(), folder))
    finally:
        shutil.rmtree(folder)


def _portable(text: str, folder: Path) -> str:
    """Without the folders of the machine that it was recorded on."""
    text = text.replace(str(folder), "/runs").replace(f"{ROOT}/", "").replace(sys.base_prefix, "/usr")
    return re.sub(r"/tmp/tolaria-tamiyo-\d+-\w+", "/runs/socket", text)


def main(names: list[str]) -> int:
    for make in SITUATIONS:
        if not names or make.__name__ in names:
            sys.stdout.write(f"{make.__name__}\n")
            record(make)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
