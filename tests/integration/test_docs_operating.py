"""docs/operating.md: its commands, as they stand there and in their order, on a run of two ranks."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.test_processes import digest_of, start
from tests.torchrun import ROOT, Job

PAGE = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
LOOK, ACT, AFTERWARDS = (
    block.strip().splitlines() for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


def typed(folder: Path, command: str, *more: str) -> str:
    """What a command of the page prints, typed in the folder above the run; it must end with exit code 0."""
    program, *words = shlex.split(command.replace("RUN", "run"))
    assert program == "tolaria"
    done = subprocess.run(
        [sys.executable, "-m", "tolaria.cli.app", *words, *more], cwd=folder, capture_output=True, text=True,
        timeout=150, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def look(folder: Path) -> None:
    """The first block, while the run trains."""
    for command in LOOK:
        if command == "tolaria runs":
            assert "running" in typed(folder, command, ".")
        else:
            shown = typed(folder, command, *(("--once",) if " top " in command else ()))
            assert all(len(line) <= 80 for line in shown.splitlines()), shown


def act(folder: Path, job: Job) -> None:
    """The second block, in its order."""
    for command in ACT:
        if "seed germinate" in command:
            job.wait_until(lambda: stage_of(job) == "DORMANT" or None, "a free slot")
        said = typed(folder, command)
        assert ("would be applied" in said) == ("--dry-run" in command), said
        assert "on 2 ranks" in said or " try " in command, said


def stage_of(job: Job) -> str:
    """Of the only slot, at the newest boundary."""
    return str(job.events("boundary", rank=0)[-1]["seeds"]["mid"])


def test_every_command_of_the_page_does_what_it_says(folder: Path) -> None:
    endless = ("--train.epochs", "100000", "--tamiyo.policy", "none")
    with start(folder, hold=False, more=endless) as job:
        job.wait_until(lambda: (job.last_step() > 40) or None, "a run on its way")
        look(folder)
        act(folder, job)
        summary = job.finish()
        assert summary["outcome"] == "stopped"
        digest = digest_of(summary)
        assert job.left_behind() == []
    found = {command.split()[1]: typed(folder, command) for command in AFTERWARDS}
    assert (folder / "run" / "report.html").stat().st_size > 10_000
    assert "verified" in found["audit"] and "all sound" in found["verify"]
    assert digest[:12] in found["replay"] or "equal" in found["replay"]
