"""docs/task.md: its file is taken from the page as it stands and run by the commands that stand there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "task.md").read_text(encoding="utf-8")
PYTHON_BLOCK = re.compile(r"^```python\n# (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(90)]


def run(folder: Path, command: str, *further: str) -> dict[str, Any]:
    """The summary of the run that a command of the page makes."""
    assert f"{command}\n" in PAGE
    [(name, text)] = PYTHON_BLOCK.findall(PAGE)
    (folder / name).write_text(text)
    program, *words = command.split()
    words = [str(Path(sys.executable).with_name(program)), *words, *further]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PET_STANDALONE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("runs/*/summary.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_in_debug_mode(tmp_path: Path) -> None:
    found = run(
        tmp_path, "python -m tolaria.launch --task tumours:make_task --task.args.width 8 --train.epochs 20 --debug"
    )
    assert found["outcome"] == "finished"
    assert found["final"]["accuracy"] > 0.9
    assert found["final"]["metrics"]["recall"] > 0.9
    assert {seed["slot"] for seed in found["seeds"]} == {"middle", "late"}


def test_on_two_ranks(tmp_path: Path) -> None:
    # Compiling is not the subject here.
    command = "torchrun --nproc_per_node=2 -m tolaria.launch --task tumours:make_task --train.epochs 20"
    found = run(tmp_path, command, "--compile.enabled", "false")
    assert (found["outcome"], found["world_size"]) == ("finished", 2)
    assert len(set(found["state_digest"].values())) == 1
