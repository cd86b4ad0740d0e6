"""What happens to whole jobs when their processes are killed, stopped, asked to stop, or started twice.

Each fault hits in the middle of an epoch, with a seed that is being blended in: the task holds every rank in the
loading of one batch until the test has done its harm. What has to come out is the state of the run that nobody harmed.
"""

import hashlib
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.torchrun import Job, is_gone, launch
from tolaria.errors import RunLocked, TaskError

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

STEPS, STEPS_PER_EPOCH = 50, 10
HELD_STEPS = 33  # taken when the ranks are held: three whole epochs and a part of the fourth
CHECKPOINT_AFTER_SIGNAL_S = 20.0
ENDED_AFTER_ERROR_S = 20.0
SCRIPT = """
command = [
    { boundary = 1, op = "germinate", slot = "mid", blueprint = "residual_mlp" },
    { boundary = 2, op = "start_training", slot = "mid" },
    { boundary = 3, op = "start_grafting", slot = "mid" },
]
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


def flags(folder: Path, *, ranks: int = 2, hold: bool = True, **task: Any) -> list[str]:
    """The run of this file. ``hold``: keep the ranks in the loading of the batch after HELD_STEPS."""
    (folder / "script.toml").write_text(SCRIPT)
    if hold:
        task |= {"hold_dir": folder, "hold_at": HELD_STEPS + 1}
    options = {
        "task": "tests.faults.held_task:make_task",
        "train.epochs": STEPS // STEPS_PER_EPOCH,
        "train.batch_size": 8 // max(ranks, 1),
        "compile.enabled": "false",
        "dist.device": "cpu",
        "tamiyo.policy": f"script:{folder / 'script.toml'}",
        "kasmina.blend_steps": 15,
        "kasmina.measure_signal": "false",  # it reads a batch, and the task counts what is read
        "log.interval_steps": 1,
        **{f"task.args.{name}": value for name, value in task.items()},
    }
    return [f"--{name}={value}" for name, value in options.items()]


def start(folder: Path, *, ranks: int = 2, max_restarts: int = 0, more: tuple[str, ...] = (), **task: Any) -> Job:
    return launch(folder, [*flags(folder, ranks=ranks, **task), *more], ranks=ranks, max_restarts=max_restarts)


def wait_until_held(job: Job, folder: Path, ranks: int = 2) -> None:
    """Until every rank waits in its loader, in the middle of an epoch, while the seed is being blended in."""
    for rank in range(max(ranks, 1)):
        job.wait_file(folder / f"reached-{rank}")
    # Lines are written by a thread of their own, a moment later.
    job.wait_until(lambda: (job.last_step() >= HELD_STEPS) or None, f"step {HELD_STEPS}")
    assert job.last_step() == HELD_STEPS
    assert job.events("boundary", rank=0)[-1]["seeds"] == {"mid": "BLENDING"}


def let_go(folder: Path) -> None:
    (folder / "go").touch()


def digest_of(summary: dict[str, Any]) -> str:
    """The state that all ranks ended with."""
    digests = set(summary["state_digest"].values())
    assert len(digests) == 1
    return str(digests.pop())


def run_unharmed(folder: Path, ranks: int) -> dict[str, Any]:
    with start(folder, ranks=ranks, hold=False) as job:
        summary = job.finish()
        assert summary["steps"] == STEPS
        assert job.left_behind() == []
    return summary


@pytest.fixture(scope="module")
def unharmed_folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def unharmed(unharmed_folder: Path) -> str:
    """Digest of the run of two ranks that nothing happened to."""
    return digest_of(run_unharmed(unharmed_folder, ranks=2))


@pytest.fixture(scope="module")
def unharmed_alone() -> str:
    """The same with one process, without torchrun."""
    with tempfile.TemporaryDirectory(prefix="tl-") as path:
        return digest_of(run_unharmed(Path(path), ranks=0))


def test_a_run_directory_is_for_its_owner_only(unharmed: str, unharmed_folder: Path) -> None:
    run = unharmed_folder / "run"
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in [run, *run.rglob("*")]}
    assert {run / "ckpt", run / "events.jsonl", run / "summary.json", run / "tamiyo.log"} <= set(modes)
    assert [(path, oct(mode)) for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)] == []


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_happened(
    folder: Path, unharmed: str, victim: int
) -> None:
    with start(folder, max_restarts=3) as job:
        wait_until_held(job, folder)
        killed, server = job.rank(victim), job.policy_server()
        killed.kill()
        let_go(folder)
        assert is_gone(server)
        summary = job.finish()
        assert f"exitcode: -9) local_rank: {victim} (pid: {killed.pid})" in job.output
        for rank in range(2):
            starts = job.events("run_started", rank)
            assert [event["restarted"] for event in starts] == [False, True]
        assert [event["saved_step"] < HELD_STEPS for event in job.events("resumed")] == [True, True]
        assert digest_of(summary) == unharmed
        assert summary["counters"]["restarts"] == 1
        assert job.left_behind() == []


def test_nothing_outlives_a_killed_torchrun_and_the_next_start_goes_on(folder: Path, unharmed: str) -> None:
    with start(folder) as job:
        wait_until_held(job, folder)
        orphans = [job.rank(0), job.rank(1), job.policy_server()]
        job.process.kill()
        assert job.wait() == -signal.SIGKILL
        assert [process for process in orphans if not is_gone(process)] == []
        assert job.processes() == []
    let_go(folder)
    finish_as(unharmed, folder, ranks=2)


def finish_as(digest: str, folder: Path, ranks: int) -> None:
    """Go on in the same run directory: the run ends with this digest and leaves nothing behind."""
    with start(folder, ranks=ranks, more=("--resume=auto",)) as job:
        summary = job.finish()
        assert len(job.events("resumed", rank=0)) == 1
        assert (summary["outcome"], summary["steps"]) == ("finished", STEPS)
        assert digest_of(summary) == digest
        assert job.left_behind() == []


def test_torchrun_that_is_asked_to_stop_leaves_a_checkpoint_of_that_step(folder: Path, unharmed: str) -> None:
    with start(folder) as job:
        wait_until_held(job, folder)
        job.process.send_signal(signal.SIGTERM)
        let_go(folder)
        job.wait(CHECKPOINT_AFTER_SIGNAL_S)
        assert_stopped(job, "SIGTERM", ranks=2)
    finish_as(unharmed, folder, ranks=2)


def assert_stopped(job: Job, name: str, ranks: int) -> None:
    """Every rank stopped at the same step, in the middle of an epoch, and that step is on the disk."""
    asked = {event["rank"]: (event["signal"], event["step"]) for event in job.events("stop_requested")}
    step = HELD_STEPS + 1
    assert asked == dict.fromkeys(range(max(ranks, 1)), (name, step))
    summary = job.summary()
    assert (summary["outcome"], summary["steps"]) == ("stopped", step)
    assert job.events("checkpoint_committed")[-1]["saved_step"] == step
    assert job.checkpoints()[-1].endswith(f"-s{step}")
    assert job.left_behind() == []


def test_ctrl_c_stops_all_with_a_checkpoint(folder: Path) -> None:
    with start(folder) as job:
        wait_until_held(job, folder)
        # A terminal sends it to the whole group; torchrun then passes it on to the ranks once more.
        os.killpg(job.process.pid, signal.SIGINT)
        let_go(folder)
        job.wait(CHECKPOINT_AFTER_SIGNAL_S)
        assert_stopped(job, "SIGINT", ranks=2)


def test_a_signal_for_one_rank_stops_all_at_the_same_step(folder: Path, unharmed: str) -> None:
    with start(folder) as job:
        wait_until_held(job, folder)
        job.rank(1).send_signal(signal.SIGTERM)
        let_go(folder)
        assert job.finish()["outcome"] == "stopped"
        assert_stopped(job, "SIGTERM", ranks=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_that_is_asked_to_stop_goes_on_later(
    folder: Path, unharmed_alone: str, number: signal.Signals
) -> None:
    with start(folder, ranks=0) as job:
        wait_until_held(job, folder, ranks=0)
        job.process.send_signal(number)
        job.process.send_signal(signal.SIGTERM)  # Who asks twice gets the same.
        let_go(folder)
        job.finish(CHECKPOINT_AFTER_SIGNAL_S)
        assert_stopped(job, number.name, ranks=0)
    finish_as(unharmed_alone, folder, ranks=0)


def picture(*folders: Path) -> dict[str, tuple[int, int, int, str]]:
    """Everything in these folders: mode, owner, time of change, content."""
    found = {}
    for path in [path for folder in folders for path in [folder, *sorted(folder.rglob("*"))]]:
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (status.st_mode, status.st_uid, status.st_mtime_ns, content)
    return found


def test_a_second_start_in_the_same_run_directory_touches_nothing(folder: Path, unharmed_alone: str) -> None:
    with start(folder, ranks=0) as first:
        wait_until_held(first, folder, ranks=0)
        first.process.send_signal(signal.SIGSTOP)
        wait_until_stopped(first, psutil.Process(first.process.pid))
        before = picture(first.run_dir, folder / "tmp")
        with start(folder, ranks=0, more=("--resume=auto",)) as second:
            assert second.wait() == RunLocked.exit_code == 75
            assert second.output.count("\n") == 1
            assert f"process {first.process.pid} on " in second.output
            assert second.processes() == []
        assert picture(first.run_dir, folder / "tmp") == before
        first.process.send_signal(signal.SIGCONT)
        let_go(folder)
        assert digest_of(first.finish()) == unharmed_alone
        assert first.left_behind() == []


def wait_until_stopped(job: Job, process: psutil.Process) -> None:
    job.wait_until(lambda: process.status() == psutil.STATUS_STOPPED or None, f"process {process.pid} stopped")


def test_a_policy_server_that_stands_still_does_not_stop_the_run(folder: Path) -> None:
    deadlines = ("--tamiyo.deadline_ms=400", "--tamiyo.resend_ms=100")
    with start(folder, ranks=0, more=deadlines) as job:
        wait_until_held(job, folder, ranks=0)
        server = job.policy_server()
        server.suspend()
        wait_until_stopped(job, server)
        let_go(folder)
        summary = job.finish()
        decisions = [(event["boundary"], event["source"], event["reason"]) for event in job.events("decision")]
        assert [source for _, source, _ in decisions] == ["policy"] * 3 + ["fallback"] * 2
        assert {reason for _, source, reason in decisions if source == "fallback"} == {"timeout"}
        assert (summary["outcome"], summary["steps"], summary["mode"]) == ("finished", STEPS, "conservative")
        assert job.left_behind() == []


def test_what_a_loader_raises_on_one_rank_ends_the_job_and_is_told_once(folder: Path) -> None:
    with start(folder, hold=False, raise_at=HELD_STEPS + 1) as job:
        job.wait_until(lambda: job.last_step() == HELD_STEPS or None, "the step before")
        assert job.wait(ENDED_AFTER_ERROR_S) != 0
        told = [line for line in job.output.splitlines() if "sample store gone at batch 34" in line]
        assert len(told) == 1 and told[0].startswith("tolaria: rank 1: ")
        assert "OSError" in told[0] and "held_task.py, line " in told[0]
        # torchrun, which goes by the order of deaths, blames the right one.
        blamed = job.output.partition("Root Cause")[2]
        assert "rank      : 1 " in blamed and f"exitcode  : {TaskError.exit_code} " in blamed
        assert job.last_step() == HELD_STEPS
        # What it was at is there for a start that goes on from it.
        assert {name.rpartition("-r")[2] for name in job.left_behind()} == {"0-0", "1-0"}
