"""`make demo`, as a person runs it: in a terminal of 80 columns, compiled, until the summary."""

import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import struct
import sys
import tempfile
import termios
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import ROOT, Job
from tolaria.telemetry.summary import RunSummary

COLUMNS = 80
DEADLINE_S = 300.0
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
MAY_BE_LONG = ("run", "checkpoint", "resume")  # paths and commands, which are there to be copied

pytestmark = [pytest.mark.processes, pytest.mark.timeout(DEADLINE_S + 60)]


class Terminal:
    """A terminal of 24 lines and `COLUMNS` columns that remembers everything written to it."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read, name="terminal")
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self._master, 65536)
            except OSError:  # how Linux tells that the last writer is gone
                return
            self._written += chunk

    def finish(self) -> str:
        """Everything that was written; call it once, when the writers have ended."""
        os.close(self.slave)
        self._reader.join()
        os.close(self._master)
        return self._written.decode()


@dataclass(frozen=True)
class Demo:
    """What is left of the demo when it has ended."""

    code: int
    written: str
    run_dir: Path
    left_behind: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return document

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]

    @property
    def lines(self) -> list[str]:
        """What stays on the screen: no colours, and no lines that were overwritten."""
        return [line.rpartition("\r")[2] for line in self.plain.split("\n")]

    @property
    def plain(self) -> str:
        """Everything that ever was on the screen, line ends as ``\n``, overwritten lines each behind a ``\r``."""
        return re.sub(r"\r+\n", "\n", CONTROL.sub("", self.written))


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    run_dir = folder / "run"
    # -o: .venv is as old as it is; the tests' own Python has everything.
    make = ["make", "-o", ".venv/installed", "demo", f"PY={sys.executable}", "RANKS=2", f"ARGS=--run.dir {run_dir}"]
    terminal = Terminal()
    try:
        user = {"TERM": "xterm-256color", "MAKEFLAGS": "", "MAKELEVEL": "", "COLUMNS": "", "NO_COLOR": ""}
        user |= {"CUDA_VISIBLE_DEVICES": ""}  # two ranks, also where there is one GPU
        with Job(folder, make, run_dir, environment=user, terminal=terminal.slave) as job:
            code = job.wait(DEADLINE_S)
            left_behind = job.left_behind()
    finally:
        written = terminal.finish()
        sys.stdout.write(written)  # for the report of a failure
    yield Demo(code, written, run_dir, left_behind)
    shutil.rmtree(folder)


def test_it_ends_well_and_leaves_nothing_behind(demo: Demo) -> None:
    assert demo.code == 0, demo.written
    assert demo.left_behind == []
    assert [event for event in demo.events if event["level"] != "info"] == []
    assert {event["kind"] for event in demo.events} >= {"run_started", "command_applied", "checkpoint_committed"}


def test_a_seed_became_part_of_the_model_and_lifted_it(demo: Demo) -> None:
    summary = demo.summary
    grown = [seed for seed in summary["seeds"] if seed["stage"] == "FOSSILIZED"]
    assert grown and all(seed["alpha"] == 1 and seed["contribution"] > 0 for seed in grown)
    assert summary["parameters_end"] == summary["parameters_start"] + sum(seed["parameters"] for seed in grown)
    assert summary["final"]["accuracy"] > summary["before_growth"]["accuracy"]
    fossilized = [event for event in demo.events if event["kind"] == "command_applied" and "fossilize" in event["what"]]
    assert len(fossilized) == len(grown)


def test_the_ranks_ended_with_one_state(demo: Demo) -> None:
    digests = demo.summary["state_digest"]
    assert sorted(digests) == ["0", "1"]
    assert digests["0"] == digests["1"]
    told = {event["rank"]: event["digest"] for event in demo.events if event["kind"] == "run_ended"}
    assert told == {0: digests["0"], 1: digests["1"]}


def test_the_last_checkpoint_is_committed_and_whole(demo: Demo) -> None:
    checkpoint = Path(demo.summary["checkpoint"])
    assert checkpoint.parent == demo.run_dir / "ckpt"
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    assert manifest["step"] == demo.summary["steps"]
    assert manifest["world_size"] == 2
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size"], entry["sha256"])
    assert {path.name for path in checkpoint.iterdir()} == {"MANIFEST.json", *manifest["files"]}


def test_the_summary_is_complete(demo: Demo) -> None:
    summary = demo.summary
    config = tomllib.loads((ROOT / "launch/configs/digits.toml").read_text())
    assert set(summary) == {"schema", *(field.name for field in fields(RunSummary))}
    assert (summary["outcome"], summary["name"], summary["world_size"]) == ("finished", "digits", 2)
    assert summary["epochs"] == summary["boundaries"] == config["train"]["epochs"]
    assert [name for name, value in summary.items() if value in ("", None, [], {})] == ["incidents", "profile"]
    for command in summary["commands"]:
        assert command["what"] and command["reason"], command
        assert command["outcome"] in {"applied", "success", "neutral", "regression"}, command
        assert command["effect"] or command["outcome"] == "applied", command
    for part in ("round_trip", "broadcast", "validation", "boundary"):
        assert 0 < summary["latency_ms"][part]["p50"] <= summary["latency_ms"][part]["max"]
    assert {"python", "torch", "tolaria"} <= set(summary["versions"])


def test_the_terminal_shows_the_run_and_nothing_else(demo: Demo) -> None:
    assert demo.lines[0] == "tolaria  digits"
    table = next(line for line in demo.lines if line.startswith("epoch"))
    assert table.split() == ["epoch", "step", "train", "val", "acc", "lr", "time", "ckpt", "seeds"]
    rows = [line for line in demo.lines if re.match(r" {0,4}\d+ +\d+ ", line)]
    assert [int(row.split()[0]) for row in rows] == list(range(1, demo.summary["epochs"] + 1))
    assert any(re.search(r"blending 0\.\d\d", row) for row in rows)
    assert any("fossilized" in row for row in rows)
    assert [title for title in ("Seeds", "Commands", "Files") if title not in demo.lines] == []
    assert demo.lines[-2].split()[0] == "resume"
    assert demo.lines[-1] == ""
    # Neither torchrun's banners nor warnings of libraries belong into what a person sees.
    noise = re.compile(r"warn|Traceback|^[WEI]\d{4} |\*{10}", re.IGNORECASE | re.MULTILINE)
    assert noise.findall(demo.plain) == []


def test_no_line_is_wider_than_the_terminal(demo: Demo) -> None:
    drawn = re.split(r"[\r\n]", demo.plain)
    assert any(re.search(r"epoch \d+/\d+  step", line) for line in drawn), "the overwritten line was there"
    too_long = [line for line in drawn if len(line) > COLUMNS and line.split()[0] not in MAY_BE_LONG]
    assert too_long == []


def test_what_it_says_about_going_on_works(demo: Demo) -> None:
    words = demo.summary["resume"].split()
    assert words[:4] == ["torchrun", "--nproc_per_node=2", "-m", "tolaria.launch"]
    assert words[4::2] == ["--config", "--resume"]
    assert tomllib.loads(Path(words[5]).read_text())["run"]["name"] == "digits"
    assert Path(words[7]) == demo.run_dir
