"""Whole runs on a GPU: NCCL with one rank, resumed bit by bit, and traced."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torchrun import launch

FLAGS = ["--config", "launch/configs/digits.toml", "--log.progress", "plain", "--dist.device", "cuda"]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.timeout(400)
@pytest.mark.processes
def test_one_rank_over_nccl_is_stopped_and_goes_on_to_the_same_bits(folder: Path) -> None:
    flags = [*FLAGS, "--compile.enabled", "false", "--train.epochs", "30", "--log.interval_steps", "1"]
    (folder / "whole").mkdir()
    with launch(folder / "whole", flags, ranks=1) as job:
        whole = job.finish(300)
        assert (whole["outcome"], whole["device"]) == ("finished", "cuda:0")
        assert job.left_behind() == []
    with launch(folder, flags, ranks=1) as job:
        job.wait_until(lambda: job.last_step() > 30 or None, "step 31")
        job.rank(0).terminate()
        stopped = job.finish(300)
        assert stopped["outcome"] == "stopped" and stopped["steps"] < whole["steps"]
    with launch(folder, [*flags, "--run.resume", str(folder / "run")], ranks=1) as job:
        assert job.finish(300)["state_digest"] == whole["state_digest"]
        assert job.left_behind() == []


@pytest.mark.timeout(400)
@pytest.mark.processes
def test_a_trace_shows_the_device_and_every_allocation(folder: Path) -> None:
    flags = [*FLAGS, "--train.epochs", "2", "--compile.enabled", "false", "--profile", "--profile.steps", "5"]
    with launch(folder, flags, ranks=1) as job:
        job.finish(300)
        assert job.events("profile_failed") == []
    made = folder / "run" / "profile"
    kinds = {event.get("cat") for event in json.loads((made / "rank0.json").read_text())["traceEvents"]}
    assert {"kernel", "user_annotation", "cpu_op"} <= kinds
    assert (made / "rank0-memory.pickle").stat().st_size > 1000
    summary = (made / "summary.txt").read_text()
    assert "on the device" in summary and "idle" in summary
