"""What a person types and reads: help that fits a terminal, mistakes in one line, refusals with a way on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tolaria.cli import send as module
from tolaria.cli.app import main
from tolaria.orders.words import Order, Outcome, encode_order

WORDS = ("lr", "seed", "rollback", "conservative", "pause", "resume", "checkpoint", "stop", "emergency")


@pytest.mark.parametrize("words", [["send"], ["undo"], *(["send", "RUN", word] for word in WORDS)])
def test_help_fits_80_columns_and_shows_how_it_is_used(words: list[str]) -> None:
    command = [sys.executable, "-m", "tolaria.cli.app", *words, "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    )
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "") and max(map(len, lines)) <= 80
    assert any(line.strip().startswith("Usage: tolaria ") for line in lines)
    examples = [line.strip() for line in lines if line.strip().startswith(f"tolaria {words[0]} runs/RUN")]
    assert examples and all(words[-1] in line or words == ["send"] for line in examples)


@pytest.mark.parametrize(("words", "says"), [
    (["send", "RUN"], "Missing command"),
    (["send", "RUN", "dance"], "No such command"),
    (["send", "RUN", "lr"], "one of them"),
    (["send", "RUN", "lr", "--scale", "2", "--set", "1"], "one of them"),
    (["send", "RUN", "lr", "--scale", "nan"], "finite number"),
    (["send", "RUN", "lr", "--scale", "2", "--groups", "a b"], "shell pattern"),
    (["send", "RUN", "seed", "fly", "--slot", "a"], "expected one of germinate"),
    (["send", "RUN", "seed", "germinate", "--slot", "a"], "germinate needs --blueprint"),
    (["send", "RUN", "seed", "cull", "--slot", "a", "--blueprint", "b"], "nothing else takes one"),
    (["send", "RUN", "rollback"], "--to"),
    (["send", "RUN", "rollback", "--to", "step:x"], "good or step:N"),
    (["send", "RUN", "conservative", "maybe"], "on or off"),
    (["send", "RUN", "emergency", "9"], "expected one of notice"),
    (["send", "RUN", "pause", "--reason", "x" * 200], "128 printable"),
    (["send", "RUN", "pause", "--wait", "0"], "--wait"),
    (["undo", "RUN", "--what"], "No such option"),
])  # fmt: skip
def test_a_mistake_is_named_and_ends_with_2(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Listening:
        @classmethod
        def of(cls, *_: Any, **__: Any) -> "Listening":
            return cls()

        def send(self, order: Order, **_: Any) -> Outcome:
            encode_order(order)
            raise AssertionError("was sent")

    monkeypatch.setattr(module, "RunClient", Listening)
    assert main([str(tmp_path) if word == "RUN" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said


def test_where_nobody_takes_orders_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["send", str(tmp_path), "pause"]) == 75
    said = capsys.readouterr().err
    assert said.startswith(f"tolaria: {tmp_path}: no run there takes orders") and said.count("\n") == 1


@pytest.mark.parametrize(("outcome", "code", "says"), [
    (
        Outcome(order_id="0" * 32, state="applied", act=4, step=1204, ranks=2, digest="ab" * 32,
                details={"what": "host*: lr x0.5", "checkpoint": "c3"}),
        0, ["applied after step 1,204 on 2 ranks: host*: lr x0.5", "checkpoint c3", "act 4 in the log", "abab"],
    ),
    (Outcome(order_id="0" * 32, state="checked", step=9, ranks=1), 0, ["would be applied on 1 rank", "step 9"]),
    (
        Outcome(order_id="0" * 32, state="refused", code="paused", reason="the run stands still\x1b[2J"), 1,
        ["refused (paused): the run stands still", "try: tolaria send RUN resume"],
    ),
    (
        Outcome(order_id="0" * 32, state="refused", code="vote", reason="why [red]", act=3, step=7, ranks=2), 1,
        ["why [red]", "nothing was changed on 2 ranks; act 3 in the log, after step 7"],
    ),
])  # fmt: skip
def test_what_became_of_it_is_said_in_plain_words(
    outcome: Outcome, code: int, says: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Answering:
        @classmethod
        def of(cls, *_: Any, **__: Any) -> "Answering":
            return cls()

        def send(self, order: Order, **_: Any) -> Outcome:
            return outcome

    monkeypatch.setattr(module, "RunClient", Answering)
    assert main(["send", "RUN", "resume"]) == code
    said = capsys.readouterr().out
    assert all(word in said for word in says), said
    assert "\x1b" not in said
