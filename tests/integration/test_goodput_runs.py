"""Where the time of whole runs went, against the kernel's clock, and what status.json says while they run and after.

The wall time is taken from outside: from the moment at which the kernel started rank 0's process to the moment at
which it wrote summary.json.
"""

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_processes import HELD_STEPS, STEPS, digest_of, flags, let_go, start, wait_until_held
from tests.torchrun import Job, launch
from tolaria.errors import TaskError
from tolaria.orders.client import RunClient
from tolaria.orders.words import PAUSE, RESUME, Order
from tolaria.telemetry.goodput import CATEGORIES
from tolaria.view.files import RunFiles

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

SHARE = 0.005
PAUSE_S = 1.5
OFTEN = ("--log.status_s", "0.1")
ONE_RANK_ENDLESS = ("--train.epochs", "100000", "--recovery.snapshot_steps", "20", *OFTEN)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


def kernel_start_s(pid: int) -> float:
    """When the kernel started a process, Unix time, to a hundredth of a second."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    ticks = int(stat.rpartition(")")[2].split()[19])
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def check_sum(job: Job, started_s: float) -> dict[str, float]:
    """The goodput in summary.json, whose sum must be the time from ``started_s`` to the writing of that file."""
    goodput: dict[str, float] = job.summary()["goodput"]
    assert tuple(goodput) == CATEGORIES and min(goodput.values()) >= 0
    wall_s = (job.run_dir / "summary.json").stat().st_mtime - started_s
    assert sum(goodput.values()) == pytest.approx(wall_s, rel=SHARE)
    return goodput


def status(job: Job) -> dict[str, Any]:
    found = RunFiles(job.run_dir).status()
    assert found is not None
    return found


def wait_for_state(job: Job, state: str) -> dict[str, Any]:
    path = job.run_dir / "status.json"
    return job.wait_until(
        lambda: found if path.exists() and (found := status(job))["state"] == state else None, f"state {state}"
    )


@contextmanager
def watched(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Reads the file over and over while the run writes it; every reading must be whole."""
    seen: list[dict[str, Any]] = []
    broken: list[bytes] = []
    over = threading.Event()

    def read() -> None:
        while not over.wait(0.002):
            try:
                raw = path.read_bytes()
            except FileNotFoundError:
                continue
            try:
                found = json.loads(raw)
            except ValueError:
                broken.append(raw)
                return
            if not seen or found["wall_ns"] != seen[-1]["wall_ns"]:
                seen.append(found)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    assert broken == []


def test_a_slow_loader_is_where_the_time_goes_and_a_pause_is_told_apart(folder: Path) -> None:
    task = ("--task", "tests.integration.slow_task:make_task", "--task.args.delay_s", "0.03")
    more = ("--compile.enabled", "false", "--dist.device", "cpu", "--tamiyo.policy", "none", "--train.epochs", "6")
    with watched(folder / "run" / "status.json") as seen, launch(folder, (*task, *more, *OFTEN, "--verbose")) as job:
        started_s = kernel_start_s(job.rank(0).pid)
        job.wait_until(lambda: (job.last_step() >= 30) or None, "a run on its way")
        client = RunClient.of(job.run_dir)
        assert client.send(Order(action=PAUSE, reason="lunch")).state == "applied"
        assert wait_for_state(job, "paused")["mode"]["paused"] == "lunch"
        time.sleep(PAUSE_S)
        assert client.send(Order(action=RESUME)).state == "applied"
        summary = job.finish()
        goodput = check_sum(job, started_s)
        last, output = status(job), " ".join(job.output.split())
        told = job.events("straggler", rank=0)[0]
    steps = summary["steps"]
    # Rank 0 waits for its data, rank 1 for rank 0.
    assert goodput["data wait"] > 0.03 * steps and goodput["data wait"] > 2 * goodput["compute"]
    assert PAUSE_S <= goodput["paused"] < PAUSE_S + 5.0
    assert goodput["restart"] == goodput["replayed"] == goodput["rollback"] == 0
    fast, slow = summary["rank_times"][1], summary["rank_times"][0]
    assert fast["sync wait"] > 0.02 * steps > 10 * fast["data wait"] and slow["sync wait"] < fast["sync wait"] / 2
    assert told["straggler"] == 0 and told["data_ms"] >= 30 > told["others_ms"]
    assert "rank 0 waits 3" in output and "ms a step for its data, the others 0 ms" in output
    assert "for rank 0, for its data" in output  # in the summary
    assert "data wait" in output.partition("Finished")[0]  # --verbose
    assert {"starting", "running", "paused", "finished"} == {each["state"] for each in seen}
    check_course(seen)
    assert (last["state"], last["step"], last["epoch"], last["eta_s"]) == ("finished", steps, 6, 0.0)
    assert last["validation"]["loss"] == summary["final"]["loss"]
    assert {row["rank"]: row["data_ms"] > 25 for row in last["ranks"]} == {0: True, 1: False}


def check_course(seen: list[dict[str, Any]]) -> None:
    """Time and steps only grow in a run that never went back, and nothing is told that is not yet so."""
    for before, after in pairwise(seen):
        assert all(after["goodput"][c] >= before["goodput"][c] - 0.002 for c in CATEGORIES)
        assert after.get("step", 0) >= before.get("step", 0)
    running = [each for each in seen if each["state"] == "running" and each["train_loss"] is not None]
    assert len(running) > 5 and {each["world_size"] for each in seen} == {2}
    assert all(each["samples_per_s"] > 0 and each["memory"]["rss_mb"] > 50 for each in running[5:])


def test_a_return_and_the_steps_done_again_are_told_apart(folder: Path) -> None:
    with launch(
        folder, ("--config", "launch/configs/spike.toml", "--dist.device", "cpu", "--train.epochs", "8")
    ) as job:
        started_s = kernel_start_s(job.rank(0).pid)
        summary = job.finish()
        goodput = check_sum(job, started_s)
    (incident,) = summary["incidents"]
    assert goodput["rollback"] * 1e3 >= 0.9 * incident["milliseconds"] > 0
    # Steps 141 to 149 are done twice: not as many as a tenth of all, nor nothing.
    assert 0 < goodput["replayed"] < 0.3 * (goodput["compute"] + goodput["sync wait"])
    assert goodput["restart"] == goodput["paused"] == 0


def test_a_death_costs_the_time_without_a_run_and_the_steps_since_the_snapshot(folder: Path) -> None:
    more = ("--watchdog.heartbeat_s=1.5", "--recovery.snapshot_steps=10", *OFTEN)
    with start(folder, max_restarts=1, more=more) as job:
        wait_until_held(job, folder)
        started_s = kernel_start_s(job.rank(0).pid)
        job.wait_until(lambda: (status(job)["step"] == HELD_STEPS) or None, "the status of the step")
        before = status(job)
        job.rank(1).kill()
        let_go(folder)
        job.finish()
        goodput = check_sum(job, started_s)
        after = status(job)
    assert before["activity"] == "data wait" and before["goodput"]["restart"] == 0
    # The new start took some seconds, of which none is a new start-up; steps 31 to 33 were done again.
    assert goodput["restart"] > 1.0 and goodput["start-up"] == before["goodput"]["start-up"]
    assert 0 < goodput["replayed"] < goodput["restart"]
    assert (after["state"], after["step"], after["started_ns"]) == ("finished", STEPS, before["started_ns"])
    assert after["counters"]["restarts"] == 1


def test_after_each_end_the_status_says_how_it_was(folder: Path) -> None:
    flags_alone = flags(folder, ranks=0, hold=False)
    with launch(folder, [*flags_alone, *ONE_RANK_ENDLESS], ranks=0) as job:
        job.wait_until(lambda: (job.last_step() > 30) or None, "a run on its way")
        job.process.send_signal(signal.SIGTERM)
        assert job.finish()["outcome"] == "stopped"
        stopped = status(job)
    assert (stopped["state"], stopped["step"]) == ("stopped", job.summary()["steps"])

    # Killed: it stays as it was, and whoever reads it finds nobody behind it.
    resume = ("--run.resume", str(folder / "run"))
    with launch(folder, [*flags_alone, *ONE_RANK_ENDLESS, *resume], ranks=0) as job:
        job.wait_until(lambda: (job.last_step() > stopped["step"] + 30) or None, "the second start on its way")
        wait_for_state(job, "running")
        assert RunFiles(job.run_dir).alive
        job.process.kill()
        job.wait()
        killed = status(job)
        assert killed["state"] == "running" and not RunFiles(job.run_dir).alive
    # The time between the two, in which nobody wanted it to run, is not the run's; starting is.
    idle_s = (killed["wall_ns"] - killed["started_ns"]) / 1e9 - sum(killed["goodput"].values())
    assert 0 < idle_s < 60 and killed["goodput"]["restart"] > 0.5

    (folder / "other").mkdir()
    broken = flags(folder / "other", ranks=1, hold=False, raise_at=23)
    with launch(folder / "other", [*broken, *OFTEN], ranks=2) as job:
        assert job.wait() != 0
        failed = status(job)
    assert failed["state"] == "failed" and ("rank" in failed["reason"] or TaskError.__name__ in failed["reason"])


def test_what_a_run_computes_does_not_depend_on_what_it_tells(folder: Path) -> None:
    digests, files = [], []
    for number, told in enumerate((OFTEN, ("--log.status_s", "0", "--quiet"))):
        place = folder / str(number)
        place.mkdir()
        with launch(place, [*flags(place, ranks=0, hold=False), *told], ranks=0) as job:
            digests.append(digest_of(job.finish()))
            files.append((job.run_dir / "status.json").exists())
            quiet = job.output
    assert digests[0] == digests[1] and files == [True, False]
    assert "epoch" not in quiet.partition("Finished")[0].partition("run ")[2] and "Time" in quiet
