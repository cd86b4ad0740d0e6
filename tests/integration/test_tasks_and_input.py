"""A user's own model, module and policy grow from start to end; every mistake is told on one line, and no more."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest

import tolaria
from tests.integration.user_task import MISTAKES, SLOT_PATH, make_task
from tolaria import Config, train
from tolaria.config import (
    CheckpointConfig,
    CompileConfig,
    DistConfig,
    KasminaConfig,
    LogConfig,
    PrecisionConfig,
    RunConfig,
    TamiyoConfig,
    TrainConfig,
)
from tolaria.launch import main
from tolaria.options import resolve
from tolaria.telemetry.events import read_events
from tolaria.telemetry.summary import RunSummary

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
TASK = "tests.integration.user_task:make_task"
REFUSED_S = 3.0
LAUNCH_S = 60.0

# The way of a seed, one move at each boundary; a boundary is an epoch of five steps.
SCRIPT = """
command = [
    { boundary = 1, op = "germinate", slot = "mid", blueprint = "user_gate", reason = "the first epoch is over" },
    { boundary = 2, op = "start_training", slot = "mid" },
    { boundary = 3, op = "start_grafting", slot = "mid" },
    { boundary = 4, op = "stabilize", slot = "mid" },
    { boundary = 5, op = "evaluate", slot = "mid" },
    { boundary = 6, op = "fine_tune", slot = "mid" },
    { boundary = 7, op = "fossilize", slot = "mid" },
]
"""
GROWTH = {
    "--kasmina.slots.mid": SLOT_PATH,
    "--kasmina.blend_steps": "5",
    "--kasmina.gradient_window": "5",
    "--kasmina.min_contribution": "-10",
    "--kasmina.max_loss_ratio": "100",
    "--tamiyo.deadline_ms": "10000",
    "--dist.threads": "1",
}


def flags(**given: str) -> list[str]:
    """Flags of a short run in this process, eager, without a policy; names with "__" for the dot."""
    base = {
        "task.factory": TASK, "compile.enabled": "false", "train.epochs": "1", "train.batch_size": "8",
        "dist.threads": "1", "dist.device": "cpu", "tamiyo.policy": "none",
    }  # fmt: skip
    chosen = base | {name.replace("__", "."): value for name, value in given.items()}
    return [part for name, value in chosen.items() for part in (f"--{name}", value)]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tolaria.launch", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LAUNCH_S, check=False,
    )  # fmt: skip


# A user's own model


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The user's module grown into their TransformerEncoder by the command line, as they would type it."""
    folder = tmp_path_factory.mktemp("grown")
    (folder / "script.toml").write_text(SCRIPT)
    arguments = ["--task", TASK, "--debug", "--train.epochs", "8", "--train.batch_size", "8"]
    arguments += ["--run.dir", str(folder / "run"), "--tamiyo.policy", f"script:{folder / 'script.toml'}"]
    return folder / "run", launch(*arguments, *[part for pair in GROWTH.items() for part in pair])


def test_a_user_s_module_grows_into_a_plain_transformer_encoder(
    grown: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, ended = grown
    assert ended.returncode == 0, ended.stderr
    stages = [event["seeds"]["mid"] for event in read_events(run / "events.jsonl", "boundary")]
    assert stages == ["GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "PROBATIONARY",
                      "FOSSILIZED", "FOSSILIZED"]  # fmt: skip
    assert len(list(read_events(run / "events.jsonl", "command_applied"))) == 7
    assert not list(read_events(run / "events.jsonl", "command_refused"))
    assert "Traceback" not in ended.stderr
    assert "user_gate" in ended.stdout


def test_the_grown_model_goes_on_from_its_checkpoint_alone(
    grown: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run, _ = grown
    checkpoint = max((run / "ckpt").glob("c*-s*"))
    arguments = flags(train__epochs="9", run__dir=str(tmp_path / "on"), run__resume=str(checkpoint))
    assert main([*arguments, "--kasmina.slots.mid", SLOT_PATH]) == 0
    (ended,) = read_events(tmp_path / "on" / "events.jsonl", "run_ended")
    assert ended["steps"] == 9 * 5
    (boundary,) = read_events(tmp_path / "on" / "events.jsonl", "boundary")
    assert boundary["seeds"] == {"mid": "FOSSILIZED"}


def test_a_script_of_the_user_trains_with_a_policy_class_of_their_own(tmp_path: Path) -> None:
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run")),
        train=TrainConfig(epochs=8, batch_size=8),
        precision=PrecisionConfig(amp="off"),
        compile=CompileConfig(enabled=False),
        kasmina=KasminaConfig(
            slots={"mid": SLOT_PATH}, blend_steps=5, min_contribution=-10.0, max_loss_ratio=100.0
        ),
        tamiyo=TamiyoConfig(policy="tests.integration.own_policy:Straight", deadline_ms=10_000),
        checkpoint=CheckpointConfig(every=0),
        dist=DistConfig(device="cpu", threads=1),
        log=LogConfig(progress="off"),
    )  # fmt: skip
    summary = train(config, task=make_task)
    assert isinstance(summary, RunSummary)
    assert summary.outcome == "finished"
    assert [(seed.slot, seed.blueprint, seed.stage) for seed in summary.seeds] == [("mid", "user_gate", "FOSSILIZED")]
    assert summary.parameters_end > summary.parameters_start
    first = summary.commands[0]
    assert (first.what, first.reason) == ("germinate mid with user_gate", "there is room")


def test_what_the_api_offers_is_not_hidden_by_a_module_of_the_same_name() -> None:
    import_module("tolaria.build")  # and with it all of the package
    for name in tolaria.__all__:
        assert callable(getattr(tolaria, name)), name


def test_a_function_of_the_script_needs_no_import_path(tmp_path: Path) -> None:
    config = resolve(flags(run__dir=str(tmp_path / "run"), log__progress="off"))
    config = replace(config, task=replace(config.task, factory="never.imported:at_all"))
    assert train(config, task=make_task).outcome == "finished"


# Mistakes


@dataclass(frozen=True)
class Told:
    """How a start ended: its code, and all it wrote to stderr."""

    code: int
    stderr: str


def start(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> Told:
    """`python -m tolaria.launch` in this process. An exception that comes out would be a traceback there."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    return Told(code, capsys.readouterr().err)


def assert_one_line(told: Told, code: int, *words: str) -> None:
    assert told.code == code
    assert told.stderr.startswith("tolaria: ")
    assert told.stderr.count("\n") == 1
    assert told.stderr.endswith("\n")
    for word in words:
        assert word in told.stderr


EXPECTED: dict[str, tuple[str, ...]] = {
    "raises": (TASK, "ValueError", "the file with the samples is not there", "user_task.py, line"),
    "returns_model": (TASK, "returned Classifier", "expected tolaria.Task"),
    "returns_nothing": (TASK, "returned NoneType"),
    "loss_mean": ("the task's loss", "shape ()", "(10,)", 'reduction="none"'),
    "loss_number": ("the task's loss returned float", "one value per sample"),
    "loss_raises": ("RuntimeError", "expected target dtype"),
    "accuracy_mean": ("the task's accuracy", "shape ()", "(10,)"),
    "accuracy_raises": ("validating a batch", "AttributeError", "user_task.py, line"),
    "metric_reserved": ("metric 'loss'",),
    "metric_unsendable": ("metric 'top 5 %'",),
    "metrics_many": ("201 metrics", "at most 200"),
    "slot_nowhere": ("slot 'mid'", "'encoder.layer.0'", "encoder.layers.0"),
    "slot_tuple": ("slot 'mid'", "a tuple", "tensor"),
    "slot_unused": ("slot 'mid'", "nothing passed through"),
    "slot_unsendable": ("slot name 'größe'",),
    "two_slots": ("two slots", "'here'"),
    "frozen": ("no parameter that requires a gradient",),
    "idle_layer": ("idle.weight", "idle.bias", "requires_grad_(False)"),
    "model_mismatch": ("the model", "RuntimeError", "cannot be multiplied"),
    "train_empty": ("training data is empty",),
    "validation_empty": ("validation data is empty",),
    "train_endless": ("training data has no len()", "map-style"),
    "train_broken": ("OSError", "cannot be read", "user_task.py, line"),
    "validation_broken": ("OSError", "sample 1 cannot be read", "user_task.py, line"),
    "collate_tensor": ("collate returned Tensor", "(inputs, targets)"),
    "optimizer_unknown": ("'speed'", "momentum"),
    "optimizer_value": ("optim.lr=-1.0", "more than 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_task_is_told_on_one_line(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    told = start(capsys, flags(run__dir=str(run), task__args__mistake=mistake))
    assert_one_line(told, 2, *EXPECTED[mistake])
    # The record of the run says the same, and nothing was trained.
    (failed,) = read_events(run / "events.jsonl", "run_failed")
    assert failed["error"] == "TaskError"
    assert failed["reason"].split()[-3:] == told.stderr.split()[-3:]
    assert not list(read_events(run / "events.jsonl", "boundary"))
    assert list((run / "ckpt").iterdir()) == []


def test_a_mistake_in_a_loader_process_is_told_on_one_line(tmp_path: Path) -> None:
    ended = launch(*flags(run__dir=str(tmp_path / "run"), task__args__mistake="train_broken", data__num_workers="1"))
    told = Told(ended.returncode, ended.stderr)
    assert_one_line(told, 2, "loading the task's data raised OSError: sample", "cannot be read")
    assert "Traceback" not in told.stderr


def test_a_start_that_failed_does_not_hinder_the_next_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert start(capsys, flags(run__dir=str(run), task__args__mistake="accuracy_mean")).code == 2
    assert start(capsys, flags(run__dir=str(run))).code == 0
    assert len(list((run / "ckpt").iterdir())) == 1


def test_in_debug_mode_the_model_s_error_comes_with_its_stack(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
        main([*flags(run__dir=str(tmp_path / "run"), task__args__mistake="model_mismatch"), "--debug"])
    assert any(entry.name == "forward" for entry in raised.traceback)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("nowhere.at_all:make_task", ("importing nowhere.at_all", "ModuleNotFoundError")),
        ("tests.integration.user_task:make_nothing", ("has no 'make_nothing'",)),
        ("tests.integration.user_task", ("expected package.module:name",)),
        ("tests.integration.user_task:SAMPLES", ("TypeError", "not callable")),
        ("broken_module:make_task", ("importing broken_module", "NameError", "broken_module.py, line 1")),
    ],
)
def test_a_task_that_is_not_there_is_named(
    factory: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "broken_module.py").write_text("make_task = undefined_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = start(capsys, flags(run__dir=str(tmp_path / "run"), task__factory=factory))
    assert_one_line(told, 2, f"task.factory={factory!r}", *words)


def test_an_argument_that_the_task_does_not_take_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = start(capsys, flags(run__dir=str(tmp_path / "run"), task__args__colour="red"))
    assert_one_line(told, 2, TASK, "'colour'")


def test_a_slot_that_the_model_has_already_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = flags(run__dir=str(tmp_path / "run"), task__factory="tests.rig:make_task", kasmina__slots__early="head")
    assert_one_line(start(capsys, arguments), 2, "two slots", "'early'", "'head'")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("nowhere.at_all:Policy", ("nowhere.at_all", "cannot import")),
        ("tests.integration.own_policy:Crooked", ("own_policy", "'Crooked'")),
        ("script:/nowhere/script.toml", ("/nowhere/script.toml", "cannot be read")),
        ("sleepy", ("'sleepy'", "heuristic")),
    ],
)
def test_a_policy_that_cannot_work_is_named(
    policy: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = start(capsys, flags(run__dir=str(tmp_path / "run"), tamiyo__policy=policy))
    assert_one_line(told, 2, *words)


# The command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.learning_rate", "0.1"], ("optim.learning_rate", "name, lr, weight_decay")),
        (["--optim.lr", "fast"], ("optim.lr", "'fast'", "number")),
        (["--train.epochs", "0"], ("train.epochs=0", "1 or more")),
        (["--train.debug", "perhaps"], ("train.debug", "'perhaps'")),
        (["--lr.policy", "spiral"], ("lr.policy", "'spiral'", "cosine")),
        (["--config", "nowhere.toml"], ("nowhere.toml", "cannot read")),
        (["--tamiyo.endpoint", "udp://somewhere"], ("tamiyo.endpoint", "udp://somewhere", "ipc://PATH")),
        (["train"], ("'train'", "--help")),
    ],
)
def test_a_flag_that_is_wrong_is_told_on_one_line(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line(start(capsys, arguments), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.learning_rate", "0.1"], ("optim.learning_rate",)),
        (["--train.epochs", "ten"], ("train.epochs", "'ten'")),
    ],
)
def test_a_wrong_flag_is_answered_before_anything_is_loaded(
    arguments: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    started = time.monotonic()
    ended = launch(*arguments, "--run.root", str(tmp_path / "runs"))
    assert time.monotonic() - started < REFUSED_S
    assert_one_line(Told(ended.returncode, ended.stderr), 2, *words)
    assert ended.stdout == ""
    assert list(tmp_path.iterdir()) == []


# The run directory


@pytest.fixture
def immutable(tmp_path: Path) -> Iterator[Path]:
    """A folder in which even root can make nothing."""
    folder = tmp_path / "locked"
    folder.mkdir()
    if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode != 0:
        pytest.skip("this file system has no immutable folders")
    yield folder
    subprocess.run(["chattr", "-i", folder], check=True)


def test_a_run_directory_below_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    told = start(capsys, flags(run__dir=str(tmp_path / "file" / "run")))
    assert_one_line(told, 73, str(tmp_path / "file" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_directory_that_cannot_be_made_is_refused(immutable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(start(capsys, flags(run__dir=str(immutable / "run"))), 73, str(immutable / "run"))
    assert_one_line(start(capsys, flags(run__root=str(immutable))), 73, str(immutable))
    assert list(immutable.iterdir()) == []


def test_a_folder_with_somebody_s_files_is_not_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert_one_line(start(capsys, flags(run__dir=str(tmp_path))), 73, str(tmp_path), "run.dir")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("what", ["nowhere", "empty"])
def test_a_resume_from_nothing_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    told = start(capsys, flags(run__root=str(tmp_path / "runs"), run__resume=str(tmp_path / what)))
    assert_one_line(told, 73, str(tmp_path / what), "run.resume")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
