"""Aggregation over ranks: the same gradients for the same samples on any number of ranks, reduced once a step."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.jobs_aggregate import one_batch
from tests.dist.test_resume import AT_THE_END, SCRIPT, STOPS, write_script
from tests.ranks import RankPool
from tolaria.telemetry.events import read_events

JOBS = "tests.dist.jobs_aggregate"
OWN_SYNC = ("weighted", "pcgrad")
MODES = ("sum", *OWN_SYNC)
MIXED = {"a": "TRAINING", "b": "BLENDING", "c": "PROBATIONARY", "d": "SHADOWING"}


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    """Four real ranks."""
    with RankPool(4) as pool:
        yield pool


def vector(told: dict[str, Any]) -> torch.Tensor:
    """All gradients in one vector."""
    return torch.tensor([x for name in sorted(told["gradients"]) for x in told["gradients"][name]], dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attribution", ["data", "kasmina"])
def test_the_number_of_ranks_does_not_change_the_gradients(
    two_ranks: RankPool, four_ranks: RankPool, mode: str, attribution: str
) -> None:
    arguments = {"mode": mode, "attribution": attribution, "seeds": MIXED, "opposed": True}
    alone = one_batch(world_size=1, **arguments)
    for pool in (two_ranks, four_ranks):
        ranks = pool.run(f"{JOBS}:one_batch", world_size=pool.world_size, **arguments)
        for told in ranks:
            assert told["gradients"].keys() == alone["gradients"].keys()
            torch.testing.assert_close(vector(told), vector(alone), rtol=1e-6, atol=1e-9)
            # The TRAINING seed's gradients have a collective of their own.
            assert told["collectives"] == {"gloo:all_reduce": 2}
            assert len(set(told["digests"])) == 1
            assert told["metrics"].keys() == alone["metrics"].keys()
            for slot, metrics in told["metrics"].items():
                assert metrics == pytest.approx(alone["metrics"][slot], rel=1e-6)
        assert all(told["gradients"] == ranks[0]["gradients"] for told in ranks)
    conflicts = [metrics.get("conflicts", 0) for metrics in alone["metrics"].values()]
    assert (sum(conflicts) > 0) == (mode == "pcgrad")


@pytest.mark.parametrize("mode", MODES)
def test_a_slot_without_a_seed_changes_no_bit_of_the_hosts_gradients(four_ranks: RankPool, mode: str) -> None:
    assert four_ranks.run(f"{JOBS}:idle_slot", mode=mode) == [[]] * 4


@pytest.mark.parametrize("mode", MODES)
def test_a_training_seed_without_samples_changes_no_bit_either(
    two_ranks: RankPool, four_ranks: RankPool, mode: str
) -> None:
    assert two_ranks.run(f"{JOBS}:training_seed", mode=mode) == [[]] * 2
    if mode != "pcgrad":  # its buffer is longer by a gradient, and from 3 ranks on that moves the order of sums
        assert four_ranks.run(f"{JOBS}:training_seed", mode=mode) == [[]] * 4


@pytest.mark.parametrize("mode", OWN_SYNC)
@pytest.mark.parametrize("signal", ["shadow", "straight_through"])
def test_through_every_command_gradients_are_reduced_once_and_ranks_stay_equal(
    two_ranks: RankPool, mode: str, signal: str
) -> None:
    for rank in two_ranks.run("tests.dist.jobs_growth:walk", signal=signal, mode=mode):
        assert rank["stages"] == ["FOSSILIZED", "DORMANT"]
        for told in rank["told"]:
            assert told["command"] == "applied"
            assert told["unequal"] == [] and told["moments"] == 6 * 3
            assert told["first"] == told["settled"] == told["expected"]
            assert told["equal_ranks"]


@pytest.mark.parametrize("mode", OWN_SYNC)
@pytest.mark.parametrize(("fault", "at"), [("device", "GERMINATED"), ("settle", "BLENDING"), ("forward", "BLENDING")])
def test_when_one_rank_fails_to_grow_all_are_as_before(two_ranks: RankPool, mode: str, fault: str, at: str) -> None:
    ranks = two_ranks.run("tests.dist.jobs_growth:fault_on_one_rank", fault=fault, at=at, signal="shadow", mode=mode)
    for rank in ranks:
        assert rank["refused"]
        assert len(set(rank["before"])) == 1 and rank["after"] == rank["before"]
        assert rank["with"] == rank["without"] != rank["after"]
        assert rank["collectives"] == {"gloo:all_reduce": 1 + (at == "BLENDING")}
        assert rank["again"] and len(set(rank["end"])) == 1


@pytest.mark.parametrize("mode", OWN_SYNC)
def test_compiled_steps_give_the_gradients_of_eager_ones_from_one_graph(two_ranks: RankPool, mode: str) -> None:
    for told in two_ranks.run(f"{JOBS}:compiled_and_eager", mode=mode):
        assert told["compiled"] and told["fallbacks"] == []
        assert told["alpha"] == 0.75  # it moved, and nothing was compiled for that
        assert told["new_graphs"] == 0
        assert told["distance"] < 1e-6
        assert told["setting_restored"]


@pytest.mark.parametrize("mode", OWN_SYNC)
def test_ranks_with_unlike_models_are_told_so_at_the_start(two_ranks: RankPool, mode: str) -> None:
    told = two_ranks.run(f"{JOBS}:unlike_models", mode=mode)
    assert all("the model's list of parameters differs over ranks" in error for error in told)


# Going on


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that grows the first slot's seed to the end and the second's halfway."""
    return write_script(tmp_path_factory.mktemp("policy") / "script.toml", SCRIPT)


def owners_told(folder: Path) -> list[dict[str, Any]]:
    """What the boundaries of a run told of the owners."""
    return [event["owners"] for event in read_events(folder / "events.jsonl", "boundary")]


@pytest.mark.parametrize("mode", OWN_SYNC)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    two_ranks: RankPool, tmp_path: Path, script: str, mode: str
) -> None:
    train: Callable[..., list[dict[str, Any]]] = partial(
        two_ranks.run, "tests.dist.jobs_resume:train", script=script, mode=mode
    )
    whole = train(folder=str(tmp_path / "whole"))
    assert whole[0]["stages"] == AT_THE_END
    for at in ("blending", "after_growth"):
        step, stages = STOPS[at]
        folder = tmp_path / at
        stopped = train(folder=str(folder), stop_step=step)
        assert [(r["outcome"], r["steps"], r["stages"]) for r in stopped] == [("stopped", step, stages)] * 2
        resumed = train(folder=str(folder), resume=True)
        assert [r["outcome"] for r in resumed] == ["finished"] * 2
        assert {r["digest"] for r in resumed} == {r["digest"] for r in whole}
        # Also what was counted before the stop is told at the boundary after it.
        assert owners_told(folder) == owners_told(tmp_path / "whole")
    last = owners_told(tmp_path / "whole")[-1]
    assert last["first"]["share"] == pytest.approx(0.5, abs=0.1)
    assert ("conflicts" in last["first"]) == (mode == "pcgrad")


@pytest.mark.parametrize("mode", OWN_SYNC)
def test_a_run_that_went_back_is_bit_equal_too(two_ranks: RankPool, tmp_path: Path, script: str, mode: str) -> None:
    run = partial(two_ranks.run, "tests.dist.jobs_recovery:run", script=script, mode=mode, amp="fp16")
    clean = run(folder=str(tmp_path / "clean"))
    flip = {"what": "flip", "name": "seed/first", "rank": 1, "step": 14}
    went_back = run(folder=str(tmp_path / "back"), faults=[flip])
    assert [told["error"] for told in [*clean, *went_back]] == [""] * 4
    assert [incident[0] for incident in went_back[0]["incidents"]] == ["drift"]
    assert {told["digest"] for told in went_back} == {told["digest"] for told in clean}
    assert owners_told(tmp_path / "back")[-1] == owners_told(tmp_path / "clean")[-1] != {}


def test_another_mode_is_another_run(two_ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    two_ranks.run("tests.dist.jobs_resume:train", folder=folder, steps=3, mode="pcgrad")
    with pytest.raises(AssertionError, match=r"CheckpointMismatch.*aggregate\.mode 'pcgrad' -> 'weighted'"):
        two_ranks.run("tests.dist.jobs_resume:train", folder=folder, steps=6, resume=True, mode="weighted")
