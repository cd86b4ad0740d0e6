import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tolaria.errors import RunDirError
from tolaria.telemetry import report, words
from tolaria.telemetry.summary import (
    CommandRecord,
    RunSummary,
    Score,
    SeedRecord,
    latency_split,
    versions,
    write_summary,
)

SUMMARY = RunSummary(
    outcome="finished", name="digits", run_id="ab", run_dir="runs/x", seed=0, epochs=25, steps=1050, seconds=101.7,
    world_size=2, device="cpu",
    final=Score(step=1050, epoch=25, loss=0.12, accuracy=0.9578, metrics={"bits": 1.5}),
    best=Score(step=1008, epoch=24, loss=0.11, accuracy=0.96),
    before_growth=Score(step=420, epoch=10, loss=0.41, accuracy=0.8832),
    parameters_start=358, parameters_end=2762,
    seeds=[SeedRecord(slot="early", blueprint="conv_residual", stage="FOSSILIZED", parameters=2404, alpha=1.0,
                      contribution=0.25)],
    commands=[CommandRecord(step=420, boundary=10, command_id="c", what="germinate early", reason="plateau")],
    state_digest={0: "aa" * 32, 1: "aa" * 32},
)  # fmt: skip


@contextmanager
def no_room() -> Iterator[None]:
    """Files of this process cannot grow beyond 64 bytes, as on a full disk; nor can pytest's own output to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_file_holds_everything_as_json(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", replace(SUMMARY, counters={"loss": float("nan")}))
    read = json.loads((tmp_path / "summary.json").read_text())
    assert read["schema"] == 1
    assert read["final"] == {"step": 1050, "epoch": 25, "loss": 0.12, "accuracy": 0.9578, "metrics": {"bits": 1.5}}
    assert read["commands"][0]["reason"] == "plateau"
    assert read["state_digest"] == {"0": "aa" * 32, "1": "aa" * 32}
    assert read["counters"] == {"loss": "NaN"}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_writing_replaces_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    write_summary(path, SUMMARY)
    assert json.loads(path.read_text())["steps"] == 1050


def test_a_write_that_fails_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(RunDirError, match=r"summary\.json.*cannot be written"), no_room():
        write_summary(path, SUMMARY)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_that_is_gone_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="absent"):
        write_summary(tmp_path / "absent" / "summary.json", SUMMARY)


def test_latency_by_part() -> None:
    split = latency_split([{"policy": 1.0, "apply": 5.0}, {"policy": 3.0}, {"policy": 2.0}])
    assert split == {"policy": {"p50": 2.0, "p99": 3.0, "max": 3.0}, "apply": {"p50": 5.0, "p99": 5.0, "max": 5.0}}
    assert latency_split([]) == {}
    many = latency_split([{"x": float(n)} for n in range(1000)])["x"]
    assert (many["p50"], many["p99"], many["max"]) == (499.5, 989.0, 999.0)


def test_versions_name_what_decides_the_numbers() -> None:
    found = versions()
    assert {"python", "torch", "numpy"} <= set(found)
    assert all(found.values())


def test_headline() -> None:
    assert report.headline(SUMMARY) == "Finished after 1 min 42 s: 25 epochs, 1,050 steps on 2 cpu ranks"
    single = replace(SUMMARY, outcome="stopped", epochs=1, steps=1, world_size=1, seconds=0.84)
    assert report.headline(single) == "Stopped as asked after 0.8 s: 1 epoch, 1 step on 1 cpu rank"


def test_results_compare_before_and_after_growth() -> None:
    lines = dict(report.result_lines(SUMMARY))
    assert lines["accuracy"] == "88.3% before growth, 95.8% at the end (+7.5 points)"
    assert lines["val loss"] == "0.4100 before growth (step 420), 0.1200 at the end"
    assert lines["parameters"] == "2,762 (358 at the start, +2,404 grown)"
    assert lines["bits"] == "1.5"


def test_results_of_a_run_that_did_not_grow() -> None:
    lines = dict(report.result_lines(replace(SUMMARY, before_growth=None, parameters_end=358, best=None)))
    assert lines["accuracy"] == "95.8% (the model did not grow)"
    assert lines["parameters"] == "358"
    assert "best" not in lines


def test_results_of_a_run_without_validation() -> None:
    assert dict(report.result_lines(replace(SUMMARY, before_growth=None, best=None, final=None))) == {
        "parameters": "2,762 (358 at the start, +2,404 grown)"
    }


@pytest.mark.parametrize(
    ("gain", "noise", "verdict"),
    [
        (0.1515, 0.004, "pays"),
        (0.0081, 0.004, "pays"),
        (0.0079, 0.004, "within noise"),
        (-0.0079, 0.004, "within noise"),
        (-0.0081, 0.004, "harmful"),
        (0.0, 0.0, "within noise"),  # a seed that adds nothing
        (1e-9, 0.0, "pays"),
        (0.1, None, "pays"),  # one validation sample has no spread
        (None, None, "not measured"),
    ],
)
def test_the_verdict_on_a_seed_knows_the_noise(gain: float | None, noise: float | None, verdict: str) -> None:
    record = replace(SUMMARY.seeds[0], contribution=gain, contribution_noise=noise)
    assert record.verdict == record.to_dict()["verdict"] == verdict


def test_seed_lines_tell_gain_and_cost() -> None:
    seed = replace(
        SUMMARY.seeds[0], contribution=0.1515, contribution_noise=0.004, flops=138_240, train_flops=27_869_184_000,
        forward_ms=[12.3456, 3.104],
    )  # fmt: skip
    assert list(report.seed_lines(seed)) == [
        ("early", "conv_residual, fossilized, 2,404 parameters"),
        ("  gain", "pays: +0.1515 +- 0.0040 validation loss"),
        ("  cost", "138 k FLOPs a sample, 27.9 G spent; forward 3.1 -> 12.3 ms"),
    ]
    culled = replace(seed, stage="CULLED", ended_in="PROBATIONARY", contribution=-0.02, forward_ms=(), flops=None)
    assert list(report.seed_lines(culled)) == [
        ("early", "conv_residual, culled in probationary, 2,404 parameters"),
        ("  gain", "harmful: -0.0200 +- 0.0040 validation loss"),
    ]
    blending = replace(SUMMARY.seeds[0], stage="BLENDING", alpha=0.25, contribution=None)
    assert list(report.seed_lines(blending)) == [
        ("early", "conv_residual, blending, alpha 0.25, 2,404 parameters"), ("  gain", "not measured"),
    ]  # fmt: skip
    empty = SeedRecord(slot="late", blueprint="", stage="DORMANT", parameters=0, alpha=0.0)
    assert list(report.seed_lines(empty)) == [("late", "dormant, nothing grew here")]


def test_command_lines() -> None:
    command = replace(SUMMARY.commands[0], outcome="success", effect="val loss 0.41 -> 0.33")
    assert list(report.command_lines(command)) == [
        ("step 420", "germinate early (success)"), ("  why", "plateau"), ("  effect", "val loss 0.41 -> 0.33"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (512, "512"), (999, "999"), (999.6, "1 k"), (138_240, "138 k"), (1_179_648, "1.18 M"),
     (2e12, "2 T"), (3e21, "3e+03 E")],
)  # fmt: skip
def test_large_amounts(amount: float, text: str) -> None:
    assert words.large(amount) == text


def test_unequal_digests_are_not_overlooked() -> None:
    assert report.digest_line({0: "ab" * 32, 1: "ab" * 32}) == "sha256 abababababababab, equal on 2 ranks"
    assert report.digest_line({0: "ab" * 32}) == "sha256 abababababababab, 1 rank"
    different = report.digest_line({1: "cd" * 32, 0: "ab" * 32})
    assert different.startswith("DIFFERS: rank 0 abab")
    assert "rank 1 cdcd" in different
