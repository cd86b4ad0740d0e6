"""A change is tried on a live job of two ranks: by a person, in the way of a stop, and with a rank that dies of it."""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_processes import digest_of, let_go, start, wait_until_held
from tests.torchrun import ROOT, Job
from tolaria.errors import RunUnreachable
from tolaria.orders.client import RunClient
from tolaria.orders.words import PAUSE, RESUME, STOP, TRY, Order, Outcome
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import WalKind, read_log

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

CHANGE = "lr*=0.5, host.weight_decay=0.02"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def unharmed() -> str:
    """The digest of a run that nobody tried anything on."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    with start(path, hold=False) as job:
        digest = digest_of(job.finish())
    shutil.rmtree(path)
    return digest


def tolaria(*words: str, code: int = 0) -> str:
    """What the command says; it must end with this exit code."""
    command = [sys.executable, "-m", "tolaria.cli.app", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def stand_still(job: Job, folder: Path) -> None:
    """Have the run pause in the middle of an epoch, while its seed is being blended in."""
    wait_until_held(job, folder)
    orders: list[Outcome] = []
    client = RunClient.of(job.run_dir)
    thread = threading.Thread(target=lambda: orders.append(client.send(Order(action=PAUSE, operator="test"))))
    thread.start()
    time.sleep(0.3)
    let_go(folder)
    thread.join()
    assert orders[0].state == "applied"


def go_on(run: Path) -> None:
    assert RunClient.of(run).send(Order(action=RESUME, operator="test")).state == "applied"


def tries(run: Path) -> list[dict[str, Any]]:
    """The acts of the log that try something."""
    records = read_log(run / "wal", FileOps()).records
    return [r.document for r in records if r.kind == WalKind.ACT and r.document["action"] == TRY]


def test_a_person_tries_something_and_the_run_ends_as_if_not(folder: Path, unharmed: str) -> None:
    run = folder / "run"
    with start(folder) as job:
        stand_still(job, folder)
        text = tolaria("try", str(run), CHANGE, "--steps", "8", "--reason", "is it the rate?")
        found = json.loads(tolaria("try", str(run), "lr*=0.5", "--steps", "12", "--json"))
        far = tolaria("try", str(run), "lr*=1e6", code=1)
        wrong = tolaria("try", str(run), "lr=fast", code=2)
        go_on(run)
        summary = job.finish()
        assert job.left_behind() == []
    assert digest_of(summary) == unharmed
    assert summary["goodput"]["rehearsal"] > 0 and summary["goodput"]["paused"] > 0
    lines = text.splitlines()
    assert lines[0] == "tried  *: lr x0.5; host: weight_decay 0.02" and max(map(len, lines)) <= 80
    assert lines[1].startswith("       8 steps from step 3") and "on 2 ranks" in lines[1]
    assert "training loss" in text and "last 4 steps" in text and "validation loss" in text
    assert "after 8 steps" in " ".join(text.split())
    assert (found["state"], found["details"]["steps"], found["details"]["train_steps"]) == ("applied", 12, 6)
    assert "lr_out_of_bounds" in far and "'lr=fast': 'fast' is no number" in wrong
    assert [act["arguments"]["steps"] for act in tries(run)] == [8, 12, 200]
    assert len(job.events("rehearsed", rank=0)) == 2
    assert 0 < json.loads((run / "status.json").read_text())["goodput"]["rehearsal"] < 30
    logged = tolaria("logs", str(run), "--kind", "rehearsed")
    assert "tried *: lr x0.5; host: weight_decay 0.02 for 8 steps and took it back: " in " ".join(logged.split())


def test_a_stop_ends_a_rehearsal_at_once(folder: Path) -> None:
    run = folder / "run"
    with start(folder, more=("--train.epochs", "100000")) as job:
        stand_still(job, folder)
        tried: list[Outcome] = []
        order = Order(action=TRY, operator="test", arguments={"change": "lr*=0.5", "steps": 50_000})
        thread = threading.Thread(target=lambda: tried.append(RunClient.of(run).send(order, wait_s=60)))
        thread.start()
        job.wait_until(lambda: tries(run) or None, "a rehearsal under way")
        time.sleep(0.5)
        began = time.monotonic()
        assert RunClient.of(run).send(Order(action=STOP, operator="test")).state == "applied"
        assert time.monotonic() - began < 20
        summary = job.finish()
        thread.join()
    assert (tried[0].state, tried[0].code) == ("refused", "interrupted") and "an order to stop" in tried[0].reason
    assert (summary["outcome"], summary["steps"]) == ("stopped", tried[0].step)
    digest_of(summary)  # equal on both ranks


def send_in_vain(run: Path, order: Order) -> None:
    with pytest.raises(RunUnreachable):
        RunClient.of(run).send(order, wait_s=3)


def test_a_rank_that_dies_in_a_rehearsal_leaves_no_trace_of_it(folder: Path, unharmed: str) -> None:
    run = folder / "run"
    with start(folder, max_restarts=1, more=("--train.epochs", "100000", "--train.max_steps", "50")) as job:
        stand_still(job, folder)
        order = Order(action=TRY, operator="test", arguments={"change": "lr*=2", "steps": 15})
        thread = threading.Thread(target=send_in_vain, args=(run, order))
        thread.start()
        job.wait_until(lambda: tries(run) or None, "a rehearsal under way")
        time.sleep(0.05)
        job.rank(1).kill()
        thread.join()
        job.wait_until(lambda: len(job.events("paused", rank=0)) > 1 or None, "the second start, standing still")
        go_on(run)
        summary = job.finish()
    assert job.events("rehearsed") == [] and summary["counters"]["restarts"] == 1
    assert digest_of(summary) == unharmed
