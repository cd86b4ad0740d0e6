"""Whole jobs that die at chosen places, or stand still, and go on: the state at the end is that of the unharmed run."""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.faults.test_processes import HELD_STEPS, STEPS, digest_of, flags, let_go
from tests.torchrun import Job
from tolaria.errors import CrashLoop, PeerLost, RunHalted
from tolaria.recovery.wal.records import scan

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

QUICK = ("--watchdog.heartbeat_s=1.5", "--recovery.snapshot_steps=5")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def unharmed() -> str:
    """Digest of the run that nothing happens to."""
    with tempfile.TemporaryDirectory(prefix="tl-") as path, start(Path(path)) as job:
        return digest_of(job.finish())


def start(folder: Path, faults: str = "", *, restarts: int = 0, more: tuple[str, ...] = (),
          environment: Mapping[str, str] = MappingProxyType({}), **task: Any) -> Job:  # fmt: skip
    """The run of test_processes.py with snapshots every five steps and faults at chosen places."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    command += ["-m", "tests.faults.faulty", *flags(folder, **{"hold": False, **task}), *QUICK, *more]
    command = [sys.executable, *command, "--run.dir", str(folder / "run")]
    plan = {"TOLARIA_FI": faults, "TOLARIA_FI_DIR": str(folder)}
    return Job(folder, command, folder / "run", environment={**plan, **environment})


def decisions(job: Job) -> list[int]:
    """The boundaries of all decisions in the log, in order."""
    found = []
    for segment in sorted((job.run_dir / "wal").glob("*.log")):
        for record, _, _ in scan(segment.read_bytes()).records:
            if record.kind.name == "DECISION":
                found.append(record)
    return [record.lsn for record in found]


@pytest.mark.parametrize("place", ["decided", "applying", "applied"])
def test_a_decision_takes_effect_exactly_once_wherever_rank_0_dies(folder: Path, unharmed: str, place: str) -> None:
    with start(folder, f"{place}:0:2:kill", restarts=2) as job:
        summary = job.finish()
        assert (folder / f"struck-{place}-0").exists()
        assert digest_of(summary) == unharmed
        # Each boundary was decided once; the one in question was taken from the log, and nobody asked.
        assert len(decisions(job)) == STEPS // 10
        assert [event["boundary"] for event in job.events("decision_repeated")] == [2]
        applied = [event["command_id"] for event in job.events("command_applied")]
        assert len(set(applied)) == 3
        assert job.left_behind() == []


@pytest.mark.parametrize("fault", [
    "renaming:0:3:kill", "renamed:0:3:kill", "snapshot:1:4:kill", "confirmed:1:4:kill", "step:0:27:kill",
])  # fmt: skip
def test_a_death_at_any_place_of_a_save_costs_nothing(folder: Path, unharmed: str, fault: str) -> None:
    place, rank, *_ = fault.split(":")
    with start(folder, fault, restarts=2) as job:
        summary = job.finish()
        assert (folder / f"struck-{place}-{rank}").exists()
        assert digest_of(summary) == unharmed
        assert job.left_behind() == []


def test_a_death_while_a_state_is_taken_up_costs_nothing(folder: Path, unharmed: str) -> None:
    with start(folder, "step:1:27:kill;loading:0:1:kill", restarts=3) as job:
        assert digest_of(job.finish()) == unharmed
        assert (folder / "struck-step-1").exists()
        assert (folder / "struck-loading-0").exists()
        assert len(job.events("run_started", rank=0)) == 3


def test_a_death_in_the_middle_of_a_return_ends_in_the_return(folder: Path) -> None:
    poison = {"nan_from": 17, "nan_to": 20}
    with start(folder, restarts=1, **poison) as job:
        expected = digest_of(job.finish())
        assert [event["cause"] for event in job.events("went_back", rank=0)] == ["non_finite"]
    shutil.rmtree(folder / "run")
    for place in ("void", "restoring"):
        with start(folder, f"{place}:0:1:kill", restarts=1, **poison) as job:
            summary = job.finish()
            assert (folder / f"struck-{place}-0").exists()
            assert digest_of(summary) == expected
            assert summary["incidents"][0]["cause"] == "non_finite"
            assert job.left_behind() == []
        shutil.rmtree(folder / "run")


def test_a_stopped_rank_is_ended_within_seconds_and_the_run_goes_on(folder: Path, unharmed: str) -> None:
    with start(folder, restarts=2, hold=True) as job:
        _hold(job, folder)
        stopped = time.monotonic()
        job_rank(job, 1).send_signal(signal.SIGSTOP)
        let_go(folder)
        job.wait_until(lambda: job.events("rank_stuck") or None, "the watchdog's word", 20)
        assert time.monotonic() - stopped < 20  # torchrun alone takes 36
        (event,) = job.events("rank_stuck")
        assert (event["stuck_rank"], event["phase"]) == (1, "STEP")
        assert digest_of(job.finish()) == unharmed
        assert job.left_behind() == []


def test_a_short_stop_harms_nobody(folder: Path, unharmed: str) -> None:
    with start(folder, hold=True) as job:
        _hold(job, folder)
        rank = job_rank(job, 1)
        rank.send_signal(signal.SIGSTOP)
        let_go(folder)
        time.sleep(0.8)
        rank.send_signal(signal.SIGCONT)
        assert digest_of(job.finish()) == unharmed
        assert job.events("rank_stuck") == []
        assert len(job.events("run_started", rank=0)) == 1


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_of_native_code_is_a_death_like_others(folder: Path, unharmed: str, number: signal.Signals) -> None:
    with start(folder, restarts=2, hold=True) as job:
        _hold(job, folder)
        job_rank(job, 1).send_signal(number)
        let_go(folder)
        assert digest_of(job.finish()) == unharmed
        assert f"exitcode: -{int(number)})" in job.output
        assert job.left_behind() == []


def test_a_rank_that_holds_the_interpreter_lock_is_ended_and_the_run_goes_on(folder: Path, unharmed: str) -> None:
    with start(folder, "step:1:27:lock30", restarts=2) as job:
        assert digest_of(job.finish()) == unharmed
        assert (folder / "struck-step-1").exists()
        (event,) = job.events("rank_stuck")
        assert event["stuck_rank"] == 1 and "interpreter lock" in event["reason"]
        assert job.left_behind() == []


def test_a_lock_held_for_a_moment_harms_nobody(folder: Path, unharmed: str) -> None:
    with start(folder, "step:1:27:lock1") as job:
        assert digest_of(job.finish()) == unharmed
        assert (folder / "struck-step-1").exists()
        assert job.events("rank_stuck") == []


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group for memory that a process may put itself into."""
    path = Path("/sys/fs/cgroup/memory") / f"tolaria-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"this process may not make a memory control group (version 1): {error}")
    yield path
    path.rmdir()


def test_a_rank_that_the_kernel_kills_for_its_memory_is_a_death_like_others(
    folder: Path, unharmed: str, memory_group: Path
) -> None:
    with start(folder, "step:1:27:eat", restarts=2, environment={"TOLARIA_FI_CGROUP": str(memory_group)}) as job:
        assert digest_of(job.finish()) == unharmed
        assert "oom_kill 1" in (memory_group / "memory.oom_control").read_text().splitlines()
        assert (folder / "struck-step-1").exists()
        assert job.left_behind() == []


def test_a_rank_that_leaves_out_a_collective_ends_the_start_and_the_next_one_goes_on(
    folder: Path, unharmed: str
) -> None:
    more = ("--dist.timeout_s=8", "--dist.control_timeout_s=8")
    with start(folder, "fence:1:27:skip", restarts=2, more=more) as job:
        assert digest_of(job.finish()) == unharmed
        assert (folder / "struck-fence-1").exists()
        assert len(job.events("run_started", rank=0)) > 1
        assert job.left_behind() == []


def test_three_starts_without_progress_end_the_run(folder: Path) -> None:
    with start(folder, "at-step:1:7:always-kill", restarts=4) as job:
        assert job.wait() != 0
        assert len(job.events("run_started", rank=0)) == 5
        # The rank that the death of the other ends tells that it lost it.
        (failed,) = {event["error"] for event in job.events("run_failed")} - {PeerLost.__name__}
        assert failed == CrashLoop.__name__
        assert "3 starts in a row began at step" in job.output
    assert CrashLoop.exit_code == RunHalted.exit_code == 69


def test_a_kill_of_all_ranks_twenty_times_in_one_run(folder: Path) -> None:
    steps, kills, random_steps = 320, 20, random.Random(7)
    more = (f"--train.epochs={steps // 10}", "--recovery.snapshot_steps=5")
    with start(folder, more=more) as job:
        digest = digest_of(job.finish())
    shutil.rmtree(folder / "run")
    with start(folder, restarts=kills, more=more) as job:
        reached, lost = 0, []
        for kill in range(kills):
            reached += random_steps.randrange(11, 15)
            job.wait_until(lambda at=reached: (job.last_step() >= at) or None, f"step {reached}")
            ranks = [job_rank(job, 0), job_rank(job, 1)]
            at = job.last_step()
            for rank in ranks:
                rank.kill()
            job.wait_until(lambda n=kill: len(resumed(job)) > n or None, "the next start")
            lost.append(at - resumed(job)[-1]["saved_step"])
            reached = max(reached, at)
        assert digest_of(job.finish()) == digest
        assert len(job.events("run_started", rank=0)) == kills + 1
        # A step may have been taken between the look and the kill; a snapshot was at most one interval away.
        assert max(lost) <= 5, lost
        assert job.left_behind() == []


def resumed(job: Job) -> list[dict[str, Any]]:
    """What each start went on from."""
    return job.events("resumed", rank=0)


def _hold(job: Job, folder: Path) -> None:
    for rank in range(2):
        job.wait_file(folder / f"reached-{rank}")
    job.wait_until(lambda: (job.last_step() >= HELD_STEPS) or None, f"step {HELD_STEPS}")
    assert job.last_step() == HELD_STEPS


def job_rank(job: Job, rank: int) -> Any:
    """The process of a rank of the faulty launcher."""
    return job.wait_until(lambda: job.find_rank(rank, "tests.faults.faulty"), f"rank {rank}")
