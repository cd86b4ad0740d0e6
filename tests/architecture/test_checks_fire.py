"""The linters are not only configured but on: each rule that the project relies on reports a planted violation."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source import ROOT

PLANTED = '''
import pickle
import subprocess


def undocumented(data):
    try:
        return pickle.loads(data)
    except Exception:
        print("lost")
    assert data
    subprocess.run("ls", shell=True)


def tangled(a, b, c, d, e, f, g, h, i, j, k, m, n):
    """Branches."""
    for x in (a, b):
        if x and a or b:
            return 1
        elif x and c:
            return 2
        elif d or e:
            return 3
        elif f and g:
            return 4
        elif h or i:
            return 5
        while x:
            if a:
                return 6
            for y in (h, i):
                if y:
                    return y
                if x or y or a:
                    continue
    return 7
'''
EXPECTED = {"D100", "D103", "S301", "BLE001", "T201", "S101", "S602", "C901", "PLR0913", "PLR0917", "PLR0911", "RET505"}


def test_ruff_reports_each_planted_violation() -> None:
    arguments = ["-m", "ruff", "check", "--output-format=concise", "--stdin-filename=tolaria/planted.py", "-"]
    done = subprocess.run(
        [sys.executable, *arguments], input=PLANTED, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    reported = {line.split(": ", 1)[1].split()[0].rstrip(":") for line in done.stdout.splitlines() if ": " in line}
    assert reported >= EXPECTED


IMPORTS = [
    ("telemetry/events.py", "import tolaria.kasmina", "Layers: nothing imports upward"),
    ("kasmina/slot.py", "import google.protobuf", "Only tolaria.leyline touches protobuf"),
    ("tamiyo/policy.py", "import zmq", "Only transports touch ZeroMQ"),
    ("dist.py", "import pickle", "Nothing is unpickled"),
    ("config.py", "import torch", "Flags are answered, and the policy server runs, without torch"),
]


@pytest.fixture(scope="module")
def contracts_broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy of the package with one wrong import for each contract."""
    copy = tmp_path_factory.mktemp("planted")
    shutil.copytree(ROOT / "tolaria", copy / "tolaria", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, line, _ in IMPORTS:
        file = Path(copy, "tolaria", name)
        file.write_text(f"{file.read_text()}\n{line}\n")
    program = "from importlinter.cli import lint_imports_command as main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-logo", "--no-cache"],
        cwd=copy, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("contract", [contract for _, _, contract in IMPORTS])
def test_import_linter_reports_each_planted_import(contracts_broken: str, contract: str) -> None:
    assert f"{contract} BROKEN" in " ".join(contracts_broken.split())
