"""Growth under DDP: every rank the same, the host undisturbed, every gradient reduced once, a failure taken back."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool

JOBS = "tests.dist.jobs_growth"
SIGNALS = ("shadow", "straight_through")
STEPS = 200

# boundary, operation, slot: one seed to the end, a second one culled, a third one cancelled, a fourth one in training
SCRIPT = [
    (1, "germinate", "early"),
    (2, "start_training", "early"),
    (2, "germinate", "late"),
    (3, "start_training", "late"),
    (4, "start_grafting", "early"),
    (5, "start_grafting", "late"),
    (6, "stabilize", "early"),
    (7, "evaluate", "early"),
    (7, "cull", "late"),
    (8, "fine_tune", "early"),
    (9, "fossilize", "early"),
    (12, "germinate", "late"),
    (13, "start_training", "late"),
    (15, "cancel", "late"),
    (17, "germinate", "late"),
    (18, "start_training", "late"),
]


def test_two_ranks_train_as_one_process_does_on_their_batches_together(two_ranks: RankPool) -> None:
    for told in two_ranks.run(f"{JOBS}:against_one_process"):
        at_the_start, trained, grown = told["distances"]
        assert at_the_start == 0.0
        assert 0.0 < trained < 1e-5
        assert 0.0 < grown < 1e-4
        assert told["filled"] > 0 and told["epochs"] > 2  # the last group of an epoch was only partly filled
        assert len(set(told["digests"])) == 1


def test_ranks_are_bit_equal_after_a_run_that_grew_and_culled(two_ranks: RankPool, tmp_path: Path) -> None:
    script = tmp_path / "script.toml"
    entry = '[[command]]\nboundary = {}\nop = "{}"\nslot = "{}"\n'
    blueprint = 'blueprint = "residual_mlp"\n'
    script.write_text(
        "".join(entry.format(*row) + (blueprint if row[1] == "germinate" else "") for row in SCRIPT), encoding="utf-8"
    )
    first, second = two_ranks.run(f"{JOBS}:whole_run", folder=str(tmp_path), script=str(script), steps=STEPS)
    assert first["refused"] == []
    assert len(first["commands"]) == len(SCRIPT)
    for told in (first, second):
        assert told["steps"] == STEPS
        assert told["stages"] == {"early": "FOSSILIZED", "late": "TRAINING"}
        assert told["parameters"][1] > told["parameters"][0]
        assert set(told["digests"]) == {"0", "1"}
        assert len(set(told["digests"].values())) == 1
    assert first["digests"] == second["digests"]


@pytest.fixture(scope="module", params=SIGNALS)
def walk(request: pytest.FixtureRequest, two_ranks: RankPool) -> list[dict[str, Any]]:
    """What every rank told of every command of a walk through all stages."""
    ranks = two_ranks.run(f"{JOBS}:walk", signal=request.param)
    for rank in ranks:
        assert rank["stages"] == ["FOSSILIZED", "DORMANT"]
        assert {command["command"] for command in rank["told"]} == {"applied"}
    return [command for rank in ranks for command in rank["told"]]


def test_no_command_touches_the_hosts_momentum(walk: list[dict[str, Any]]) -> None:
    for told in walk:
        assert told["moments"] == 6 * 3  # step and two moments of six parameters
        assert told["unequal"] == []


def test_every_gradient_is_reduced_once_after_every_command(walk: list[dict[str, Any]]) -> None:
    for told in walk:
        assert told["first"] == told["settled"] == told["expected"]


def test_ranks_are_bit_equal_after_every_command(walk: list[dict[str, Any]]) -> None:
    assert all(told["equal_ranks"] for told in walk)


@pytest.mark.parametrize(
    ("fault", "at", "signal", "codes"),
    [
        ("build", "GERMINATED", "shadow", ("vote", "blueprint_failed")),
        ("device", "GERMINATED", "shadow", ("vote", "blueprint_failed")),
        ("regroup", "GERMINATED", "shadow", ("apply_failed", "apply_failed")),
        ("settle", "GERMINATED", "shadow", ("apply_failed", "apply_failed")),
        ("settle", "TRAINING", "straight_through", ("apply_failed", "apply_failed")),
        ("settle", "BLENDING", "shadow", ("apply_failed", "apply_failed")),
        ("weights", "GERMINATED", "shadow", ("digest_mismatch", "digest_mismatch")),
        ("forward", "TRAINING", "shadow", ("warm_up", "warm_up")),
        ("forward", "TRAINING", "straight_through", ("warm_up", "warm_up")),
        ("forward", "BLENDING", "shadow", ("warm_up", "warm_up")),
    ],
)
def test_when_one_rank_fails_all_are_as_before(
    two_ranks: RankPool, fault: str, at: str, signal: str, codes: tuple[str, str]
) -> None:
    ranks = two_ranks.run(f"{JOBS}:fault_on_one_rank", fault=fault, at=at, signal=signal)
    assert tuple(rank["outcome"][0] for rank in ranks) == codes
    if fault != "weights":
        assert "injected" in ranks[1]["outcome"][1] or "torch.int64" in ranks[1]["outcome"][1]
    for rank in ranks:
        assert rank["refused"]
        assert len(set(rank["before"])) == 1
        assert rank["after"] == rank["before"]
        # Training goes on, as if nothing had been commanded, each gradient reduced once.
        assert len(set(rank["with"])) == 1
        assert rank["with"] == rank["without"] != rank["after"]
        assert rank["collectives"] == {"gloo:all_reduce": 1 + (at == "BLENDING")}
        assert rank["again"]
        assert len(set(rank["end"])) == 1


@pytest.mark.parametrize("signal", SIGNALS)
def test_over_ranks_too_a_training_seed_is_not_felt_by_the_host(two_ranks: RankPool, signal: str) -> None:
    assert two_ranks.run("tests.dist.jobs_isolation:isolation", signal=signal) == [[], []]


def test_compiled_too_the_host_is_bit_for_bit_that_of_a_run_without_the_seed(two_ranks: RankPool) -> None:
    assert two_ranks.run("tests.dist.jobs_isolation:isolation", signal="shadow", compiled=True) == [[], []]


def test_a_new_wrapper_sends_no_weights_around(two_ranks: RankPool) -> None:
    for told in two_ranks.run("tests.dist.jobs_growth:wrapping"):
        assert told["later"] == {}
        assert sum(told["first"].values()) > 0
        assert len(set(told["digests"])) == 1


@pytest.mark.parametrize("signal", SIGNALS)
def test_in_one_compiled_graph_the_host_is_the_same_for_every_seed(two_ranks: RankPool, signal: str) -> None:
    leaky, job = signal == "straight_through", "tests.dist.jobs_isolation:compiled_isolation"
    for told in two_ranks.run(job, signal=signal, leaky=leaky):
        assert told["compiled"]
        assert told["changing"]
        assert told["differences"] == [[], []]
        assert told["new_graphs"] == 0
        assert told["dropped"] == 2  # the seed of NaN was one in both of its steps
        if leaky:
            assert any("gradient" in difference for difference in told["leaks"])
