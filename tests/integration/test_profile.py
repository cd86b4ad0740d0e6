"""A whole run of two ranks with --profile: traces of the chosen steps, a page for people, and the same result."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import launch

FLAGS = [
    "--config", "launch/configs/digits.toml", "--train.epochs", "1", "--log.progress", "plain", "--compile.enabled",
    "false",
]  # fmt: skip
STEP = {"forward", "backward", "clip", "optimizer"}


def run(*more: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Summary, output, and the files of the folder of traces by name."""
    with tempfile.TemporaryDirectory(prefix="tl-") as path, launch(Path(path), [*FLAGS, *more]) as job:
        summary = job.finish()
        assert job.left_behind() == []
        files = {file.name: file.read_text() for file in (Path(path) / "run" / "profile").glob("*")}
        return summary, job.output, files


def phases_of(trace: str) -> dict[str, set[str]]:
    """The phases in each step of a trace."""
    found: dict[str, set[str]] = {}
    ranges = [e for e in json.loads(trace)["traceEvents"] if str(e.get("name")).startswith("tolaria/")]
    steps = [e for e in ranges if e["name"].startswith("tolaria/step ")]
    for step in steps:
        inside = [e for e in ranges if step["ts"] <= e["ts"] < step["ts"] + step["dur"] and e is not step]
        found[step["name"].removeprefix("tolaria/")] = {e["name"].removeprefix("tolaria/") for e in inside}
    return found


@pytest.mark.processes
def test_two_ranks_trace_the_chosen_steps_and_end_with_the_same_bits_as_without() -> None:
    plain, output, files = run()
    assert (files, plain["profile"], "summary.txt" in output) == ({}, "", False)

    traced, output, files = run("--profile", "--profile.ranks", "all", "--profile.after_steps=4", "--profile.steps=3")
    assert traced["state_digest"] == plain["state_digest"]
    assert traced["final"] == plain["final"]
    assert set(files) == {f"rank{r}{end}" for r in (0, 1) for end in (".json", "-boundary.json", ".txt")} | {
        "summary.txt"
    }
    for rank in (0, 1):
        phases = phases_of(files[f"rank{rank}.json"])
        assert list(phases) == ["step 4", "step 5", "step 6"]
        assert all(phases[step] >= STEP for step in phases), phases
        assert '"tolaria/boundary"' in files[f"rank{rank}-boundary.json"]
    assert max(map(len, files["summary.txt"].splitlines())) <= 80
    assert [line for line in files["summary.txt"].splitlines() if line.startswith("rank ")] == [
        f"rank {rank}, {what}" for rank in (0, 1) for what in ("step 4 to 6", "one boundary")
    ]
    assert "profile/summary.txt" in output
    assert traced["profile"].endswith("profile/summary.txt")
