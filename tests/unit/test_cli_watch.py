"""What the commands that look at runs print: widths, words, what they never let through, how soon they answer."""

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.seen import copied, moment, recorded, status_document
from tests.torchrun import ROOT
from tolaria.cli.app import main
from tolaria.cli.frame import frame
from tolaria.cli.status import page
from tolaria.view.drawing import draw, scale_of, thinned
from tolaria.view.lookout import View, look
from tolaria.view.ranks import Seen
from tolaria.view.sections import PLAIN_SHARES

COMMANDS = ("logs", "runs", "status", "top", "why")
SIZES = ((80, 24), (160, 50), (60, 16), (100, 30), (233, 61))
NAMES = ("spike", "silent_policy", "restarted", "killed", "failed", "unstable", "slow_rank", "unsaved")


def views(name: str) -> list[View]:
    """A recorded run as it ended, as it began, and with a whole status."""
    first = moment(name, "boundary")
    return [look(recorded(name)), first, moment(name, "boundary", 2, status=status_document())]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_frame_fills_the_terminal_and_never_more(width: int, height: int) -> None:
    for name in NAMES:
        for view in views(name):
            lines = frame(view, width, height, "utf-8", keys="q leaves")
            assert len(lines) == height
            assert max(line.cell_len for line in lines) <= width
            assert view.now.name in lines[0].plain and "loss" in "".join(line.plain for line in lines)


def shown(width: int, height: int) -> str:
    """A frame of a run of a whole status."""
    view = moment("killed", "boundary", 2, status=status_document())
    return "\n".join(line.plain for line in frame(view, width, height, "utf-8"))


SMALL = (
    "digits  running (compute)", "epoch 12 of 36", "step 264 of 792", "42 s to go", "0.4286", "85.3%", "normal",
    "15.2 k samples/s", "rank 1", "own 3.9", "data 0.3", "blending 0.55", "c1-s132",
)  # fmt: skip
LARGE = (*SMALL, "Happened", "compute, 31 s", "seed/early", "dormant", "612 MB")


def test_a_frame_has_everything_that_matters() -> None:
    assert [word for word in SMALL if word not in shown(80, 24)] == []
    assert [word for word in LARGE if word not in shown(160, 50)] == []


@pytest.mark.parametrize("width", [80, 160])
def test_a_status_is_as_wide_as_the_terminal_at_most(width: int) -> None:
    for name in NAMES:
        for view in views(name):
            lines = page(view, width, "utf-8")
            assert max(line.cell_len for line in lines) <= width, name
            assert lines[0].plain.startswith(f"{view.now.name}  {view.now.state}")


def test_a_terminal_of_few_characters_gets_those_only() -> None:
    view = moment("spike", "boundary", 8, status=status_document())
    lines = [*frame(view, 80, 24, "ascii", plain=True), *page(view, 80, "ascii", plain=True)]
    assert all(line.plain.isascii() for line in lines)
    assert any(PLAIN_SHARES[0] in line.plain for line in lines)


def test_foreign_text_steers_no_terminal_and_no_markup() -> None:
    hostile = "\x1b[31mred\x1b]0;title\x07 [bold]x[/bold]\nnext"
    status = status_document(
        name=hostile, activity=hostile, mode={"conservative": True, "reason": hostile},
        seeds=[{"slot": hostile, "stage": hostile, "blueprint": hostile}], lr={hostile: 0.1}, goodput={hostile: 3.0},
    )  # fmt: skip
    view = moment("killed", "boundary", 2, status=status, seen=Seen(ranks=(), level=3, reason=hostile))
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=80, markup=False)
    for line in [*frame(view, 80, 24, "utf-8"), *page(view, 80, "utf-8")]:
        console.print(line, no_wrap=True, crop=False, overflow="ignore")
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    assert "[bold]x[/bold]" in out.getvalue()


def test_a_curve_lies_where_its_values_are() -> None:
    lines = draw([(0.0, 0.0), (100.0, 1.0)], [], width=29, height=6, plain=True, label="gain")
    assert len(lines) == 6 and all(len(line) <= 29 for line in lines)
    assert lines[0].rstrip().endswith(".") and lines[4][9] == "." and "gain" in lines[5]
    assert lines[0].startswith(" 1.0000") and lines[4].startswith(" 0.0000")
    marked = draw([], [(0.0, 1.0), (10.0, 2.0)], width=29, height=6)
    assert marked[4][9] == "o" and marked[0].rstrip()[-1] == "o"
    assert "nothing told yet" in "".join(draw([], [(0.0, float("nan"))], width=29, height=6, label="loss"))
    assert scale_of([0.001, 10.0]).logarithmic and not scale_of([-1.0, 10.0]).logarithmic
    assert scale_of([3.0, 3.0]).place(3.0) == pytest.approx(0.5)


def test_a_thinned_curve_keeps_its_spikes() -> None:
    points = [(float(n), 50.0 if n == 777 else 1.0) for n in range(10_000)]
    kept = thinned(points, 100)
    assert len(kept) <= 102 and (777.0, 50.0) in kept
    assert thinned(points[:50], 100) == points[:50]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_fits_80_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert "Examples" in told and f"tolaria {command}" in told and "--json" in told
    assert all(len(line.rstrip()) <= 80 for line in told.splitlines())


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "runs"])
def test_what_is_no_run_is_one_line_and_code_73(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "none")]) == 73
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and "no such directory" in told.err


def test_wrong_words_are_told_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(copied("spike", tmp_path))
    for words in (["why", run, "nonsense"], ["logs", run, "--level", "loud"], ["why", run, "--command", "nobody"]):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert "expected" in told or "no such command" in " ".join(told.replace("│", " ").split())


def test_every_command_prints_json_that_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        run = str(copied(name, tmp_path))
        for words in (["status", run], ["top", run], ["why", run], ["why", run, "went-back"], ["runs", str(tmp_path)]):
            assert main([*words, "--json"]) == 0
            json.loads(capsys.readouterr().out)
        assert main(["logs", run, "--json"]) == 0
        assert all(isinstance(json.loads(line), dict) for line in capsys.readouterr().out.splitlines())


def test_logs_wrap_below_the_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["logs", str(copied("unstable", tmp_path)), "--level", "error"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("ERROR: incident (non finite): loss or gradient not" in line for line in lines)
    assert any(line.startswith(" " * 24) and line.strip() for line in lines)


@pytest.mark.processes
@pytest.mark.parametrize("words", [["status"], ["why"], ["top", "--once"], ["logs"]])
def test_a_command_answers_at_once_and_without_torch(words: list[str], tmp_path: Path) -> None:
    run = copied("spike", tmp_path)
    code = (
        "import sys\nfrom tolaria.cli.app import main\n"
        f"code = main({[words[0], str(run), *words[1:]]!r})\n"
        "assert code == 0\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Processor time: what else the machine does is not the command's. Torch alone takes two seconds.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
