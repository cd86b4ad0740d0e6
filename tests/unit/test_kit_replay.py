"""`tolaria policy replay`: a recorded run asked again, boundary by boundary, of another policy."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.handshake_run import EPOCHS, Ran, run, run_config
from tolaria.cli.app import main
from tolaria.kit.replay import Compared, replay, summarise
from tolaria.tamiyo.line import KEYS_NAME
from tolaria.view.frames import read_keys

SCRIPT = """
command = [
    { boundary = 2, op = "germinate", slot = "early", blueprint = "low_rank" },
    { boundary = 5, op = "scale_lr", group = "host", factor = 0.5 },
]
"""
OTHER = """
command = [
    { boundary = 2, op = "germinate", slot = "early", blueprint = "low_rank" },
    { boundary = 4, op = "start_training", slot = "early" },
    { boundary = 5, op = "scale_lr", group = "host", factor = 0.5, reason = "the reason is no part of what is done" },
]
"""

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("replayed")
    (folder / "script.toml").write_text(SCRIPT)
    return run(run_config(folder / "run", policy=f"script:{folder / 'script.toml'}", deadline_ms=5000))


def replayed(ran: Ran, spec: str, **args: Any) -> list[Compared]:
    return list(replay(ran.folder, read_keys(ran.folder), spec, args, deadline_ms=5000))


def test_the_policy_that_acted_agrees_with_itself(ran: Ran) -> None:
    rows = replayed(ran, f"script:{ran.folder.parent / 'script.toml'}")
    assert [(row.boundary, row.step) for row in rows] == [(b, 6 * b) for b in range(1, EPOCHS + 1)]
    assert all(row.agrees and row.commanded == row.would for row in rows)
    found = summarise(rows)
    assert (found.compared, found.agreed, found.commanded, found.first_difference) == (EPOCHS, EPOCHS, 2, None)


def test_the_differences_of_another_are_shown_with_what_they_mean(
    ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "other.toml").write_text(OTHER)
    command = ["policy", "replay", str(ran.folder), f"script:{tmp_path / 'other.toml'}"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "  boundary    2  commanded   germinate early with low_rank\n"
        "! boundary    4  commanded   nothing\n"
        "                 would have  start training early\n"
        "  boundary    5  commanded   host: lr x0.5\n\n"
        "Agreed at 8 of 9 boundaries; the run's policy commanded at 2, this one at 3.\n"
        "From boundary 4 on the states are those of the course that the run took"
    )
    assert max(map(len, shown.splitlines())) <= 80
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["first_difference"] == 4
    assert [row["boundary"] for row in found["boundaries"] if not row["agrees"]] == [4]


def test_a_policy_that_falls_ends_the_replay_and_says_where(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "replay", str(ran.folder), "tests.faults.own_policies:Falling"]) == 1
    assert "? boundary    2  commanded   germinate early" in (shown := capsys.readouterr().out)
    assert "its process ended with code 3" in shown
    assert main(["policy", "replay", str(ran.folder), "tests.unit.bad_policies:Raising", "--json"]) == 0
    capsys.readouterr()


def test_what_cannot_be_replayed_is_named(ran: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "replay", str(tmp_path), "noop"]) == 73
    assert "not a run directory" in capsys.readouterr().err
    (tmp_path / "events.jsonl").touch()
    assert main(["policy", "replay", str(tmp_path), "noop"]) == 73
    assert "holds no record of its policy" in capsys.readouterr().err
    assert main(["policy", "replay", str(ran.folder), "nonsense"]) == 2
    assert "expected heuristic, noop" in capsys.readouterr().err


def test_without_the_key_it_is_said_that_nothing_was_verified(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    key = ran.folder / KEYS_NAME
    hidden = key.rename(key.with_suffix(".hidden"))
    try:
        assert main(["policy", "replay", str(ran.folder), "noop"]) == 0
        assert "was not verified" in capsys.readouterr().out
        assert main(["policy", "replay", str(ran.folder), "noop", "--key-file", str(hidden)]) == 0
        assert "was not verified" not in capsys.readouterr().out
    finally:
        hidden.rename(key)
