"""status.json: whole at any moment, true at the end, and no burden to the training thread."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tolaria.errors import RunLocked
from tolaria.telemetry.board import CLOSE_S, MAX_REASON, NAME, Board, Former, read_former, replace_quickly
from tolaria.telemetry.goodput import Ledger

DEADLINE_S = 10.0


def make(folder: Path, *, interval_s: float = 0.1, **changes: Any) -> Board:
    ledger = changes.pop("ledger", None) or Ledger()
    return Board(folder / NAME, interval_s=interval_s, ledger=ledger, facts={"run_id": "r", "started_ns": 1}, **changes)


def said(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / NAME).read_bytes())
    return document


def wait_for(found: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not found():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_file_is_whole_at_any_moment_while_it_is_rewritten(tmp_path: Path) -> None:
    path, over = tmp_path / NAME, threading.Event()
    numbers: list[int] = []

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            replace_quickly(path, json.dumps({"number": number, "text": "x" * (number * 97 % 9000)}).encode())

    thread = threading.Thread(target=write)
    thread.start()
    try:
        wait_for(path.exists)
        end = time.monotonic() + DEADLINE_S
        while len(set(numbers)) < 100 and time.monotonic() < end:
            numbers.append(json.loads(path.read_bytes())["number"])
    finally:
        over.set()
        thread.join()
    assert numbers == sorted(numbers) and len(set(numbers)) == 100
    assert os.listdir(tmp_path) == [NAME] and path.stat().st_mode & 0o777 == 0o600


def test_it_tells_what_was_put_on_it_and_stands_there_from_the_beginning(tmp_path: Path) -> None:
    with make(tmp_path) as board:
        wait_for((tmp_path / NAME).exists)
        assert (said(tmp_path)["state"], said(tmp_path)["activity"]) == ("starting", "start-up")
        board.wanted = False
        board.tell(state="running", epoch=3, lr={"host": float("nan")})
        board.look = lambda: {"step": 7}
        wait_for(lambda: said(tmp_path)["state"] == "running")
        wait_for(lambda: board.wanted)
        board.end("finished")
        board.end("failed", "what comes later does not count")
    found = said(tmp_path)
    assert (found["state"], found["reason"], found["step"], found["epoch"]) == ("finished", "", 7, 3)
    assert (found["schema"], found["pid"], found["lr"]) == (1, os.getpid(), {"host": "NaN"})
    assert board.lost == 0 and not board._thread.is_alive()


def test_between_two_files_there_is_at_least_the_interval(tmp_path: Path) -> None:
    written = []

    def write(path: Path, data: bytes) -> None:
        written.append(time.monotonic())

    with make(tmp_path, interval_s=3600.0, write=write) as board:
        wait_for(lambda: len(written) == 1)
        time.sleep(0.4)
        assert len(written) == 1
        board.show()
        wait_for(lambda: len(written) == 2)
    assert len(written) == 3  # the last word


def test_standing_still_is_seen_without_being_told(tmp_path: Path) -> None:
    ledger = Ledger()
    with make(tmp_path, ledger=ledger, interval_s=3600.0) as board:
        ledger.begin(0)
        board.tell(state="running")
        board.show()
        wait_for((tmp_path / NAME).exists)
        with ledger.phases("paused"):
            wait_for(lambda: said(tmp_path)["state"] == "paused")
        wait_for(lambda: said(tmp_path)["state"] == "running")
        board.end("stopped")
    assert said(tmp_path)["goodput"]["paused"] > 0


def test_an_error_that_ends_the_run_is_its_last_word(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), make(tmp_path):
        raise RuntimeError("line one\nline two " + "x" * 2 * MAX_REASON)
    found = said(tmp_path)
    assert found["state"] == "failed" and len(found["reason"]) == MAX_REASON
    assert found["reason"].startswith("RuntimeError: line one line two xxx")
    board = make(tmp_path)
    board.end("halted")
    with pytest.raises(RuntimeError), board:
        raise RuntimeError("by an emergency")
    assert (said(tmp_path)["state"], said(tmp_path)["reason"]) == ("halted", "RuntimeError: by an emergency")


def test_a_full_disk_is_told_once_and_over_when_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = threading.Event()
    full.set()

    def write(path: Path, data: bytes) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_quickly(path, data)

    with make(tmp_path, write=write) as board:
        wait_for(lambda: board.lost >= 3)
        assert not (tmp_path / NAME).exists()
        full.clear()
        wait_for((tmp_path / NAME).exists)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"cannot write {tmp_path / NAME} (No space left on device); training goes on" in told


def test_a_disk_that_does_not_answer_holds_nobody_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stuck, asked = threading.Event(), threading.Event()

    def write(path: Path, data: bytes) -> None:
        asked.set()
        stuck.wait(DEADLINE_S)

    with make(tmp_path, write=write) as board:
        assert asked.wait(DEADLINE_S)
        began = time.monotonic()
        for step in range(1000):
            board.tell(step=step)
            board.show()
        assert time.monotonic() - began < 1.0
        board.end("finished")
        began = time.monotonic()
    assert CLOSE_S <= time.monotonic() - began < CLOSE_S + 3.0
    assert "the disk does not answer" in capsys.readouterr().err
    stuck.set()
    board._thread.join()


def test_a_start_that_was_taken_over_writes_no_more(tmp_path: Path) -> None:
    taken = threading.Event()

    def check_owner() -> None:
        if taken.is_set():
            raise RunLocked("taken over")

    with make(tmp_path, check_owner=check_owner) as board:
        wait_for((tmp_path / NAME).exists)
        taken.set()
        wait_for(lambda: board._over)
        replace_quickly(tmp_path / NAME, b"the other's")
        board.end("finished")
    assert (tmp_path / NAME).read_bytes() == b"the other's"


def test_nothing_is_written_without_an_interval(tmp_path: Path) -> None:
    with make(tmp_path, interval_s=0.0) as board:
        board.tell(state="running")
        board.end("finished")
    assert os.listdir(tmp_path) == []


def test_the_next_start_finds_where_the_time_went_and_since_when_nothing_ran(tmp_path: Path) -> None:
    ledger = Ledger(furthest=41)
    with make(tmp_path, ledger=ledger, wall_ns=lambda: 5_000_000_000) as board:
        board.tell(state="running")
    former = read_former(tmp_path / NAME, "r")
    assert former is not None and set(former.goodput) == set(ledger.seconds())
    assert (former.furthest, former.started_ns, former.state) == (41, 1, "running")
    assert former.gap_s(8_000_000_000) == 3.0
    assert former.gap_s(4_000_000_000) == 0.0  # clocks may be set back
    assert Former(wall_ns=1, state="stopped").gap_s(9) == 0.0  # nobody wanted it to run
    assert read_former(tmp_path / NAME, "another run") is None
    assert read_former(tmp_path / "none", "r") is None


@pytest.mark.parametrize("damaged", [
    b"", b"{", b"[]", b"null", b'{"run_id": "r"}', b"\xff\xfe",
    b'{"run_id": "r", "goodput": 3, "furthest_step": 1, "wall_ns": 1, "started_ns": 1, "state": "running"}',
    b'{"run_id": "r", "goodput": {"compute": "x"}, "furthest_step": 1, "wall_ns": 1, "started_ns": 1, "state": ""}',
])  # fmt: skip
def test_a_damaged_status_costs_the_former_times_and_nothing_else(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / NAME).write_bytes(damaged)
    assert read_former(tmp_path / NAME, "r") is None
