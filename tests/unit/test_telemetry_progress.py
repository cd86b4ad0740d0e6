import errno
import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.telemetry.progress import HEADER, BoundaryRow, Progress, SeedCell, StartInfo, StepInfo
from tolaria.telemetry.summary import CommandRecord, RunSummary, Score
from tolaria.telemetry.words import counted, duration, number, percent, printable, short_duration

ROW = BoundaryRow(
    epoch=3, step=126, train_loss=0.5012, val_loss=0.4321, val_accuracy=0.8834, lr=0.01, seconds=0.94, checkpoint="c3"
)
STEP = StepInfo(epoch=3, epochs=25, epoch_step=7, epoch_steps=42, loss=0.5, lr=0.01, rate=4312.0)
SUMMARY = RunSummary(
    outcome="finished", name="digits", run_id="ab", run_dir="runs/x", seed=0, epochs=25, steps=1050, seconds=101.7,
    world_size=2, device="cpu", final=Score(step=1050, epoch=25, loss=0.12, accuracy=0.9578), best=None,
    before_growth=Score(step=420, epoch=10, loss=0.41, accuracy=0.8832), parameters_start=358, parameters_end=2762,
    commands=[CommandRecord(step=420, boundary=10, command_id="c", what="germinate early", reason="word " * 40)],
    checkpoint="runs/x/ckpt/c000025-s1050", resume="python -m tolaria.launch --run.resume runs/x " + "--flag " * 20,
    state_digest={0: "aa" * 32, 1: "aa" * 32},
)  # fmt: skip


def shown(draw: Callable[[Progress], None], width: int = 80) -> list[str]:
    """What a plain output of ``width`` columns shows."""
    file = io.StringIO()
    progress = Progress("plain", file=file, width=width)
    draw(progress)
    progress.close()
    return file.getvalue().splitlines()


def read_all(descriptor: int) -> str:
    """Everything that waits in a pseudo-terminal whose other end is closed; Linux then ends it with EIO."""
    received = b""
    while True:
        try:
            received += os.read(descriptor, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return received.decode()


def seen_on_terminal(draw: Callable[[Progress], None], **environ: str) -> str:
    """All that a pseudo-terminal receives."""
    ours, theirs = pty.openpty()
    try:
        with os.fdopen(theirs, "w", encoding="utf-8") as file:
            now = [0.0]

            def clock() -> float:
                now[0] += 0.06
                return now[0]

            progress = Progress("auto", file=file, environ={"TERM": "xterm", **environ}, width=80, clock=clock)
            draw(progress)
            progress.close()
        return read_all(ours)
    finally:
        os.close(ours)


def test_a_row_stands_under_its_header() -> None:
    header, row = shown(lambda p: p.boundary(ROW))
    assert header == HEADER
    assert row == "    3    126  0.5012  0.4321   88.3%  1.0e-02    0.9s  c3"
    for name, text in (("acc", "88.3%"), ("lr", "1.0e-02"), ("time", "0.9s"), ("step", "126")):
        assert header.index(name) + len(name) == row.index(text) + len(text)
    assert header.index("ckpt") == row.index("c3")


def test_values_that_were_not_measured_are_dashes() -> None:
    row = shown(lambda p: p.boundary(replace(ROW, train_loss=None, val_loss=None, val_accuracy=None)))[1]
    assert row.split()[2:5] == ["-", "-", "-"]


def test_the_header_comes_once_and_again_after_many_rows() -> None:
    def draw(progress: Progress) -> None:
        for _ in range(41):
            progress.boundary(ROW)

    lines = shown(draw)
    assert [index for index, line in enumerate(lines) if line == HEADER] == [0, 41]


def test_a_growing_seed_is_shown_with_stage_and_alpha() -> None:
    seeds = [SeedCell(slot="early", stage="DORMANT"), SeedCell(slot="late", stage="BLENDING", alpha=0.347)]
    lines = shown(lambda p: p.boundary(replace(ROW, seeds=seeds)))
    assert lines[0].index("seeds") == lines[1].index("late blending 0.35")
    assert "early" not in lines[1]


def test_what_is_grown_for_good_is_shown_when_nothing_else_moves() -> None:
    grown = SeedCell(slot="late", stage="FOSSILIZED", alpha=1.0)
    moving = SeedCell(slot="early", stage="TRAINING")
    assert shown(lambda p: p.boundary(replace(ROW, seeds=[grown])))[1].endswith("late fossilized")
    assert shown(lambda p: p.boundary(replace(ROW, seeds=[grown, moving])))[1].endswith("c3    early training")


def test_several_grown_for_good_are_counted() -> None:
    grown = [SeedCell(slot=name, stage="FOSSILIZED", alpha=1.0) for name in ("early", "late")]
    lines = shown(lambda p: p.boundary(replace(ROW, seeds=grown)))
    assert len(lines) == 2
    assert lines[1].endswith("c3    2 fossilized")


def test_long_names_of_metrics_keep_the_summary_aligned() -> None:
    final = Score(step=1, epoch=1, loss=1.0, accuracy=0.5, metrics={"bits_per_byte": 1.5})
    lines = shown(lambda p: p.summary(replace(SUMMARY, final=final)))
    starts = {line.index(text) for line in lines for text in ("88.3%", "1.5", "2,762") if text in line}
    assert starts == {17}


def test_several_seeds_wrap_under_their_column() -> None:
    seeds = [SeedCell(slot=f"slot{n}", stage="PROBATIONARY") for n in range(3)]
    lines = shown(lambda p: p.boundary(replace(ROW, seeds=seeds)))
    column = HEADER.index("seeds")
    assert [line[column:] for line in lines[1:]] == [
        "slot0 probationary,", "slot1 probationary,", "slot2 probationary",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80
    assert len(shown(lambda p: p.boundary(replace(ROW, seeds=seeds)), width=120)) == 2


def test_two_blending_seeds_fit_the_terminal() -> None:
    seeds = [SeedCell(slot=name, stage="BLENDING", alpha=0.5) for name in ("early", "late")]
    lines = shown(lambda p: p.boundary(replace(ROW, seeds=seeds)))
    assert max(map(len, lines)) <= 80
    assert [line[HEADER.index("seeds") :] for line in lines[-2:]] == ["early blending 0.50", "late blending 0.50"]


def test_a_change_of_mode_is_told_and_conservative_mode_stays_visible() -> None:
    def draw(progress: Progress) -> None:
        for mode in ("normal", "conservative", "conservative", "normal"):
            progress.boundary(replace(ROW, mode=mode))

    lines = [line for line in shown(draw) if line != HEADER]
    assert [" ".join(line.split()) for line in lines if "from here on" in line] == [
        "mode conservative from here on", "mode normal from here on",
    ]  # fmt: skip
    assert sum(line.endswith("c3    conservative") for line in lines) == 2


def test_notes_wrap_with_their_label_in_front() -> None:
    lines = shown(lambda p: p.note("germinate late: " + "validation loss is flat " * 6, label="tamiyo"))
    assert len(lines) == 3
    assert lines[0].startswith("      tamiyo      germinate late:")
    assert all(re.match(" {18}[a-z]", line) for line in lines[1:])
    assert max(map(len, lines)) <= 80


def test_the_head_lists_what_runs() -> None:
    lines = shown(lambda p: p.start(StartInfo(title="tolaria: digits", lines=[("ranks", "2 on cpu")])))
    assert lines == ["tolaria: digits", "  ranks       2 on cpu", ""]


def test_plain_output_has_no_escapes_and_no_overwritten_line() -> None:
    def draw(progress: Progress) -> None:
        progress.status("compiling")
        progress.step(STEP)
        assert not progress.step_due()
        progress.note("careful", level="error")
        progress.summary(SUMMARY)

    text = "\n".join(shown(draw))
    assert "\x1b" not in text
    assert "\r" not in text
    assert "compiling" not in text
    assert "careful" in text


def test_text_from_outside_cannot_steer_the_terminal() -> None:
    hostile = "ok\x1b[2J\x07\x9b31m\r\nfake row [bold]x[/bold] :smile:"
    text = seen_on_terminal(lambda p: p.note(hostile, label="evil\x1b]0;t\x07"), NO_COLOR="1")
    assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)
    assert "fake row [bold]x[/bold] :smile:" in text
    assert len(text.splitlines()) == 1


def test_text_that_the_output_cannot_encode_is_replaced() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Progress("plain", file=file, width=80).note("größer — 数字", label="tamiyo")
    file.flush()
    assert raw.getvalue().decode("ascii").split() == ["tamiyo", "gr??er", "?", "??"]


def test_a_terminal_gets_a_line_that_is_taken_away_again() -> None:
    def draw(progress: Progress) -> None:
        progress.step(STEP)
        progress.boundary(ROW)

    text = seen_on_terminal(draw)
    before, erase, after = text.partition("\r\x1b[2K")
    assert "epoch 3/25  step 7/42  loss 0.5000  lr 1.0e-02  4,312 samples/s  normal" in before
    assert erase
    assert "\n" not in before
    assert "88.3%" in after
    assert "\x1b[2K" not in after


def test_the_overwritten_line_is_rate_limited_and_fits() -> None:
    drawn = []

    def draw(progress: Progress) -> None:
        for _ in range(10):  # the clock advances 0.06 s per look
            if progress.step_due():
                progress.status("x" * 500)
                drawn.append(1)

    text = seen_on_terminal(draw)
    assert 3 <= len(drawn) <= 6
    assert text.count("x" * 79) == len(drawn)
    assert "x" * 80 not in text


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_and_dumb_terminals_get_plain_text(environ: dict[str, str]) -> None:
    def draw(progress: Progress) -> None:
        progress.step(STEP)
        progress.boundary(ROW)

    text = seen_on_terminal(draw, **environ)
    assert "\x1b" not in text
    assert "step 7/42" not in text
    assert "88.3%" in text


def test_off_writes_nothing() -> None:
    file = io.StringIO()
    progress = Progress("off", file=file)
    progress.start(StartInfo(title="t"))
    progress.boundary(ROW)
    progress.note("n")
    progress.summary(SUMMARY)
    progress.close()
    assert file.getvalue() == ""


def test_the_summary_fits_but_never_breaks_what_is_copied() -> None:
    lines = shown(lambda p: p.summary(SUMMARY))
    assert any("88.3% before growth, 95.8% at the end (+7.5 points)" in line for line in lines)
    assert any(line.endswith(SUMMARY.resume.strip()) for line in map(str.rstrip, lines))
    assert all(len(line) <= 80 for line in lines if "resume" not in line)
    assert any("equal on 2 ranks" in line for line in lines)
    assert [line for line in lines if line and not line.startswith(" ")][1:] == ["Commands", "Files"]


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    script = """
import sys
from tolaria.telemetry.progress import Progress
progress = Progress("auto")
for n in range(2000):
    progress.note(f"note {n} " + "x" * 60)
progress.close()
print("still printing")
sys.stderr.write("finished\\n")
"""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )
    assert run.stdout is not None
    assert run.stdout.readline().split()[:2] == ["note", "0"]
    run.stdout.close()
    run.stdout = None
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert errors.count("progress output stopped") == 1
    assert errors.endswith("finished\n")


@given(st.floats(min_value=0, max_value=1e99))
def test_a_loss_takes_six_characters_at_most(value: float) -> None:
    assert len(number(value)) <= 6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0.12345, "0.1235"), (9.99999, "10.000"), (12.3456, "12.346"), (123.456, "123.46"),
        (12345.6, "1e+04"), (float("nan"), "nan"), (float("inf"), "inf"), (-0.25, "-0.2500"),
    ],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@given(st.floats(min_value=0, max_value=99 * 3600))
def test_a_short_duration_takes_six_characters_at_most(seconds: float) -> None:
    assert len(short_duration(seconds)) <= 6


@pytest.mark.parametrize(
    ("seconds", "short", "long"),
    [
        (0.84, "0.8s", "0.8 s"), (9.97, "10.0s", "10 s"), (59.6, "59.6s", "1 min 0 s"), (102, "102s", "1 min 42 s"),
        (1000, "16m40s", "16 min 40 s"), (11220, "3h07m", "3 h 7 min"),
    ],
)  # fmt: skip
def test_durations(seconds: float, short: str, long: str) -> None:
    assert (short_duration(seconds), duration(seconds)) == (short, long)


def test_small_words() -> None:
    assert (percent(0.9345), percent(1.0), percent(None)) == ("93.5%", "100.0%", "-")
    assert (counted(1, "step"), counted(12000, "step")) == ("1 step", "12,000 steps")
    assert printable("a\tb\u202ec", "utf-8") == "a b c"


def test_the_default_clock_and_output_are_real(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.boundary(replace(ROW, seconds=time.monotonic() * 0))
    progress.close()
    assert "88.3%" in capsys.readouterr().out
