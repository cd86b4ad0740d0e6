"""The command line and config files: what is accepted, what is refused, and how it is said."""

import subprocess
import sys
import time
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.config import Config, KasminaConfig, RunConfig, TaskConfig, TrainConfig
from tolaria.errors import ConfigError
from tolaria.options import parse, resolve, to_toml

ALONE: dict[str, str] = {}


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_no_arguments_give_the_defaults() -> None:
    assert resolve([], ALONE) == Config()


@pytest.mark.parametrize(
    ("argv", "section", "key", "expected"),
    [
        (["--train.epochs", "7"], "train", "epochs", 7),
        (["--train.epochs=7"], "train", "epochs", 7),
        (["--train.epochs", "7", "--train.epochs", "9"], "train", "epochs", 9),
        (["--optim.lr", "1e-2"], "optim", "lr", 0.01),
        (["--optim.lr", "1"], "optim", "lr", 1.0),
        (["--compile.enabled", "false"], "compile", "enabled", False),
        (["--kasmina.freeze_fossilized"], "kasmina", "freeze_fossilized", True),
        (["--precision.amp", "off"], "precision", "amp", "off"),
        (["--run.dir", "/tmp/ü b"], "run", "dir", "/tmp/ü b"),
        (["--task", "a.b:c"], "task", "factory", "a.b:c"),
        (["--task.factory", "a.b:c"], "task", "factory", "a.b:c"),
        (["--resume", "auto"], "run", "resume", "auto"),
        (["--kasmina.slots.a", "blocks.3"], "kasmina", "slots", {"a": "blocks.3"}),
        (["--kasmina.slots.a=4"], "kasmina", "slots", {"a": "4"}),
    ],
)
def test_a_flag_sets_its_key(argv: list[str], section: str, key: str, expected: object) -> None:
    value = getattr(getattr(resolve(argv, ALONE), section), key)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", 4), ("-4", -4), ("0.5", 0.5), ("1e-3", 0.001), ("true", True), ("conv", "conv"), ('"4"', "4"), ("", ""),
        ("a b", "a b"), ("[1]", "[1]"), ("1\nx = 2", "1\nx = 2"), ("2026-01-01", "2026-01-01"),
    ],
)  # fmt: skip
def test_entries_of_a_mapping_get_the_type_they_look_like(text: str, expected: object) -> None:
    value = resolve([f"--task.args.x={text}", "--task.args.other", "1"], ALONE).task.args["x"]
    assert (value, type(value)) == (expected, type(expected))


def test_an_entry_may_have_the_name_that_the_help_text_uses() -> None:
    assert resolve(["--task.args.NAME", "1"], ALONE).task.args == {"NAME": 1}


def test_every_key_is_a_flag() -> None:
    """Each key, set to its default by flag, is accepted and changes nothing."""
    for section, section_type in get_type_hints(Config).items():
        for item in fields(section_type):
            default = getattr(getattr(Config(), section), item.name)
            if not isinstance(default, dict):
                assert resolve([f"--{section}.{item.name}={default}"], ALONE) == Config()


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", "[train]\nepochs = 3\nbatch_size = 8\n[task.args]\nwidth = 2\ndepth = 1\n")
    config = resolve(["--train.epochs", "5", "--config", file, "--task.args.width", "4"], ALONE)
    assert (config.train.epochs, config.train.batch_size, config.train.accumulation) == (5, 8, 1)
    assert config.task.args == {"width": 4, "depth": 1}


def test_a_whole_number_in_the_file_is_accepted_for_a_number(tmp_path: Path) -> None:
    lr = resolve(["--config", write(tmp_path / "a.toml", "[optim]\nlr = 1\n")], ALONE).optim.lr
    assert (lr, type(lr)) == (1.0, float)


BAD_FLAGS = [
    (["--train.epochs", "abc"], ["train.epochs", "'abc'", "whole number"]),
    (["--train.epochs", "1.5"], ["train.epochs", "'1.5'", "whole number"]),
    (["--train.epochs", "0"], ["train.epochs", "0", "1 or more"]),
    (["--train.epochs"], ["train.epochs", "expected one argument"]),
    (["--optim.lr", "nan"], ["optim.lr", "'nan'", "finite number"]),
    (["--optim.lr", "inf"], ["optim.lr", "'inf'", "finite number"]),
    (["--optim.lr=-1"], ["optim.lr", "-1", "more than 0"]),
    (["--optim.name", "adamm"], ["optim.name", "'adamm'", "adamw, adam, sgd, rmsprop", "package.module:Class"]),
    (["--optim.name", "torch.optim:"], ["optim.name", "'torch.optim:'", "package.module:Class"]),
    (["--compile.enabled", "maybe"], ["compile.enabled", "'maybe'", "true or false"]),
    (["--train.epoch", "3"], ["train.epoch", "'3'", "did you mean train.epochs?"]),
    (["--trian.epochs=3"], ["trian.epochs", "'3'", "did you mean train.epochs?"]),
    (["--batch-size", "4"], ["batch-size", "'4'", "did you mean train.batch_size?"]),
    (["--train.lr", "4"], ["train.lr", "did you mean optim.lr?"]),
    (["--log.zzz", "4"], ["log.zzz", "[log] accepts interval_steps, progress"]),
    (["--zzz", "4"], ["zzz", "'4'", "the sections are run, task, train"]),
    (["--task.args", "4"], ["task.args", "'4'", "--task.args.NAME VALUE"]),
    (["--task.args.", "4"], ["task.args.", "no such key"]),
    (["--task.args.x", "nan"], ["task.args.x", "nan", "finite number or text"]),
    (["train.epochs=3"], ["'train.epochs=3'", "expected flags only"]),
    (["--run.name", "a\nb"], ["run.name", r"'a\nb'", "expected"]),
    (["--run.root", "\udcff"], [r"\udcff", "UTF-8"]),
    (["--optim.lr", "y" * 5000], ["optim.lr", "yyy..."]),
    (["--tamiyo.deadline_ms", "300000"], ["tamiyo.deadline_ms", "300000", "dist.control_timeout_s"]),
    (["--debug", "--compile.enabled"], ["compile.enabled", "true", "train.debug"]),
]


@pytest.mark.parametrize(("argv", "parts"), BAD_FLAGS)
def test_a_bad_flag_is_one_line_on_stderr_and_exit_2(
    argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(argv)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.endswith("\n") and err.count("\n") == 1 and len(err) < 300
    assert all(part.lower() in err.lower() for part in parts), err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[train]\nepochs = '3'\n", ["train.epochs='3'", "whole number"]),
        ("[train]\nepochs = 3.0\n", ["train.epochs=3.0", "whole number"]),
        ("[train]\nepochs = true\n", ["train.epochs=True", "whole number"]),
        ("[optim]\nlr = true\n", ["optim.lr=True", "number"]),
        ("[compile]\nenabled = 1\n", ["compile.enabled=1", "true or false"]),
        ("[optim]\nlr = nan\n", ["optim.lr=nan", "finite"]),
        ("[train]\nepoch = 3\n", ["train.epoch=3", "did you mean train.epochs?"]),
        ("[trian]\nepochs = 3\n", ["trian=", "no such key", "sections are"]),
        ("epochs = 3\n", ["epochs=3", "did you mean train.epochs?"]),
        ("train = 3\n", ["train=3", "expected a table, [train]"]),
        ("[task]\nargs = 3\n", ["task.args=3", "a table of true, false"]),
        ("[task.args]\nx = [1]\n", ["task.args.x=[1]", "finite number or text"]),
        ("[kasmina.slots]\na = 1\n", ["kasmina.slots.a=1", "text"]),
        ("[train\n", ["not valid TOML", "line 1"]),
        ("[train]\nepochs = 1\nepochs = 2\n", ["not valid TOML"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_key_and_value(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = write(tmp_path / "run.toml", text)
    with pytest.raises(ConfigError) as refused:
        resolve(["--config", file], ALONE)
    message = str(refused.value)
    assert file in message and "\n" not in message
    assert all(part in message for part in parts), message


CONFIGS = sorted((Path(__file__).parents[2] / "launch" / "configs").glob("*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_the_configs_that_come_with_tolaria_are_accepted(file: Path) -> None:
    assert resolve(["--config", str(file)], ALONE) != Config()


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin1.toml").write_bytes(b"[run]\nname = '\xfc'\n")
    for path, reason in [("absent.toml", "No such file"), (".", "directory"), ("latin1.toml", "not valid TOML")]:
        with pytest.raises(ConfigError, match=reason) as refused:
            resolve(["--config", str(tmp_path / path)], ALONE)
        assert "\n" not in str(refused.value)


def test_debug_runs_eager_even_if_the_file_says_compile(tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", "[compile]\nenabled = true\n")
    config = resolve(["--config", file, "--debug"], ALONE)
    assert (config.train.debug, config.compile.enabled) == (True, False)
    assert resolve(["--debug", "false"], ALONE).compile.enabled


def test_debug_in_the_file_contradicts_compile_in_the_same_file(tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", "[compile]\nenabled = true\n[train]\ndebug = true\n")
    with pytest.raises(ConfigError, match=r"compile\.enabled=True: expected false"):
        resolve(["--config", file], ALONE)


@pytest.mark.parametrize("further", [["--precision.amp", "fp16"], ["--train.debug", "true"]])
def test_a_compiled_optimizer_step_is_refused_where_it_can_not_be(further: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"optim\.compile_step=True: expected False with precision\.amp=fp16"):
        resolve(["--optim.compile_step", *further], ALONE)


def test_groups_are_given_policies_by_patterns_also_in_the_file_that_is_written() -> None:
    config = resolve(["--lr.group_policies.seed/early", "wsd", "--lr.group_policies.seed/*", "frozen"], ALONE)
    assert list(config.lr.group_policies.items()) == [("seed/early", "wsd"), ("seed/*", "frozen")]
    written = tomllib.loads(to_toml(config))
    assert list(written["lr"]["group_policies"].items()) == [("seed/early", "wsd"), ("seed/*", "frozen")]


def test_debug_is_refused_with_more_than_one_process() -> None:
    assert resolve(["--debug"], {"WORLD_SIZE": "1"}).train.debug
    with pytest.raises(ConfigError, match=r"train\.debug=True: expected one process.*WORLD_SIZE=2"):
        resolve(["--debug"], {"WORLD_SIZE": "2"})


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALAR = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT


@settings(max_examples=60, deadline=None)
@given(
    args=st.dictionaries(TEXT, SCALAR, max_size=4), slots=st.dictionaries(TEXT, TEXT, max_size=3),
    root=TEXT, lr=st.floats(1e-300, 100), epochs=st.integers(1, 10**12), debug=st.booleans(),
)  # fmt: skip
def test_to_toml_gives_an_equal_config_back(
    args: dict[str, bool | int | float | str], slots: dict[str, str], root: str, lr: float, epochs: int, debug: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    base = resolve(["--debug", str(debug)], ALONE)
    config = replace(
        base, task=TaskConfig(args=args), kasmina=KasminaConfig(slots=slots), run=RunConfig(root=root),
        optim=replace(base.optim, lr=lr), train=TrainConfig(epochs=epochs, debug=debug),
    )  # fmt: skip
    text = to_toml(config)
    tomllib.loads(text)
    file = write(tmp_path_factory.mktemp("toml") / "config.toml", text)
    assert resolve(["--config", file], ALONE) == config


def test_help_names_every_key_with_its_default_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for section, section_type in get_type_hints(Config).items():
        assert f"\n{section}:\n" in out
        for item in fields(section_type):
            assert f"--{section}.{item.name}" in out
            default = getattr(getattr(Config(), section), item.name)
            shown = "none" if isinstance(default, dict) else str(default).lower() if default != "" else "empty"
            assert f"{item.metadata['help']} [" in words and f"[{shown}]".lower() in words.lower()


def test_a_bad_flag_is_answered_at_once_and_without_torch() -> None:
    program = (
        "import sys\nfrom tolaria.options import parse\n"
        "try:\n    parse(['--nope', '1'])\n"
        "finally:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - start < 3
