"""A run that is stopped in the middle of an epoch and continued ends bit-equal to one that was not stopped."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from tests.dist import jobs_resume as jobs
from tests.ranks import RankPool
from tolaria import build
from tolaria.data import EpochSampler
from tolaria.errors import CheckpointMismatch
from tolaria.telemetry.events import read_events

Train: TypeAlias = Callable[..., list[dict[str, Any]]]
"""`jobs_resume.train` on every rank; what each told, by rank."""

STEPS = 27
STOPS = {
    "before_growth": (2, {"first": "DORMANT", "second": "DORMANT"}),
    "training": (8, {"first": "TRAINING", "second": "DORMANT"}),
    "blending": (11, {"first": "BLENDING", "second": "DORMANT"}),
    "after_growth": (23, {"first": "FOSSILIZED", "second": "TRAINING"}),
}
AT_THE_END = {"first": "FOSSILIZED", "second": "TRAINING"}
SCRIPT = [
    (1, "germinate", "first"),
    (2, "start_training", "first"),
    (3, "start_grafting", "first"),
    (4, "germinate", "second"),
    (5, "stabilize", "first"),
    (5, "start_training", "second"),
    (6, "evaluate", "first"),
    (7, "fossilize", "first"),
]


def write_script(path: Path, commands: Sequence[tuple[int, str, str]]) -> str:
    entries = [
        f'[[command]]\nboundary = {boundary}\nop = "{op}"\nslot = "{slot}"\n'
        + ('blueprint = "noisy"\n' if op == "germinate" else "")
        for boundary, op, slot in commands
    ]
    path.write_text("\n".join(entries))
    return str(path)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that grows the first slot's seed to the end and the second's halfway."""
    return write_script(tmp_path_factory.mktemp("policy") / "script.toml", SCRIPT)


@pytest.fixture(scope="module")
def two(two_ranks: RankPool, script: str) -> Train:
    """Two ranks, adamw."""
    return partial(two_ranks.run, "tests.dist.jobs_resume:train", script=script)


@pytest.fixture(scope="module")
def one(script: str) -> Train:
    """One process without torchrun: SGD with momentum, two microbatches a step."""

    def train(folder: str, **arguments: Any) -> list[dict[str, Any]]:
        return [jobs.train(folder, **{"script": script, "optimizer": "sgd", "accumulation": 2, **arguments})]

    return train


@pytest.fixture(scope="module")
def whole_two(two: Train, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two(folder=str(tmp_path_factory.mktemp("two") / "run"))


@pytest.fixture(scope="module")
def whole_one(one: Train, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return one(folder=str(tmp_path_factory.mktemp("one") / "run"))


def by_rank(folder: Path, kind: str, *fields: str) -> list[tuple[Any, ...]]:
    """(rank, fields) of every event of a kind, in the order of the ranks."""
    events = read_events(folder / "events.jsonl", kind)
    return sorted((event["rank"], *(event[field] for field in fields)) for event in events)


def stop(train: Train, folder: Path, at: str, **arguments: Any) -> None:
    """Start a run that is told to stop at a stage, on its last rank only; it stops there, on all ranks."""
    step, stages = STOPS[at]
    ranks = train(folder=str(folder), stop_step=step, **arguments)
    assert [(r["outcome"], r["steps"], r["stages"]) for r in ranks] == [("stopped", step, stages)] * len(ranks)
    assert len({r["digest"] for r in ranks}) == 1
    if at == "blending":
        assert 0 < ranks[0]["alphas"]["first"] < 1
    requests = by_rank(folder, "stop_requested", "step", "signal")
    assert requests == [(rank, step, "SIGTERM") for rank in range(len(ranks))]


def assert_finished(ranks: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    assert [r["outcome"] for r in [*ranks, *whole]] == ["finished"] * 2 * len(ranks)
    assert {r["digest"] for r in ranks} == {r["digest"] for r in whole}
    assert len({r["digest"] for r in whole}) == 1


# Eager


@pytest.mark.parametrize("at", STOPS)
def test_two_ranks_continue_as_if_never_stopped(
    two: Train, whole_two: list[dict[str, Any]], at: str, tmp_path: Path
) -> None:
    assert whole_two[0]["stages"] == AT_THE_END
    assert any(contribution is not None for *_, contribution, _, _ in whole_two[0]["lives"])
    stop(two, tmp_path / "run", at, stop_rank=1)
    ranks = two(folder=str(tmp_path / "run"), resume=True)
    assert_finished(ranks, whole_two)
    assert [r["lives"] for r in ranks] == [whole_two[0]["lives"]] * 2


@pytest.mark.parametrize("at", STOPS)
def test_one_process_continues_as_if_never_stopped(
    one: Train, whole_one: list[dict[str, Any]], at: str, tmp_path: Path
) -> None:
    assert whole_one[0]["stages"] == AT_THE_END
    stop(one, tmp_path / "run", at)
    assert_finished(one(folder=str(tmp_path / "run"), resume=True), whole_one)


# Compiled: until the seed is blended in, since each structure takes seconds to compile


@pytest.fixture
def compiled(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a compiled run that ends with its seed in full."""
    script = write_script(tmp_path / "script.toml", [entry for entry in SCRIPT if entry[0] <= 3])
    return {"compiled": True, "steps": 16, "script": script}


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that is as new afterwards."""
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # inductor's own; taken away again afterwards
    yield
    torch._dynamo.reset()


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("compiler")
def test_one_compiled_process_continues_as_if_never_stopped(
    one: Train, compiled: dict[str, Any], tmp_path: Path
) -> None:
    whole = one(folder=str(tmp_path / "whole"), **compiled)
    torch._dynamo.reset()
    stop(one, tmp_path / "run", "blending", **compiled)
    torch._dynamo.reset()
    assert_finished(one(folder=str(tmp_path / "run"), resume=True, **compiled), whole)
    assert_compiled(tmp_path / "run")


@pytest.mark.timeout(240)
def test_two_compiled_ranks_continue_as_if_never_stopped(two: Train, compiled: dict[str, Any], tmp_path: Path) -> None:
    patient = partial(two, deadline_s=200, **compiled)
    whole = patient(folder=str(tmp_path / "whole"))
    stop(patient, tmp_path / "run", "blending", stop_rank=1)
    assert_finished(patient(folder=str(tmp_path / "run"), resume=True), whole)
    assert_compiled(tmp_path / "run")


def assert_compiled(folder: Path) -> None:
    assert by_rank(folder, "compile_fallback") == []


# Another number of ranks


def expected_weights(seen_before: int, group_before: int, group_after: int) -> list[float]:
    """The weight of each sample in an epoch of which the first part was taken in groups of another size."""
    sampler = EpochSampler(
        jobs.TRAIN_SAMPLES, seed=jobs.SEED, rank=0, world_size=1, batch_size=jobs.BATCH, accumulation=1
    )
    order = sampler.order()
    weights = [0.0] * jobs.TRAIN_SAMPLES
    start = 0
    while start < len(order):
        group = order[start : start + (group_before if start < seen_before else group_after)]
        for index in group:
            weights[index] += 1 / len(group)
        start += len(group)
    return weights


def test_one_process_continues_a_run_of_two_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    two_ranks.run("tests.dist.jobs_resume:count_samples", folder=folder, stop_step=3)
    assert jobs.count_samples(folder, resume=True) == expected_weights(24, 2 * jobs.BATCH, jobs.BATCH)
    assert by_rank(tmp_path / "run", "resumed", "saved_world_size", "local_state") == [(0, 2, False)]


def test_two_ranks_continue_a_run_of_one_process(two_ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    jobs.count_samples(folder, stop_step=3)
    seen = two_ranks.run("tests.dist.jobs_resume:count_samples", folder=folder, resume=True)
    assert seen == [expected_weights(12, jobs.BATCH, 2 * jobs.BATCH)] * 2
    resumed = by_rank(tmp_path / "run", "resumed", "saved_world_size", "local_state")
    assert resumed == [(0, 1, False), (1, 1, False)]


def test_a_grown_model_continues_on_another_number_of_ranks(two: Train, script: str, tmp_path: Path) -> None:
    stop(two, tmp_path / "run", "blending", stop_rank=1)
    told = jobs.train(str(tmp_path / "run"), script=script, resume=True, accept_changes=True, steps=STEPS)
    assert (told["outcome"], told["steps"], told["stages"]) == ("finished", STEPS, AT_THE_END)
    # What rank 0 knew of the commands before the stop is not lost with the other rank.
    told_of = [c["what"] for c in json.loads((tmp_path / "run" / "summary.json").read_text())["commands"]]
    applied = [event["what"] for event in read_events(tmp_path / "run" / "events.jsonl", "command_applied")]
    assert told_of == applied
    assert any("start grafting" in what for what in told_of)


# Damaged checkpoints


@pytest.fixture(scope="module")
def stopped(two: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that stopped while its seed was BLENDING."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop(two, folder, "blending", stop_rank=1)
    return folder


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "shard-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "state-00000.json"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate])
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(
    two: Train, whole_two: list[dict[str, Any]], stopped: Path, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    before, newest = sorted((folder / "ckpt").iterdir(), key=lambda path: int(path.name.split("-s")[1]))[-2:]
    assert newest.name.endswith("-s11")
    damage(newest)
    assert_finished(two(folder=str(folder), resume=True), whole_two)
    assert by_rank(folder, "checkpoint_bad", "path", "level") == [(r, str(newest), "error") for r in range(2)]
    assert by_rank(folder, "resumed", "path") == [(r, str(before)) for r in range(2)]
    assert newest.with_name(newest.name + ".bad").is_dir()


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"first_slot": "other"}, r"slots \['first', 'second'\], the model has \['other', 'second'\]"),
        ({"width": 7}, r"slot 'first': shape \[6\] saved, \(7,\) in the model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_words(
    script: str, stopped: Path, task: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    with pytest.raises(CheckpointMismatch, match=told):
        jobs.train(str(folder), script=script, resume=True, accept_changes=True, task=task)
    assert {p.name for p in (folder / "ckpt").iterdir()} == {p.name for p in (stopped / "ckpt").iterdir()}


# A full disk


def checkpoint_steps(folder: Path, kind: str) -> list[int]:
    return [event["saved_step"] for event in read_events(folder / "events.jsonl", kind)]


def test_a_rank_that_cannot_write_costs_one_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    full, free = tmp_path / "full", tmp_path / "free"
    ranks = two_ranks.run(
        "tests.dist.jobs_resume:train_on_full_disk", folder=str(full), first_step=5, last_step=8, steps=12
    )
    undisturbed = two_ranks.run("tests.dist.jobs_resume:train", folder=str(free), steps=12)
    assert [r["refused"] for r in ranks] == [0, 1]
    assert_finished(ranks, undisturbed)
    assert checkpoint_steps(full, "checkpoint_failed") == [6]
    (failed,) = read_events(full / "events.jsonl", "checkpoint_failed")
    assert "rank 1" in failed["reason"] and "No space left" in failed["reason"]
    assert checkpoint_steps(full, "checkpoint_committed")[-2:] == [9, 12]
    assert [r["counters"]["checkpoint_failures"] for r in ranks] == [1, 1]
    assert not list((full / "ckpt").glob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, where this process may mount one."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tolaria-test", str(mount_point)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True, timeout=20)


def test_training_goes_on_while_the_disk_is_full(small_disk: Path) -> None:
    folder = small_disk / "run"
    fill, empty = jobs.ballast(small_disk)
    watch = jobs.Between(5, fill, 8, empty)
    config = jobs.make_config(str(folder), steps=12)
    summary = build.train(config, task=lambda: jobs.make_task(watch=watch))
    assert (summary.outcome, summary.steps) == ("finished", 12)
    assert checkpoint_steps(folder, "checkpoint_failed") == [6]
    assert checkpoint_steps(folder, "checkpoint_committed")[-2:] == [9, 12]
    assert not list((folder / "ckpt").glob("*.tmp"))
