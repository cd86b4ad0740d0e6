"""Benchmarks as tests run them: small, in a process of their own. Their times are nobody's verdict."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WIDEST = 110


def run(module: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    """``python -m MODULE FLAGS`` to its end."""
    command = [sys.executable, "-m", module, *flags]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)


def quick(name: str, out: Path, *flags: str) -> tuple[str, dict[str, Any]]:
    """What ``python -m benchmarks.NAME --quick`` prints, and its JSON in ``out``."""
    done = run(f"benchmarks.{name}", "--quick", "--out", str(out), *flags)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= WIDEST
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    assert found["machine"]["torch"]
    return done.stdout, found
