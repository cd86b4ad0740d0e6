"""A run that grew, went back and was ordered about comes out the same when it is done again from its log."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import ROOT, Job, launch
from tolaria.leyline.codec import decode_command, decode_decision, encode_command, encode_decision
from tolaria.leyline.types import OptimizerCommand
from tolaria.orders.client import RunClient
from tolaria.orders.words import COMMAND, PAUSE, RESUME, TRY, Order, Outcome
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import Wal, WalKind, WalRecord, read_log
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

HELD_BATCH = 60  # counted as they are read, those of a return once more
STEPS = 68  # seven epochs of ten, two steps of which were left out
SCRIPT = """
command = [
    { boundary = 1, op = "germinate", slot = "mid", blueprint = "residual_mlp" },
    { boundary = 2, op = "start_training", slot = "mid" },
    { boundary = 2, op = "scale_lr", group = "host", factor = 0.5 },
    { boundary = 3, op = "start_grafting", slot = "mid" },
]
"""


def flags(folder: Path) -> list[str]:
    """Two ranks, a seed that is blended in, and two steps in a row without a finite gradient."""
    (folder / "script.toml").write_text(SCRIPT)
    options = {
        "task": "tests.integration.replayed_task:make_task", "task.args.hold_dir": folder,
        "task.args.hold_at": HELD_BATCH, "train.epochs": 7, "train.batch_size": 4, "compile.enabled": "false",
        "dist.device": "cpu", "tamiyo.policy": f"script:{folder / 'script.toml'}",
        "kasmina.blend_steps": 15, "kasmina.gradient_window": 2,
        "kasmina.measure_signal": "false", "log.interval_steps": 1, "recovery.snapshot_steps": 5,
        "recovery.non_finite_steps": 2, "recovery.rewarm_steps": 4, "optim.lr": 0.01,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


def replayed(run: Path, *more: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tolaria.cli.app", "replay", str(run), *more]
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def document_of(run: Path, *more: str, code: int = 0) -> dict[str, Any]:
    done = replayed(run, "--json", *more)
    assert done.returncode == code, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def order_of(run: Path, found: list[Outcome]) -> None:
    """A person halves the rates, has the run stand still, tries something, and lets it go on."""
    client = RunClient.of(run)
    order = Order(action=COMMAND, operator="test", reason="too fast", command=b"-")
    command = with_identity(do.scale_lr("*", 0.5), "op-1", issued_by="test", issued_at_ns=1)
    found.append(client.send(Order(**{**vars(order), "command": encode_command(command)})))
    found += [client.send(Order(action=PAUSE, operator="test"))]
    found += [client.send(Order(action=TRY, arguments={"change": "lr*=0.8", "steps": 3}, operator="test"))]
    found += [client.send(Order(action=RESUME, operator="test"))]


def emergency(run: Path) -> None:
    command = [sys.executable, "-m", "tolaria.emergency", str(run), "conservative", "--reason", "smoke"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def steer(job: Job, folder: Path) -> list[Outcome]:
    """While both ranks read one batch: an emergency and an order; then they may go on."""
    for rank in (0, 1):
        job.wait_file(folder / f"reached-{rank}")
    outcomes: list[Outcome] = []
    orders = threading.Thread(target=order_of, args=(job.run_dir, outcomes))
    orders.start()
    emergency(job.run_dir)
    (folder / "go").touch()
    orders.join()
    return outcomes


@pytest.fixture(scope="module")
def recorded() -> Iterator[Path]:
    """A finished run of two ranks in a folder with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    with launch(folder, flags(folder)) as job:
        outcomes = steer(job, folder)
        summary = job.finish()
    assert [o.state for o in outcomes] == ["applied"] * 4, outcomes
    causes = [incident["cause"] for incident in summary["incidents"]]
    assert causes == ["non_finite", "emergency"], causes
    assert (summary["seeds"][0]["stage"], summary["outcome"], summary["steps"]) == ("BLENDING", "finished", STEPS)
    assert [c["what"] for c in summary["commands"] if c["by"]][:1] == ["*: lr x0.5"]
    yield folder / "run"
    shutil.rmtree(folder)


def test_it_ends_with_the_same_state_on_every_rank(recorded: Path) -> None:
    before = {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()}
    found = document_of(recorded)
    assert found["equal"] and found["differences"] == [] and found["failure"] == ""
    assert found["replayed"] == found["recorded"] and sorted(found["recorded"]) == ["0", "1"]
    compared = found["compared"]
    assert (compared["boundary"], compared["command"], compared["act"], compared["loss"]) == (7, 3, 4, STEPS), compared
    assert {back["cause"] for back in found["returns"]} == {"emergency", "non_finite"}
    assert found["kept"] is None and [path.name for path in recorded.parent.iterdir() if "replay" in path.name] == []
    assert {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()} == before


def tampered(run: Path, copy: Path) -> Path:
    """The same run, but its log, sound in every link, has another factor of the rate at the second boundary."""
    shutil.copytree(run, copy)
    records = read_log(run / "wal", FileOps()).records
    shutil.rmtree(copy / "wal")
    opened = records[0].document
    wal, _ = Wal.open(
        copy / "wal", run_id=opened["run_id"], generation="g", facts=opened["facts"], fs=FileOps(),
        check_owner=lambda: None,
    )  # fmt: skip
    for record in records:
        if record.kind != WalKind.OPEN:
            wal.append(record.kind, another_rate(record))
    wal.close()
    return copy


def another_rate(record: WalRecord) -> bytes:
    if record.kind != WalKind.DECISION or (decision := decode_decision(record.body)).boundary != 2:
        return record.body
    commands = [decode_command(raw) for raw in decision.commands]
    assert any(isinstance(c.payload, OptimizerCommand) for c in commands)
    changed = [
        replace(c, payload=replace(c.payload, hyperparameters={"lr_scale": 0.6}))
        if isinstance(c.payload, OptimizerCommand) else c for c in commands
    ]  # fmt: skip
    return encode_decision(replace(decision, commands=tuple(map(encode_command, changed))))


def test_a_decision_that_was_changed_afterwards_is_named(recorded: Path) -> None:
    run = tampered(recorded, recorded.parent / "tampered")
    done = replayed(run, "--to", str(recorded.parent / "kept"))
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert "different, first at boundary 2 (step 20): structure after its commands" in lines
    assert "  the log   host: lr x0.6" in lines and "host: lr x0.5" not in done.stdout
    assert "further places, such as" in done.stdout and "rank 1    recorded" in done.stdout
    assert max(map(len, lines)) <= 80
    assert json.loads((recorded.parent / "kept" / "summary.json").read_text())["outcome"] == "finished"


def test_a_run_that_cannot_be_replayed_is_refused_with_the_reason(recorded: Path) -> None:
    other_ranks = replayed(recorded, "--ranks", "3")
    assert other_ranks.returncode == 2 and "recorded with 2 ranks" in other_ranks.stderr
    damaged = recorded.parent / "damaged"
    shutil.copytree(recorded, damaged)
    segment = sorted((damaged / "wal").glob("*.log"))[0]
    raw = bytearray(segment.read_bytes())
    raw[400] ^= 1
    segment.write_bytes(raw)
    refused = replayed(damaged)
    assert refused.returncode == 74 and "damaged" in refused.stderr and "Traceback" not in refused.stderr
    there = replayed(recorded, "--to", str(damaged))
    assert there.returncode == 73 and "is there already" in there.stderr
    alone = recorded.parent / "alone"
    alone.mkdir()
    (alone / "tolaria").symlink_to(ROOT / "tolaria")
    without_task = replayed(recorded, "--json", cwd=alone)
    assert without_task.returncode == 2 and "No module named 'tests'" in without_task.stderr, without_task.stderr


def test_a_run_in_one_process_is_replayed_as_far_as_it_is_over() -> None:
    """While it trains not at all, cut off up to its newest checkpoint, and whole when it has been finished."""
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    options = [flag for flag in flags(folder) if not flag.startswith("--train.batch_size")]
    with launch(folder, [*options, "--train.batch_size=8"], ranks=0) as job:
        job.wait_file(folder / "reached-0")
        early = replayed(job.run_dir)
        assert early.returncode == 75 and "still training" in early.stderr
        job.process.kill()
        job.wait()
    found = document_of(job.run_dir)
    assert (found["equal"], found["outcome"], found["ranks"]) == (True, "cut off", 1)
    assert found["state_from"].startswith("checkpoint c") and found["steps"] % 10 in (0, 8)
    assert [back["cause"] for back in found["returns"]] == ["non_finite"]
    (folder / "go").touch()
    with launch(folder, [*options, "--train.batch_size=8", "--resume", str(job.run_dir)], ranks=0) as job:
        assert job.finish()["steps"] == STEPS
    found = document_of(job.run_dir)
    assert (found["equal"], found["outcome"], found["state_from"]) == (True, "finished", "summary.json")
    shutil.rmtree(folder)


def test_a_replay_that_is_ended_takes_its_ranks_and_its_directory_along(recorded: Path) -> None:
    folder = recorded.parent / "ended"
    folder.mkdir()
    shutil.copytree(recorded, folder / "run")
    command = [sys.executable, "-m", "tolaria.cli.app", "replay", str(folder / "run")]
    with Job(recorded.parent, command, folder / "run") as job:
        job.wait_until(lambda: job.find_rank(1, "tolaria.cli.replay_rank"), "rank 1 of the replay")
        job.process.terminate()
        assert job.wait() == 130
        assert job.left_behind() == []
    assert [path.name for path in folder.iterdir()] == ["run"]
