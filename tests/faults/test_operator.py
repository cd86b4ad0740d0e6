"""A person with a hand on a running job: looks, halts it, lets it go on, and the run ends as if nothing had been."""

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.test_processes import HELD_STEPS, digest_of, let_go, start, wait_until_held
from tests.torchrun import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

COMMANDS = {
    "halt": 'python -m tolaria.emergency RUN halt --reason "disk is being replaced"',
    "status": "python -m tolaria.emergency RUN status",
    "clear": "python -m tolaria.emergency RUN clear",
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


def typed(command: str, run: Path) -> subprocess.CompletedProcess[str]:
    """What one of the README's commands says of this run."""
    _, *words = shlex.split(command.replace("RUN", str(run)))
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_operator_halts_a_job_and_lets_it_go_on(folder: Path) -> None:
    with start(folder, hold=False) as unharmed:
        digest = digest_of(unharmed.finish())
    shutil.rmtree(folder / "run")
    with start(folder) as job:
        wait_until_held(job, folder)
        halted = typed(COMMANDS["halt"], folder / "run")
        assert halted.returncode == 0, halted.stderr
        first, second = halted.stdout.splitlines()
        assert first.startswith("rank 0 of this machine: seen after") and second.startswith("rank 1 of this machine")
        let_go(folder)
        job.wait_until(lambda: len(job.events("halted")) == 2 or None, "both ranks halted")
        assert {event["step"] for event in job.events("halted")} == {HELD_STEPS}
        assert typed(COMMANDS["status"], folder / "run").stdout == "level 4: operator: disk is being replaced\n"
        time.sleep(0.5)
        assert job.last_step() == HELD_STEPS  # it stands still
        assert typed(COMMANDS["clear"], folder / "run").returncode == 0
        summary = job.finish()
        assert (digest_of(summary), summary["incidents"]) == (digest, [])
        assert job.left_behind() == []
    ended = typed(COMMANDS["status"], folder / "run")
    assert ended.returncode == 73
    assert "no run is running here on this machine" in ended.stderr and "Traceback" not in ended.stderr
