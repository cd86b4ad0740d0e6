"""docs/policy.md: its file is taken as it stands there, and each of its commands is run."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_readme_examples import environment
from tolaria.config_tamiyo import TamiyoConfig
from tolaria.tamiyo.sight import Sight, SlotSight

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
SHORT = ["--compile.enabled", "false", "--train.epochs", "5", "--dist.device", "cpu"]

pytestmark = [pytest.mark.processes, pytest.mark.timeout(90)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the page's reader is: with the file that they wrote, beside a checkout's launch/; its path is short."""
    with tempfile.TemporaryDirectory(prefix="policy-") as name:
        (code,) = re.findall(r"^```python\n# my_policy.py\n(.*?)^```", PAGE, re.M | re.S)
        Path(name, "my_policy.py").write_text(code)
        Path(name, "launch").symlink_to(ROOT / "launch")
        yield Path(name)


def command(begin: str) -> str:
    """The one command of the page that begins like this."""
    (found,) = [line for line in COMMANDS if line.startswith(begin)]
    return found


def words(line: str, folder: Path) -> list[str]:
    line = line.replace("/tmp/policy.sock", f"{folder}/p.sock")
    if line.startswith("tolaria "):
        return [sys.executable, "-m", "tolaria.cli.app", *line.split()[1:]]
    return [*([sys.executable] if line.startswith("python ") else ["node"]), *line.split()[1:]]


def run(line: str, folder: Path, *further: str, code: int = 0) -> str:
    # A console script does not see the folder that it is started in, other than `python -m`.
    safe = {"PYTHONSAFEPATH": "1"} if line.startswith("tolaria ") else {}
    done = subprocess.run(
        [*words(line, folder), *further], cwd=folder, capture_output=True, text=True, timeout=80, check=False,
        env={**environment(), "PYTHONPATH": str(ROOT), **safe},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The run directory of the page's run, under the name that the page gives it."""
    run(command("python -m tolaria.launch --tamiyo.policy"), folder, *SHORT,
        "--run.dir", "runs/mine")  # fmt: skip
    return folder / "runs/mine"


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return found


def test_the_policy_of_the_page_passes_its_test_and_the_page_shows_the_output(folder: Path) -> None:
    shown = run(command("tolaria policy test my_policy"), folder)
    assert shown.endswith("\n14 passed, 0 failed\n")
    for line in re.findall(r"^  pass     (?!loads|answers).*", PAGE, re.M):
        assert f"{line}\n" in shown
    assert "14 passed, 0 failed" in PAGE


def test_the_policy_of_the_page_steers_a_run(trained: Path) -> None:
    found = summary(trained)
    assert (found["outcome"], found["mode"]) == ("finished", "normal")
    assert all(command["outcome"] != "refused" for command in found["commands"])


def test_the_replay_of_the_page_compares(folder: Path, trained: Path) -> None:
    shown = run(command("tolaria policy replay"), folder)
    assert re.search(r"Agreed at \d+ of \d+ boundaries; the run's policy commanded at \d+, this one at \d+\.", shown)
    assert "was not verified" not in shown


def test_the_shadow_of_the_page_watches(folder: Path) -> None:
    run(command("python -m tolaria.launch --tamiyo.shadow"), folder, *SHORT,
        "--run.dir", "runs/shadowed")  # fmt: skip
    counters = summary(folder / "runs/shadowed")["counters"]
    assert counters["shadow_asked"] == 5
    assert counters["shadow_answered"] >= 4
    kinds = [json.loads(line)["kind"] for line in (folder / "runs/shadowed/events.jsonl").read_text().splitlines()]
    assert "shadow_answered" in kinds


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_service_of_the_page_is_tested_and_steers(folder: Path) -> None:
    run(command("python -m tolaria.tamiyo.keys keys"), folder)
    with subprocess.Popen(
        words(command("node launch/examples"), folder), cwd=folder, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            assert "answers at" in server.stdout.readline()
            assert "11 passed, 0 failed, 3 skipped" in run(command("tolaria policy test --endpoint"), folder)
            run(command("python -m tolaria.launch --tamiyo.endpoint"), folder, *SHORT, "--run.dir", "runs/js")
        finally:
            server.terminate()
    assert summary(folder / "runs/js")["commands"][0]["what"].startswith("germinate ")


def test_what_the_page_names_is_there() -> None:
    assert f"`tamiyo.deadline_ms` ({TamiyoConfig().deadline_ms / 1000:g} s)" in PAGE
    listed = PAGE.partition("`Sight` gives")[2].partition("can be seen")[0]
    names = set(re.findall(r"`(\w+)`", listed)) - {"Sight"}
    assert len(names) >= 10
    assert all(hasattr(Sight, name) or hasattr(SlotSight, name) for name in names), names
