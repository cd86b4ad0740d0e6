"""The benchmark of one GPU, whose code runs small on the CPU: it runs, and what it writes is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*flags: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "benchmarks.gpu", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.processes
def test_its_small_form_measures_both_sides_the_snapshot_and_growth(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--tiny", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    for side in ("hand-written", "tolaria"):
        measured = found["steps"][side]
        assert measured["seconds"]["count"] >= 2
        assert measured["tokens_per_s"] > 0 and measured["ratio"]["median"] > 0
    parts = {"copy, side stream", "ring, copy and hash", "hash on the device", "step", "step beside it"}
    assert parts <= found["snapshot"].keys()
    assert found["snapshot"]["bytes"] > found["steps"]["parameters"] * 12
    assert list(found["growth"]) == ["germinate", "start training", "start grafting"]


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the whole benchmark takes minutes")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
    assert run("--device", "cpu").returncode == 2
