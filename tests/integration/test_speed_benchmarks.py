"""The benchmarks of step, control lane and telemetry run, and what they write is whole. Their times judge nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def quick(name: str, out: Path, *flags: str) -> dict[str, Any]:
    """The JSON of a benchmark."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out), *flags]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 110
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    assert found["machine"]["torch"]
    return found


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_both_sides_of_a_step_take_as_many_blocks_and_tell_their_phases(tmp_path: Path) -> None:
    (cell,) = quick("step_latency", tmp_path, "--cells", "mlp, 1 rank*", "--rounds", "3")["cells"]
    assert cell["cell"]["workload"] == "mlp" and set(cell["sides"]) == {"hand-written", "tolaria"}
    assert cell["sides"]["hand-written"]["ratio"]["median"] == 1.0
    for name, side in cell["sides"].items():
        assert side["us"]["count"] == side["ratio"]["count"] == 3 and side["us"]["median"] > 0
        phases = cell["phases_us"][name]
        assert all(phases[phase] > 0 for phase in ("data", "forward", "backward", "optimizer"))
    assert cell["phases_us"]["tolaria"]["fence"] > 0


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_an_agreement_is_measured_at_every_distance_beside_the_step_and_in_its_way(tmp_path: Path) -> None:
    found = quick("control_lane", tmp_path)["mlp"]
    assert [(d["steps"], d["overlapped"]) for d in found["distances"]] == [
        (2**power, overlapped) for power in range(7) for overlapped in (True, False)
    ]
    assert found["step_us"] > 0 and found["agreement_us"] > 0 and 1 <= found["chosen"] <= 64


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_steps_are_measured_without_sinks_with_them_and_with_them_in_trouble(tmp_path: Path) -> None:
    found = quick("telemetry", tmp_path, "--rounds", "2")["mlp"]
    assert list(found["sides"]) == ["off", "on", "trouble"] and found["put_us"] > 0
    for side in found["sides"].values():
        assert side["us"]["count"] == side["ratio"]["count"] == 2 and side["us"]["median"] > 0
    assert found["sides"]["off"]["ratio"]["median"] == 1.0
    assert found["lost"]["trouble"]["tensorboard"] > 0, "the disk was not full"
    assert set(found["lost"]["on"].values()) == {0}
