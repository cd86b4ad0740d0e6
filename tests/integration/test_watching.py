"""A person looks on while two real ranks train: what `tolaria runs`, `status`, `top`, `logs` and `why` say of the live
run, of what is done to it, and of the run after its end. Every command is typed, in a process of its own.
"""

import fcntl
import json
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_processes import start
from tests.torchrun import ROOT, Job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

ENDLESS = ("--train.epochs", "100000", "--recovery.snapshot_steps", "20", "--run.name", "held")
SOON_S = 5.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


def tolaria(*words: object, code: int = 0, columns: int = 80, lines: int = 24) -> str:
    """What the command says on stdout; it must end with this exit code, and nothing is to be on stderr then."""
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": str(lines)}
    command = [sys.executable, "-m", "tolaria.cli.app", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=environment, encoding="utf-8"
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == "" or code
    return done.stdout


def asked(*words: object) -> Any:
    """The JSON that the command says."""
    return json.loads(tolaria(*words, "--json"))


def why(run: Path, *words: object) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = asked("why", run, *words)["answers"]
    return answers


def soon(job: Job, find: Any, what: str) -> Any:
    return job.wait_until(lambda: find() or None, what, SOON_S)


def in_a_terminal(run: Path, *, columns: int, lines: int) -> str:
    """What `tolaria top` draws in a terminal of this size until q is typed; it must leave by itself then."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "tolaria.cli.app", "top", str(run), "--every", "0.2"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env=environment
    ) as shown:
        os.close(follower)
        drawn, end, typed = b"", time.monotonic() + 30, False
        while time.monotonic() < end:
            ready, _, _ = select.select([leader], [], [], 0.1)
            try:
                drawn += os.read(leader, 65536) if ready else b""
            except OSError:
                break  # it has left, and the terminal with it
            if not typed and drawn.count(b"\x1b[H") >= 3:
                os.write(leader, b"q")
                typed = True
        assert shown.wait(10) == 0
    os.close(leader)
    return drawn.decode()


def test_a_live_run_is_seen_understood_and_seen_after_its_end(folder: Path) -> None:
    run = folder / "run"
    with start(folder, hold=False, more=ENDLESS) as job:
        job.wait_until(lambda: (job.last_step() > 60) or None, "a run on its way")
        _the_live_run(folder, run)
        _what_is_done_to_it(job, run)
        tolaria("send", run, "stop", "--reason", "enough")
        job.finish()
    _the_ended_run(folder, run)


def _the_live_run(folder: Path, run: Path) -> None:
    began = time.monotonic()
    told = asked("status", run)
    assert time.monotonic() - began < 5
    assert (told["state"], told["alive"], told["world_size"], told["name"]) == ("running", True, 2, "held")
    assert told["step"] > 60 and told["epochs"] == 100_000 and told["validation"]["step"] > 0
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1] and told["seeds"][0]["slot"] == "mid"
    page = tolaria("status", run)
    assert page.startswith("held  running") and "rank 1" in page and "epoch" in page
    assert all(len(line) <= 80 for line in page.splitlines())

    (listed,) = asked("runs", folder)
    assert (listed["run"], listed["state"], listed["ranks"]) == ("run", "running", 2)
    assert "running" in tolaria("runs", folder)

    frame = tolaria("top", run, "--once").splitlines()
    assert len(frame) == 24 and max(map(len, frame)) <= 80
    assert "accuracy" in "\n".join(frame) and "rank 1" in "\n".join(frame)
    large = tolaria("top", run, "--once", columns=160, lines=50).splitlines()
    assert len(large) == 50 and max(map(len, large)) <= 160 and "Happened" in "\n".join(large)
    assert asked("top", run)["boundaries"][0]["step"] == 10

    lines = [json.loads(line) for line in tolaria("logs", run, "--kind", "boundary", "--json").splitlines()]
    assert {line["kind"] for line in lines} == {"boundary"} and {line["rank"] for line in lines} == {0}
    second = tolaria("logs", run, "--rank", "1", "--since", "20", "--json").splitlines()
    assert {json.loads(line)["rank"] for line in second} == {1}
    assert min(json.loads(line)["step"] for line in second) >= 20

    drawn = in_a_terminal(run, columns=100, lines=30)
    assert "held" in drawn and "running" in drawn and "\x1b[?1049l" in drawn  # the screen before is back


def _what_is_done_to_it(job: Job, run: Path) -> None:
    tolaria("send", run, "pause", "--reason", "lunch")
    assert soon(job, lambda: asked("status", run)["state"] == "paused", "paused")
    (answer,) = why(run, "paused")
    assert answer["what"].endswith(": lunch") and answer["now"] and answer["do"].endswith(f"tolaria send {run} resume")
    assert why(run)[0]["topic"] == "paused" and "paused" in tolaria("top", run, "--once").splitlines()[0]
    tolaria("send", run, "resume")
    assert soon(job, lambda: asked("status", run)["state"] == "running", "running again")

    tolaria("send", run, "lr", "--scale", "1e9", code=1)
    (refused,) = soon(job, lambda: why(run, "refused"), "the refusal")
    assert refused["what"].startswith("*: lr x1e+09 was refused: total factor of the lr")
    name = asked("status", run)["commands"][-1]["command_id"]
    assert why(run, "refused", "--command", name)[0]["what"] == refused["what"]

    tolaria("send", run, "conservative", "on", "--reason", "careful now")
    (careful,) = soon(job, lambda: [a for a in why(run, "conservative") if a["now"]], "conservative mode")
    assert "careful now" in careful["what"] and careful["do"].endswith(f"tolaria send {run} conservative off")
    tolaria("send", run, "conservative", "off")

    tolaria("send", run, "emergency", "conservative", "--reason", "smoke")
    back = soon(job, lambda: why(run, "went-back"), "a return")[-1]
    assert "an emergency asked for it" in back["what"] and back["facts"][0].startswith(
        f"from step {back['since']:,} to "
    )
    told = next(e for e in job.events("went_back", rank=0) if e["from_step"] == back["since"])
    assert back["since"] == told["from_step"] and f"to {told['to_step']:,}, to {told['source']}" in back["facts"][0]

    shutil.move(run / "ckpt", run / "away")
    (run / "ckpt").touch()
    (failed, *_) = job.wait_until(lambda: why(run, "no-checkpoint") or None, "a save that fails", 30)
    assert failed["urgency"] == "waiting" and failed["now"], failed
    (run / "ckpt").unlink()
    shutil.move(run / "away", run / "ckpt")


def _the_ended_run(folder: Path, run: Path) -> None:
    told = asked("status", run)
    assert (told["state"], told["alive"]) == ("stopped", False)
    assert told["checkpoints"][-1]["step"] == told["step"]
    assert tolaria("status", run).startswith("held  stopped")
    assert asked("runs", folder)[0]["state"] == "stopped"
    (answer,) = why(run, "stopped")
    assert answer["what"].endswith(": enough") and "--resume" in answer["do"]
    assert "stop" in tolaria("logs", run, "--kind", "act_applied")
    assert len(tolaria("top", run, "--once").splitlines()) == 24


def test_a_log_is_followed_while_it_is_written(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "events.jsonl").touch()
    command = [sys.executable, "-m", "tolaria.cli.app", "logs", str(folder / "run"), "--follow"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as reader:
        assert reader.stdout is not None
        for step in (7, 8):
            with (folder / "run" / "events.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "paused", "rank": 0, "step": step, "wall_ns": 0, "reason": "x"}) + "\n")
            ready, _, _ = select.select([reader.stdout], [], [], 20)
            assert ready and f"{step} r0" in os.read(reader.stdout.fileno(), 4096).decode()
        reader.send_signal(2)
        assert reader.wait(10) == 0
