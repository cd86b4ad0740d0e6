"""The benchmarks of step, control lane and boundary run, and what they write is whole. Their times judge nothing."""

from pathlib import Path

import pytest

from tests.benchmark import quick
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


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_an_agreement_is_measured_at_every_distance_beside_the_step_and_in_its_way(tmp_path: Path) -> None:
    _, results = quick("control_lane", tmp_path)
    found = results["mlp"]
    assert [(d["steps"], d["overlapped"]) for d in found["distances"]] == [
        (2**power, overlapped) for power in range(7) for overlapped in (True, False)
    ]
    assert found["step_us"] > 0 and found["agreement_us"] > 0 and 1 <= found["chosen"] <= 64


@pytest.mark.processes
@pytest.mark.timeout(200)
def test_every_part_of_a_boundary_is_measured_with_a_command_and_without(tmp_path: Path) -> None:
    printed, found = quick("boundary", tmp_path, "--boundaries", "20")
    noop, changing = found["two_ranks_ms"]["noop"], found["two_ranks_ms"]["one rate"]
    everywhere = {"guard", "report", "packet", "encode", "round_trip", "decision", "broadcast", "check", "telemetry"}
    for side in (noop, changing):
        assert side.keys() >= everywhere | {"validation", "signal", "REPORT", "POLICY", "COMMANDS", "GUARD", "BOUNDARY"}
        assert all(part["count"] == 20 for part in side.values())
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
    assert "round_trip" in printed and "simulated" in printed
