"""The spike demo: poisoned batches of one rank; the run recovers and ends within noise of the clean one."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torchrun import launch

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

CONFIG = ("--config", "launch/configs/spike.toml", "--dist.device", "cpu")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


def test_it_recovers_by_itself_and_says_so(folder: Path) -> None:
    with launch(folder, CONFIG) as job:
        poisoned, output = job.finish(), job.output
        assert job.left_behind() == []
    shutil.rmtree(folder / "run")
    with launch(folder, (*CONFIG, "--task.args.huge", "", "--task.args.nan", "")) as job:
        clean = job.finish()
    assert clean["incidents"] == []
    spike, nan = poisoned["incidents"]
    assert (spike["cause"], spike["step"], spike["to_step"], spike["samples_left_out"]) == ("loss_spike", 149, 140, 64)
    assert (nan["cause"], nan["samples_left_out"]) == ("non_finite", 192)
    assert poisoned["outcome"] == "finished" and poisoned["mode"] == "normal"
    assert abs(poisoned["final"]["accuracy"] - clean["final"]["accuracy"]) < 0.03
    words = " ".join(output.split())
    assert "times the running median" in words
    assert "went back to snapshot of step 140" in words and "left 64 samples out" in words
    assert max(map(len, output.partition("Files")[0].splitlines())) <= 80
