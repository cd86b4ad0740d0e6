"""A person at a live job of two ranks: every order takes effect on both at one step, or on none, and is in the log.

Orders are sent by the command that a person types, in a process of its own.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_processes import digest_of, let_go, start, wait_until_held
from tests.torchrun import ROOT, Job
from tolaria.errors import RunUnreachable
from tolaria.leyline.codec import encode_command
from tolaria.leyline.framing import new_key_file_text
from tolaria.orders.client import RunClient
from tolaria.orders.words import HELLO, PAUSE, Order, Outcome
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import WalKind, WalRecord, read_log
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

ENDLESS = ("--train.epochs", "100000", "--recovery.snapshot_steps", "20")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


def tolaria(*words: str, code: int = 0) -> str:
    """What the command says; it must end with this exit code."""
    command = [sys.executable, "-m", "tolaria.cli.app", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def send(run: Path, *words: str, code: int = 0) -> dict[str, Any]:
    """The outcome of `tolaria send RUN ... --json`."""
    found: dict[str, Any] = json.loads(tolaria("send", str(run), *words, "--json", code=code))
    return found


def acts(job: Job) -> list[list[dict[str, Any]]]:
    """What each rank says of the acts it made, in order."""
    return [job.events("act_applied", rank=rank) for rank in range(2)]


def log_of(run: Path) -> list[WalRecord]:
    return read_log(run / "wal", FileOps()).records


def test_a_session_from_the_first_look_to_the_stop(folder: Path) -> None:
    run = folder / "run"
    with start(folder, hold=False, more=ENDLESS) as job:
        job.wait_until(lambda: (job.last_step() > 40) or None, "a run on its way")
        assert RunClient.of(run).send(Order(action=HELLO)).details["mode"] == "normal"

        halved = send(run, "lr", "--scale", "0.5", "--groups", "host*", "--reason", "plateau")
        assert (halved["state"], halved["act"], halved["ranks"]) == ("applied", 1, 2)
        assert halved["details"]["what"] == "host*: lr x0.5"

        far = send(run, "lr", "--scale", "1e9", code=1)
        assert (far["state"], far["code"]) == ("refused", "lr_out_of_bounds")
        wrong = send(run, "seed", "germinate", "--slot", "mid", "--blueprint", "residual_mlp", code=1)
        assert wrong["state"] == "refused" and "GERMINATE" in wrong["reason"].upper()  # the script has grown one there
        assert send(run, "lr", "--scale", "0.9", "--dry-run")["state"] == "checked"

        paused = send(run, "pause", "--reason", "lunch")
        assert paused["state"] == "applied"
        assert send(run, "pause", code=1)["code"] == "paused"
        again = send(run, "lr", "--scale", "0.9")
        assert again["step"] == paused["step"]  # it stands still, and takes orders
        taken_back = json.loads(tolaria("undo", str(run), "--json"))
        assert (taken_back["step"], taken_back["details"]["what"]) == (paused["step"], "*: undo")
        assert job.last_step() <= paused["step"]
        resumed = send(run, "resume")
        assert resumed["step"] == paused["step"]
        assert send(run, "resume", code=1)["code"] == "not_paused"

        return_and_stop(run)
        summary = job.finish()
        assert summary["outcome"] == "stopped"
        digest_of(summary)  # equal on both ranks
        check_both_ranks(job)
        assert job.left_behind() == []
    check_the_log(run)
    ordered = [command for command in summary["commands"] if command["by"]]
    assert {"host*: lr x0.5", "pause", "resume", "checkpoint", "stop"} <= {command["what"] for command in ordered}
    gone = tolaria("send", str(run), "pause", code=75)
    assert "no run there takes orders" in gone


def return_and_stop(run: Path) -> None:
    saved = send(run, "checkpoint")
    assert Path(saved["details"]["checkpoint"]).name.endswith(f"-s{saved['step']}")
    assert send(run, "conservative", "on", "--reason", "careful")["state"] == "applied"
    assert send(run, "lr", "--scale", "1.5", code=1)["code"] == "lr_increase_conservative"
    assert json.loads(tolaria("undo", str(run), "--json"))["details"]["what"] == "breaker closed"

    marked = send(run, "lr", "--scale", "0.7")
    back = json.loads(tolaria("undo", str(run), "--weights", "--json"))
    assert back["state"] == "applied" and back["details"]["to_step"] <= marked["step"]
    returned = send(run, "rollback", "--to", "good", "--reason", "better there")
    assert returned["state"] == "applied" and returned["details"]["to_step"] < returned["step"]
    assert send(run, "rollback", "--to", "step:1", code=1)["code"] == "no_checkpoint"

    assert send(run, "stop", "--reason", "enough")["state"] == "applied"


def check_both_ranks(job: Job) -> None:
    """They made the same acts, at the same steps, and came to the same states."""
    first, second = acts(job)
    assert len(first) >= 12
    for mine, other in zip(first, second, strict=True):
        for key in ("act", "step", "what", "digest"):
            assert mine[key] == other[key]


def check_the_log(run: Path) -> None:
    """Every act is there with its order's frame, and what became of it right after it."""
    records = [r for r in log_of(run) if r.kind in (WalKind.ACT, WalKind.ACTED)]
    asked = [r.document for r in records if r.kind == WalKind.ACT]
    done = [r.document for r in records if r.kind == WalKind.ACTED]
    assert [a["act"] for a in asked] == [d["act"] for d in done]
    assert all(bytes.fromhex(a["frame"]).startswith(b"TLY1") and a["operator"] for a in asked)
    assert [a["reason"] for a in asked if a["action"] == "stop"] == ["enough"]


def test_who_has_not_the_key_is_not_heard_and_an_order_counts_once(folder: Path) -> None:
    run = folder / "run"
    with start(folder, hold=False, more=ENDLESS) as job:
        job.wait_until(lambda: (job.last_step() > 5) or None, "a run on its way")
        other = folder / "other.key"
        other.touch(0o600)
        other.write_text(new_key_file_text())
        unheard = tolaria("send", str(run), "pause", "--key-file", str(other), "--wait", "1", code=75)
        assert "no answer within 1 s" in unheard
        other.chmod(0o644)
        assert "chmod 600" in tolaria("send", str(run), "pause", "--key-file", str(other), code=2)
        address = json.loads((run / "operator.json").read_text())
        keys = RunClient.of(run)._keys
        stale = RunClient(address["endpoint"], run_id=address["run_id"], generation="another start", keys=keys)
        with pytest.raises(RunUnreachable):
            stale.send(Order(action=PAUSE), wait_s=1)
        assert [event for rank in acts(job) for event in rank] == []
        once = Order(action="checkpoint", operator="somebody")
        first = RunClient.of(run).send(once)
        assert RunClient.of(run).send(once) == first
        assert len(job.events("act_applied", rank=0)) == 1
        send(run, "stop")
        job.finish()


def test_a_run_that_stood_still_is_the_one_that_did_not(folder: Path) -> None:
    with start(folder, hold=False) as unharmed:
        digest = digest_of(unharmed.finish())
    shutil.rmtree(folder / "run")
    with start(folder) as job:
        wait_until_held(job, folder)
        pausing = Sent(folder / "run", Order(action=PAUSE))
        wait_until_asked(job, folder / "run", 1)
        let_go(folder)
        paused = pausing.outcome()
        job.wait_until(lambda: len(job.events("paused")) == 2 or None, "both ranks standing still")
        assert send(folder / "run", "resume")["step"] == paused.step
        assert digest_of(job.finish()) == digest


def test_an_act_holds_over_the_death_of_a_rank(folder: Path) -> None:
    digests = []
    for kill in (False, True):
        shutil.rmtree(folder / "run", ignore_errors=True)
        for name in ("go", "reached-0", "reached-1"):
            (folder / name).unlink(missing_ok=True)
        with start(folder, max_restarts=3) as job:
            wait_until_held(job, folder)
            # A command's id is part of what the state remembers: in both runs the same.
            halve = encode_command(with_identity(do.scale_lr("*", 0.5), "op-1", issued_by="test", issued_at_ns=1))
            orders = [Order(action="command", command=halve), Order(action=PAUSE)]
            sent = [Sent(folder / "run", order) for order in orders]
            wait_until_asked(job, folder / "run", 2)
            let_go(folder)
            steps = {one.outcome().step for one in sent}
            assert len(steps) == 1
            if kill:
                job.rank(1).kill()
                job.wait_until(lambda: len(job.events("run_started", rank=0)) == 2 or None, "another start")
                # The log says that it was paused, so it is again, and the rate is what it was ordered to be.
                job.wait_until(lambda: len(job.events("paused", rank=0)) == 2 or None, "standing still again")
                assert [event["again"] for event in job.events("act_applied", rank=1)][-2:] == [True, True]
            send(folder / "run", "resume")
            digests.append(digest_of(job.finish()))
    assert digests[0] == digests[1]


def wait_until_asked(job: Job, run: Path, orders: int) -> None:
    """Until so many orders wait; the training thread does not get to them meanwhile."""
    client = RunClient.of(run)

    def waiting() -> bool | None:
        return client.send(Order(action=HELLO)).details["waiting"] == orders or None

    job.wait_until(waiting, f"{orders} orders waiting")


class Sent:
    """An order on its way, while the test goes on."""

    def __init__(self, run: Path, order: Order) -> None:
        self._found: list[Outcome] = []
        self._thread = threading.Thread(target=lambda: self._found.append(RunClient.of(run).send(order)))
        self._thread.start()

    def outcome(self) -> Outcome:
        self._thread.join(60)
        [found] = self._found
        assert found.state == "applied", found
        return found
