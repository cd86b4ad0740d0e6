"""A change is tried on the run itself and taken back; the run then ends as one that never tried anything."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.dist import jobs_rehearsal
from tests.dist.test_resume import AT_THE_END, SCRIPT, write_script
from tests.ranks import RankPool
from tolaria.telemetry.events import read_events
from tolaria.telemetry.metrics import read_metrics

COURSE = {"boundary", "seed_moved", "command_applied", "command_refused", "incident", "went_back", "mode_changed"}
Train: TypeAlias = Callable[..., list[dict[str, Any]]]

# Before growth, one seed learning, one blending in, one part of the host and another learning; over epochs' ends.
WISHES = [(2, "lr*=0.5", 4), (8, "lr*=2, weight_decay=0.02", 6), (11, "seed/*.lr*=0.5", 5), (23, "host.lr*=0.5", 9)]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that grows the first slot's seed to the end and the second's halfway."""
    return write_script(tmp_path_factory.mktemp("policy") / "script.toml", SCRIPT)


@pytest.fixture(scope="module")
def two(two_ranks: RankPool, script: str) -> Train:
    """Two ranks, adamw."""
    return partial(two_ranks.run, "tests.dist.jobs_rehearsal:train", script=script)


def one(folder: str, script: str, **arguments: Any) -> list[dict[str, Any]]:
    """One process: SGD with momentum, two microbatches a step."""
    return [jobs_rehearsal.train(folder, script=script, **{"optimizer": "sgd", "accumulation": 2, **arguments})]


def check(ranks: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    assert [r["outcome"] for r in [*ranks, *whole]] == ["finished"] * 2 * len(ranks)
    assert whole[0]["stages"] == AT_THE_END
    assert {r["digest"] for r in ranks} == {whole[0]["digest"]}
    # What was tried had an effect, and all ranks say the same of it but for the time it took.
    told = [without_times(r["told"]) for r in ranks]
    assert all(each == told[0] for each in told)
    for (_, _, steps), effect in zip(WISHES, told[0], strict=True):
        assert effect["steps"] == min(steps, 27 - effect["at_step"]) and not effect["changed"]["ended"]
        assert effect["val_difference"] != 0 and effect["val_error"] > 0


def without_times(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**e, **{n: {**e[n], "seconds": 0} for n in ("control", "changed")}} for e in told]


def test_two_ranks_go_on_as_if_nothing_had_been_tried(two: Train, tmp_path: Path) -> None:
    whole = two(folder=str(tmp_path / "whole"), wishes=[])
    ranks = two(folder=str(tmp_path / "run"), wishes=WISHES)
    check(ranks, whole)
    assert course(tmp_path / "run") == course(tmp_path / "whole")


def course(run: Path) -> list[str]:
    """What rank 0 tells of the run's course, in its order."""
    return [e["kind"] for e in read_events(run / "events.jsonl") if e["kind"] in COURSE and e["rank"] == 0]


def test_one_process_with_momentum_goes_on_as_if_nothing_had_been_tried(script: str, tmp_path: Path) -> None:
    whole = one(str(tmp_path / "whole"), script, wishes=[])
    check(one(str(tmp_path / "run"), script, wishes=WISHES), whole)


def test_the_arms_are_what_the_run_goes_on_to_be_with_the_change_and_without(tmp_path: Path) -> None:
    """Two steps after a boundary: nothing else draws random numbers between."""
    halved = '[[command]]\nboundary = 2\nop = "scale_lr"\ngroup = "*"\nfactor = 0.5\n'
    (tmp_path / "halved.toml").write_text(halved)
    (tmp_path / "none.toml").write_text(halved.replace("boundary = 2", "boundary = 99"))
    (tried,) = one(str(tmp_path / "run"), str(tmp_path / "none.toml"), wishes=[(6, "lr*=0.5", 2)])
    (effect,) = tried["told"]
    one(str(tmp_path / "other"), str(tmp_path / "halved.toml"), wishes=[])
    assert effect["what"] == "*: lr x0.5" and effect["train_steps"] == 1
    assert effect["control"]["losses"] == losses(tmp_path / "run", 7, 8)
    assert effect["changed"]["losses"] == losses(tmp_path / "other", 7, 8)
    assert effect["control"]["losses"][0] == effect["changed"]["losses"][0]
    assert effect["control"]["losses"][1] != effect["changed"]["losses"][1]


def losses(run: Path, *steps: int) -> list[float]:
    found = {line["step"]: line["loss_rank0"] for line in read_metrics(run / "metrics.jsonl")}
    return [found[step] for step in steps]


def test_what_a_command_would_be_refused_for_is_refused_and_nothing_happens(two: Train, tmp_path: Path) -> None:
    wishes = [(4, "lr*=1e9", 5), (4, "lr=", 5), (4, "momentum=0.5", 5), (4, "lr*=0.5", 0), (4, "nobody.lr*=0.5", 5)]
    ranks = two(folder=str(tmp_path / "run"), wishes=wishes, steps=6)
    codes = [code for code, _ in ranks[0]["told"]]
    assert codes == ["lr_out_of_bounds", "bad_change", "unknown_parameter", "bad_steps", "unknown_group"]
    assert ranks[0]["told"] == ranks[1]["told"]
    (other,) = {r["digest"] for r in two(folder=str(tmp_path / "whole"), wishes=[], steps=6)}
    assert {r["digest"] for r in ranks} == {other}


def test_a_rank_that_needs_the_run_gets_it_back_at_once(two_ranks: RankPool, script: str, tmp_path: Path) -> None:
    def run(name: str, **arguments: Any) -> list[dict[str, Any]]:
        return two_ranks.run(
            "tests.dist.jobs_rehearsal:on_rank", rank=1, folder=str(tmp_path / name), script=script, steps=9, **arguments
        )

    ranks = run("run", wishes=[(4, "lr*=0.5", 20)], needed_at=7)
    assert [r["told"] for r in ranks] == [
        [["interrupted", "another rank wants the run back"]], [["interrupted", "this rank does"]],
    ]  # fmt: skip
    assert {r["digest"] for r in ranks} == {r["digest"] for r in run("whole", wishes=[])}


def test_an_arm_that_fails_is_told_and_does_not_reach_the_run(two: Train, tmp_path: Path) -> None:
    two = partial(two, script="", steps=17)  # growth would have the run forget what losses are usual
    ranks = two(folder=str(tmp_path / "run"), wishes=[(12, "lr*=1000", 8)])
    (effect,) = ranks[0]["told"]
    assert effect["changed"]["ended"] and not effect["control"]["ended"]
    assert effect["verdict"].startswith("training failed after") and "and not otherwise" in effect["verdict"]
    assert effect["val_difference"] is None
    whole = two(folder=str(tmp_path / "whole"), wishes=[])
    assert {r["digest"] for r in ranks} == {r["digest"] for r in whole}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["incidents"] == []


