"""The benchmarks of step, lane, boundary and telemetry run, and what they write is whole. Times judge nothing."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.headlines import headlines
from tests.benchmark import WIDEST, quick, run
from tolaria.telemetry.split import OUTSIDE


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_both_sides_of_a_step_take_as_many_blocks_and_tell_their_phases(tmp_path: Path) -> None:
    _, found = quick("step_latency", tmp_path, "--cells", "mlp, 1 rank*", "--rounds", "3")
    (cell,) = found["cells"]
    assert cell["cell"]["workload"] == "mlp" and set(cell["sides"]) == {"hand-written", "tolaria"}
    assert cell["sides"]["hand-written"]["ratio"]["median"] == 1.0
    for name, side in cell["sides"].items():
        assert side["us"]["count"] == side["ratio"]["count"] == 3 and side["us"]["median"] > 0
        phases = cell["phases_us"][name]
        assert all(phases[phase] > 0 for phase in ("data", "forward", "backward", "optimizer"))
    assert cell["phases_us"]["tolaria"]["fence"] > 0
    (headline,) = headlines("step_latency", found)
    assert (headline.value, headline.budget) == (cell["sides"]["tolaria"]["ratio"]["median"], 1.05)


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_an_agreement_is_measured_at_every_distance_beside_the_step_and_in_its_way(tmp_path: Path) -> None:
    _, results = quick("control_lane", tmp_path)
    found = results["mlp"]
    assert [(d["steps"], d["overlapped"]) for d in found["distances"]] == [
        (2**power, overlapped) for power in range(7) for overlapped in (True, False)
    ]
    (headline,) = headlines("control_lane", results)
    assert headline.budget == 0.5 and headline.value > 0
    assert found["step_us"] > 0 and found["agreement_us"] > 0 and 1 <= found["chosen"] <= 64


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_every_part_of_a_boundary_is_measured_with_a_command_and_without(tmp_path: Path) -> None:
    done = run("benchmarks", "--quick", "--only", "boundary", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= WIDEST
    found = json.loads((tmp_path / "boundary.json").read_text())
    noop, changing = found["two_ranks_ms"]["noop"], found["two_ranks_ms"]["one rate"]
    everywhere = {"guard", "report", "packet", "encode", "round_trip", "decision", "broadcast", "check", "telemetry"}
    for side in (noop, changing):
        assert side.keys() >= everywhere | {"validation", "signal", "REPORT", "POLICY", "COMMANDS", "GUARD", "BOUNDARY"}
        assert all(part["count"] == 40 for part in side.values())
        assert all(side[part]["median"] > 0 for part in everywhere)
        inside = [part["low"] for name, part in side.items() if name.islower() and name not in OUTSIDE]
        assert side["BOUNDARY"]["high"] >= max(inside)
        assert side["BOUNDARY"]["p99"] >= side["COMMANDS"]["p99"] > side["decision"]["low"]
    # Only a command is applied, and compared over the ranks afterwards.
    assert noop["apply"]["p99"] == noop["digest"]["p99"] == 0.0
    assert changing["apply"]["low"] > 0 and changing["digest"]["low"] > 0
    small, sent = found["packet"]["2 seeds, no metrics"], found["packet"]["as sent"]
    assert 0 < small["bytes"] <= 280 < sent["bytes"] and small["us"] > 0
    assert list(found["simulated"]["ms"]) == ["2", "8", "32", "64"]
    assert all(ms > 0 for ms in found["simulated"]["ms"].values())
    assert "[1/1] boundary: about 0.5 min" in done.stdout and "simulated" in done.stdout
    table = (tmp_path / "README.md").read_text()
    row = rf"a boundary, 99th percentile: noop \| {noop['BOUNDARY']['p99']:,.1f} ms \| 18.0 ms \| (kept|\*\*missed\*\*)"
    assert re.search(rf"^\| {row} \|$", table, re.M)


def test_all_benchmarks_of_speed_are_listed_with_the_time_they_take() -> None:
    done = run("benchmarks", "--list")
    assert done.returncode == 0, done.stderr
    minutes = dict(re.findall(r"^(\w+) +([\d.]+)$", done.stdout, re.M))
    assert minutes.keys() - {"gpu"} == {"boundary", "control_lane", "startup", "growth_pause", "step_latency"}
    assert all(float(spent) > 0 for spent in minutes.values())


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and then it does not fail")
def test_a_benchmark_that_fails_is_named_and_leaves_the_table_of_what_there_is(tmp_path: Path) -> None:
    done = run("benchmarks", "--quick", "--only", "gpu", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.endswith("failed: gpu; what they printed says why\n") and "no CUDA device" in done.stdout
    assert "# Results" in (tmp_path / "README.md").read_text()


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_steps_are_measured_without_sinks_with_them_and_with_them_in_trouble(tmp_path: Path) -> None:
    _, whole = quick("telemetry", tmp_path, "--rounds", "2")
    found = whole["mlp"]
    assert list(found["sides"]) == ["off", "on", "trouble"] and found["put_us"] > 0
    for side in found["sides"].values():
        assert side["us"]["count"] == side["ratio"]["count"] == 2 and side["us"]["median"] > 0
    assert found["sides"]["off"]["ratio"]["median"] == 1.0
    assert found["lost"]["trouble"]["tensorboard"] > 0, "the disk was not full"
    assert set(found["lost"]["on"].values()) == {0}
