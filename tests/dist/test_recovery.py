"""A run that something goes wrong in goes back by itself, and ends as one that nothing went wrong in."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.dist.jobs_resume import BATCH, SEED, TRAIN_SAMPLES
from tests.dist.test_resume import SCRIPT, by_rank, write_script
from tests.faults.test_disk import mounted
from tests.ranks import RankPool
from tolaria.data import EpochSampler
from tolaria.telemetry.events import read_events

Run: TypeAlias = Callable[..., list[dict[str, Any]]]
STEPS = 24
GROUP = 2 * BATCH
STEPS_PER_EPOCH = -(-TRAIN_SAMPLES // GROUP)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that grows a seed: TRAINING from step 6 on, BLENDING from step 9 on."""
    commands = [entry for entry in SCRIPT if entry[0] <= 3]
    return write_script(tmp_path_factory.mktemp("policy") / "script.toml", commands)


@pytest.fixture(scope="module")
def two(two_ranks: RankPool, script: str) -> Run:
    return partial(two_ranks.run, "tests.dist.jobs_recovery:run", script=script, steps=STEPS)


@pytest.fixture(scope="module")
def clean(two: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the run that nothing happens to."""
    return same(two(folder=str(tmp_path_factory.mktemp("clean") / "run")))["digest"]


def same(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks told alike."""
    keys = ("outcome", "digest", "steps", "mode", "incidents", "stages", "skipped")
    assert [r["error"] for r in ranks] == [""] * len(ranks)
    for key in keys:
        assert len({str(r[key]) for r in ranks}) == 1, key
    return ranks[0]


def window(step: int) -> list[int]:
    """The samples of one step of the clean run; the first step is 1."""
    epoch, position = divmod(step - 1, STEPS_PER_EPOCH)
    return [epoch, position * GROUP, min((position + 1) * GROUP, TRAIN_SAMPLES)]


# Memory of one rank that changes by itself: the replicas differ, and the run goes back to where they did not


@pytest.mark.parametrize(("fault", "told"), [
    pytest.param({"what": "flip", "name": "model/middle.weight", "rank": 1}, "model/middle.weight", id="weight"),
    pytest.param({"what": "flip", "name": "optim/head.weight/exp_avg", "rank": 1}, "exp_avg", id="moment"),
    pytest.param({"what": "flip", "name": "seed/first", "rank": 1}, "seed/first", id="seed"),
    pytest.param({"what": "draw", "rank": 1}, "random generators", id="random numbers"),
    pytest.param({"what": "sampler", "rank": 1}, "position", id="sampler"),
    pytest.param({"what": "lr", "rank": 0}, "learning rates", id="learning rate"),
    pytest.param({"what": "decay", "rank": 1}, "optimizer", id="weight decay"),
    pytest.param({"what": "mode", "rank": 1}, "mode", id="mode"),
])  # fmt: skip
def test_a_replica_that_drifts_is_named_and_undone(
    two: Run, clean: str, fault: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ranks = two(folder=str(folder), faults=[{"step": 10, **fault}])
    assert [r["struck"][0] for r in ranks] == [int(r == fault["rank"]) for r in range(2)]
    run = same(ranks)
    ((cause, _, to_step, source, left_out),) = run["incidents"]
    assert (cause, source, left_out) == ("drift", f"snapshot of step {to_step}", 0)
    reasons = {reason for _, reason in by_rank(folder, "incident", "reason")}
    assert any(told in reason for reason in reasons), reasons
    assert (run["outcome"], run["mode"], run["digest"]) == ("finished", "normal", clean)


def test_a_scaler_out_of_step_is_named_and_undone(two: Run, tmp_path: Path) -> None:
    expected = same(two(folder=str(tmp_path / "clean"), amp="fp16"))
    folder = tmp_path / "run"
    ranks = two(folder=str(folder), amp="fp16", faults=[{"what": "scaler", "step": 10, "rank": 1}])
    assert [r["struck"] for r in ranks] == [[0], [1]]
    run = same(ranks)
    assert [incident[0] for incident in run["incidents"]] == ["drift"]
    assert any("scaler" in reason for _, reason in by_rank(folder, "incident", "reason"))
    assert (run["outcome"], run["digest"]) == ("finished", expected["digest"])


def test_a_gradient_that_overflows_on_one_rank_is_skipped_on_both(two: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    both = [{"what": "scaler", "step": 10, "rank": None}]
    run = same(two(folder=str(folder), amp="fp16", faults=both))
    skipped = by_rank(folder, "step_skipped", "step")
    assert skipped and [s for r, s in skipped if r == 0] == [s for r, s in skipped if r == 1]
    assert (run["outcome"], run["incidents"]) == ("finished", [])


def test_a_buffer_that_drifts_is_healed_by_the_next_forward_pass(two: Run, clean: str, tmp_path: Path) -> None:
    ranks = two(
        folder=str(tmp_path / "run"), faults=[{"what": "flip", "name": "model/norm.running_mean", "rank": 1, "step": 9}]
    )
    assert [r["struck"] for r in ranks] == [[0], [1]]
    run = same(ranks)
    assert (run["incidents"], run["digest"]) == ([], clean)


# Data of one rank


def test_a_spike_goes_back_leaves_the_samples_out_and_goes_on(two: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    bad = 14  # the growth at step 9 made the watch begin anew
    ranks = two(folder=str(folder), open_host=True, bad_steps=[bad], bad_factor=1e4, bad_rank=1)
    assert [r["bad"] for r in ranks] == [0, 1]
    run = same(ranks)
    assert run["incidents"] == [["loss_spike", bad, 12, "snapshot of step 12", GROUP]]
    scripted = same(two(
        folder=str(tmp_path / "scripted"), open_host=True,
        returns=[{"step": 12, "skip": [window(bad)], "reason": f"loss_spike at step {bad}"}],
    ))  # fmt: skip
    assert run["digest"] == scripted["digest"]


def test_every_sample_but_those_left_out_is_seen_exactly_once_an_epoch(two_ranks: RankPool, tmp_path: Path) -> None:
    bad = 8
    first, second = two_ranks.run(
        "tests.dist.jobs_recovery:count_samples_with_spike", folder=str(tmp_path / "run"), bad_step=bad
    )
    assert (first["struck"], second["struck"]) == (0, 1)
    assert first["incidents"] == second["incidents"] == [["loss_spike", bad, 8 - 4, "snapshot of step 4", GROUP]]
    sampler = EpochSampler(TRAIN_SAMPLES, seed=SEED, rank=0, world_size=1, batch_size=GROUP, accumulation=1)
    weights = [0.0] * TRAIN_SAMPLES
    for step in range(1, 2 * STEPS_PER_EPOCH + 1):
        epoch, start, end = window(step)
        for index in sampler.order(epoch)[start:end] if step != bad else ():
            weights[index] += 1 / (end - start)
    assert first["seen"] == second["seen"] == pytest.approx(weights, rel=1e-6)


def test_three_steps_in_a_row_without_a_finite_gradient_go_back(two: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    bad = [10, 11, 12]
    ranks = two(folder=str(folder), bad_steps=bad, bad_factor=float("nan"), bad_rank=1)
    assert [r["bad"] for r in ranks] == [0, 3]
    run = same(ranks)
    ((cause, _, to_step, _, left_out),) = run["incidents"]
    assert (cause, to_step) == ("non_finite", 8)
    assert left_out == sum(end - start for _, start, end in map(window, bad))
    scripted = same(two(
        folder=str(tmp_path / "scripted"),
        returns=[{"step": 8, "skip": [window(step) for step in bad], "reason": "non_finite at step 12"}],
    ))  # fmt: skip
    assert run["digest"] == scripted["digest"]


def test_data_that_stays_bad_ends_the_run_with_a_report(two: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = two(
        folder=str(folder), bad_steps=list(range(1, 400)), bad_factor=float("nan"), bad_rank=1, steps=200,
        recovery={"attempts": 2},
    )  # fmt: skip
    for rank in ranks:
        assert rank["error"].startswith("TrainingUnstable: ")
        assert "it happened again" in rank["error"]
    causes = [cause for _, cause in by_rank(folder, "gave_up", "cause")]
    assert causes == ["non_finite", "non_finite"]


# The model, on all ranks alike


def test_a_collapse_goes_back_to_the_good_checkpoint_and_voids_the_later_ones(
    two: Run, clean: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ranks = two(folder=str(folder), faults=[{"what": "blow", "step": 17, "name": "model/head"}],
                recovery={"collapse_ratio": 2.0})  # fmt: skip
    assert [r["struck"] for r in ranks] == [[1], [1]]
    run = same(ranks)
    ((cause, step, to_step, source, _),) = run["incidents"]
    assert (cause, step) == ("collapse", 18)
    assert source.startswith("checkpoint c") and to_step < 17
    assert (run["outcome"], run["digest"]) == ("finished", clean)


# In time


def test_a_return_over_growth_takes_the_seed_away_and_grows_it_again_alike(
    two: Run, clean: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # The seed comes at boundary 1, step 3; the snapshot before is of step 0.
    ranks = two(folder=str(folder), faults=[{"what": "flip", "name": "model/inlet", "rank": 1, "step": 3}])
    run = same(ranks)
    assert [incident[2:4] for incident in run["incidents"]] == [[0, "snapshot of step 0"]]
    assert run["digest"] == clean
    repeated = by_rank(folder, "decision_repeated", "boundary")
    # The decision of boundary 1 lay behind the state gone back to, so the policy was asked anew.
    assert repeated == []


@pytest.mark.parametrize("late", ["prepare_ms", "commit_ms"])
def test_a_fast_return_that_misses_its_deadline_leaves_it_to_the_checkpoint(
    two: Run, clean: str, late: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ranks = two(folder=str(folder), faults=[{"what": "flip", "name": "model/inlet", "rank": 1, "step": 14}],
                slow=late, recovery={"prepare_ms": 400, "commit_ms": 400})  # fmt: skip
    run = same(ranks)
    assert run["incidents"][0][3].startswith("checkpoint c")
    assert {phase for _, phase in by_rank(folder, "fast_return_failed", "phase")} == {"commit"}
    assert (run["outcome"], run["digest"]) == ("finished", clean)


# Emergencies and commands


@pytest.mark.parametrize("rank", [0, 1])
def test_an_emergency_of_level_3_goes_back_in_conservative_mode(two: Run, rank: int, tmp_path: Path) -> None:
    ranks = two(folder=str(tmp_path / "run"), alarms=[{"rank": rank, "step": 14, "level": 3}])
    run = same(ranks)
    assert run["incidents"] == [["emergency", 14, 12, "snapshot of step 12", 0]]
    scripted = same(two(
        folder=str(tmp_path / "scripted"),
        returns=[{"step": 12, "skip": [], "reason": "emergency at step 14"}],
    ))  # fmt: skip
    assert run["digest"] == scripted["digest"]


def test_an_emergency_of_level_2_goes_back_to_a_good_checkpoint(two: Run, clean: str, tmp_path: Path) -> None:
    run = same(two(folder=str(tmp_path / "run"), alarms=[{"rank": 1, "step": 16, "level": 2}]))
    ((cause, _, _, source, _),) = run["incidents"]
    assert cause == "emergency" and source.startswith("checkpoint c")
    assert (run["outcome"], run["digest"]) == ("finished", clean)


def test_a_notice_changes_nothing(two: Run, clean: str, tmp_path: Path) -> None:
    run = same(two(folder=str(tmp_path / "run"), alarms=[{"rank": 1, "step": 16, "level": 1}]))
    assert (run["incidents"], run["digest"]) == ([], clean)
    assert ("planted",) in {event[1:] for event in by_rank(tmp_path / "run", "emergency", "reason")}


def test_a_halt_that_is_cleared_leaves_no_trace(two: Run, clean: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = same(two(folder=str(folder), alarms=[{"rank": 1, "step": 14, "level": 4, "clear_s": 0.5}]))
    assert by_rank(folder, "halted", "step") == [(0, 14), (1, 14)]
    assert (run["incidents"], run["digest"]) == ([], clean)


def test_a_halt_that_is_not_cleared_saves_the_state_and_ends(two: Run, clean: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = two(folder=str(folder), alarms=[{"rank": 1, "step": 14, "level": 4}], recovery={"halt_wait_s": 0.3})
    assert [rank["error"].partition(" and")[0] for rank in ranks] == ["RunHalted: halted (planted)"] * 2
    assert by_rank(folder, "run_ended", "outcome", "steps") == [(0, "halted", 14), (1, "halted", 14)]
    resumed = same(two(folder=str(folder), resume=True))
    assert {event[1] for event in by_rank(folder, "resumed", "saved_step")} == {12}
    assert (resumed["outcome"], resumed["digest"]) == ("finished", clean)


def test_an_alarm_reaches_a_rank_that_waits_in_a_collective_and_both_halt_at_one_step(
    two: Run, clean: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    alarm = {"rank": 1, "step": 14, "level": 4, "late_s": 0.5, "clear_s": 0.5}
    ranks = two(folder=str(folder), alarms=[alarm])
    # Rank 0 had begun the step after 14 and could not end it without rank 1; it had seen the alarm all the same.
    assert [rank["acknowledged"] for rank in ranks] == [[], [["STEP", 14]]]
    assert by_rank(folder, "halted", "step") == [(0, 14), (1, 14)]
    assert (same(ranks)["incidents"], same(ranks)["digest"]) == ([], clean)


def test_of_two_alarms_at_once_the_higher_one_counts(two: Run, tmp_path: Path) -> None:
    alarms = [{"rank": 0, "step": 14, "level": 2}, {"rank": 1, "step": 14, "level": 3}]
    run = same(two(folder=str(tmp_path / "run"), alarms=alarms))
    higher = same(two(folder=str(tmp_path / "higher"), alarms=alarms[1:]))
    assert run["incidents"] == higher["incidents"] == [["emergency", 14, 12, "snapshot of step 12", 0]]
    assert run["digest"] == higher["digest"]


# What the run stands on: the mapped page, the disk, the data


@pytest.fixture
def full_memory(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory without room for a page."""
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=8k", "none") as place:
        (place / "filler").write_bytes(bytes(8192))
        yield place


def test_without_room_for_the_page_the_fence_alone_carries_emergencies(
    two: Run, clean: str, full_memory: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = same(two(folder=str(folder), alarms=[{"rank": 1, "step": 16, "level": 2}],
                   recovery={"snapshot_dir": str(full_memory)}))  # fmt: skip
    assert [rank for rank, reason in by_rank(folder, "page_unavailable", "reason") if "space" in reason] == [0]
    assert by_rank(folder, "emergency", "emergency_level") == [(1, 2)]  # nobody else could see it before the fence
    ((cause, _, _, source, _),) = run["incidents"]
    assert cause == "emergency" and source.startswith("checkpoint c")
    assert (run["outcome"], run["digest"]) == ("finished", clean)


def test_a_page_that_is_deleted_under_a_run_works_on(two: Run, clean: str, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    alarm = {"rank": 1, "step": 14, "level": 4, "clear_s": 0.5}
    ranks = two(folder=str(tmp_path / "run"), alarms=[alarm], recovery={"snapshot_dir": str(memory)},
                faults=[{"what": "no page", "step": 10, "rank": 0, "name": str(memory)}])  # fmt: skip
    assert [rank["struck"] for rank in ranks] == [[1], [0]]
    assert by_rank(tmp_path / "run", "halted", "step") == [(0, 14), (1, 14)]
    assert (same(ranks)["incidents"], same(ranks)["digest"]) == ([], clean)


def test_a_slow_disk_under_the_checkpoints_costs_saves_and_no_steps(two: Run, clean: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = two(folder=str(folder), slow="disk")
    assert ranks[1]["slowed"] > 5
    skipped = {step for _, step in by_rank(folder, "checkpoint_skipped", "step")}
    committed = {step for _, step in by_rank(folder, "checkpoint_committed", "saved_step")}
    # While one was being written the run went on, past boundaries that wanted one too; none was in flight twice.
    assert skipped and not skipped & committed - {STEPS}  # the last one is written anyhow
    assert len(skipped | committed) == STEPS // 3 and max(committed) == STEPS
    assert same(ranks)["digest"] == clean


def test_a_slow_disk_under_the_telemetry_holds_no_step_up(two: Run, clean: str, tmp_path: Path) -> None:
    ranks = two(folder=str(tmp_path / "run"), slow="sink")
    assert ranks[1]["slowed"] > 2
    assert same(ranks)["digest"] == clean


def test_a_rank_with_slow_data_is_named_within_two_boundaries(two: Run, clean: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = two(folder=str(folder), slow="data")
    assert ranks[0]["slowed"] == 0 and ranks[1]["slowed"] >= STEPS
    told = list(read_events(folder / "events.jsonl", "straggler"))
    assert {event["straggler"] for event in told} == {1}
    assert min(event["step"] for event in told) <= 2 * 3
    assert all(event["own_ms"] > 3 * event["others_ms"] for event in told)
    assert same(ranks)["digest"] == clean


def test_the_policy_may_ask_for_a_return(two: Run, clean: str, tmp_path: Path) -> None:
    commands = [entry for entry in SCRIPT if entry[0] <= 3]
    path = Path(write_script(tmp_path / "script.toml", commands))
    path.write_text(path.read_text() + '\n[[command]]\nboundary = 7\nop = "rollback"\n')
    run = same(two(folder=str(tmp_path / "run"), script=str(path)))
    ((cause, step, to_step, source, _),) = run["incidents"]
    assert (cause, step) == ("command", 21) and source.startswith("checkpoint c") and to_step < 21
    # The boundary came again and the command with it: one return in so many boundaries is enough.
    refused = {code for _, code in by_rank(tmp_path / "run", "command_refused", "code")}
    assert refused == {"rate_limit"}
    assert (run["outcome"], run["digest"]) == ("finished", clean)
