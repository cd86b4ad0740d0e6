"""Benchmarks that no other test runs: they run, and print what they promise. Their times are nobody's verdict."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
def test_the_optimizer_benchmark_prints_budget_median_and_p99_of_every_side() -> None:
    command = [sys.executable, "benchmarks/optimizer.py", "--quick"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = dict(
        re.findall(r"^ *(\S.*?)  +(?:[\d+]+(?:, goal [\d.]+)?  +)?([\d.]+ +[\d.]+)$", done.stdout, re.MULTILINE)
    )
    sides = {"rates, 10 groups", "add", "remove", "rebuild", "copy", "grow", "to sgd", "to nadam"}
    assert rows.keys() == sides
    assert all(float(number) > 0 for pair in rows.values() for number in pair.split())
    assert re.search(r"^20\d\d-\d\d-\d\d, \S+, torch 2", done.stdout)
