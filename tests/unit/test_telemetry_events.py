import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from tolaria.errors import RunDirError
from tolaria.telemetry import lines
from tolaria.telemetry.events import EventLog, read_events
from tolaria.telemetry.lines import MAX_TEXT, LineFile, read_lines
from tolaria.telemetry.metrics import MetricsLog, read_metrics


class Colour(Enum):
    RED = 1


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """Parse every line as JSON proper: the bare words NaN and Infinity are not JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def failing_write(failures: int) -> Callable[[int, bytes], int]:
    """os.write that says "disk full" for the first ``failures`` calls."""
    left = [failures]

    def write(descriptor: int, data: bytes) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(descriptor, data)

    return write


def test_an_event_is_one_line_that_carries_who_when_and_its_fields(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", 3, run_id="ab12", mono_ns=lambda: 5, wall_ns=lambda: 7)
    log.step, log.branch = 42, 1
    log.emit("policy_silent", "warning", waited_ms=2000.5, codes=("timeout",))
    log.close()
    assert strict_lines(tmp_path / "events.jsonl") == [
        {
            "kind": "policy_silent", "level": "warning", "run_id": "ab12", "rank": 3, "step": 42,
            "branch": 1, "mono_ns": 5, "wall_ns": 7, "waited_ms": 2000.5, "codes": ["timeout"],
        }
    ]  # fmt: skip


def test_an_event_may_be_about_another_step(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e", 0, run_id="r")
    log.step = 42
    log.emit("checkpoint", step=40)
    assert [event["step"] for event in read_events(tmp_path / "e")] == [40]
    log.close()


def test_values_that_json_lacks_stay_valid_json(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e", 0, run_id="r")
    log.emit(
        "x", loss=float("nan"), norms=[float("inf"), -float("inf")], stage=Colour.RED, digest=b"\x01\xff",
        where=tmp_path, long="y" * (MAX_TEXT + 50), text='line\nbreak "quoted" \x1b[31m',
    )  # fmt: skip
    log.close()
    (event,) = strict_lines(tmp_path / "e")
    assert event["loss"] == "NaN"
    assert event["norms"] == ["Infinity", "-Infinity"]
    assert event["stage"] == "RED"
    assert event["digest"] == "01ff"
    assert event["where"] == str(tmp_path)
    assert event["long"].startswith("y" * MAX_TEXT + "...")
    assert event["text"] == 'line\nbreak "quoted" \x1b[31m'


def test_a_field_must_not_replace_what_every_event_carries(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e", 0, run_id="r")
    with pytest.raises(ValueError, match=r"peer_lost.*rank"):
        log.emit("peer_lost", rank=1)
    log.close()


def test_ranks_and_threads_share_one_file_without_mixing_lines(tmp_path: Path) -> None:
    path = tmp_path / "e"
    logs = [EventLog(path, rank, run_id="r") for rank in range(2)]

    def work(log: EventLog) -> None:
        for number in range(200):
            log.emit("tick", number=number, filler="z" * 500)

    threads = [threading.Thread(target=work, args=(log,)) for log in logs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()  # a busy machine may still have lines waiting
    events = strict_lines(path)
    assert len(events) == 800
    assert sorted(e["number"] for e in events if e["rank"] == 1) == sorted(list(range(200)) * 2)


def test_a_full_disk_is_counted_and_told_once_and_never_raised(capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(Path("/dev/full"), 0, run_id="r")
    for _ in range(3):
        log.emit("tick")
    log.close()
    assert log.lost == 3
    told = capsys.readouterr().err
    assert told.count("cannot write /dev/full") == 1
    assert "training goes on" in told


def test_lost_events_are_announced_before_the_next_one_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = EventLog(tmp_path / "e", 0, run_id="r", write=failing_write(3))
    for number in range(5):
        log.emit("tick", number=number)
    log.close()
    assert [(e["kind"], e.get("count"), e.get("number")) for e in read_events(tmp_path / "e")] == [
        ("events_lost", 3, None), ("tick", None, 3), ("tick", None, 4),
    ]  # fmt: skip
    assert log.lost == 3
    assert capsys.readouterr().err.count("tolaria:") == 1


def test_a_line_cut_short_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def cut_second(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        return os.write(descriptor, data[:10] if len(calls) == 2 else data)

    log = EventLog(tmp_path / "e", 0, run_id="r", write=cut_second)
    for number in range(4):
        log.emit("tick", number=number)
    log.close()
    assert len(calls) == 4
    assert [e["number"] for e in read_events(tmp_path / "e", kind="tick")] == [0, 2, 3]
    assert [e["count"] for e in read_events(tmp_path / "e", kind="events_lost")] == [1]
    assert "of" in capsys.readouterr().err


def test_a_failure_that_comes_back_is_told_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing = iter([True, True, False, True])

    def write(descriptor: int, data: bytes) -> int:
        if next(failing):
            raise OSError(errno.EIO, "Input/output error")
        return os.write(descriptor, data)

    log = LineFile(tmp_path / "e", write=write)
    assert [log.append({"n": n}) for n in range(4)] == [False, False, True, False]
    log.close()
    assert capsys.readouterr().err.count("Input/output error") == 2


class StuckDisk:
    """A write that does not come back until the test lets it."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def write(self, descriptor: int, data: bytes) -> int:
        self.entered.set()
        assert self.released.wait(30)
        return os.write(descriptor, data)


def test_a_disk_that_does_not_answer_holds_nobody_up_and_nothing_is_lost(tmp_path: Path) -> None:
    disk = StuckDisk()
    log = EventLog(tmp_path / "e", 0, run_id="r", write=disk.write)
    for number in range(100):
        log.emit("tick", number=number)
    assert disk.entered.is_set()  # every call came back while the first write had not
    assert (tmp_path / "e").read_bytes() == b""
    disk.released.set()
    log.close()
    assert [event["number"] for event in read_events(tmp_path / "e")] == list(range(100))
    assert log.lost == 0


def test_what_a_slow_disk_cannot_take_is_bounded_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lines, "QUEUE_BYTES", 2000)
    disk = StuckDisk()
    log = EventLog(tmp_path / "e", 0, run_id="r", write=disk.write)
    for number in range(100):
        log.emit("tick", number=number)
    disk.released.set()
    log.emit("tick", number=100)
    log.close()
    found = list(read_events(tmp_path / "e"))
    kept = [event["number"] for event in found if event["kind"] == "tick"]
    assert len(kept) + log.lost == 101 and kept[:5] == [0, 1, 2, 3, 4]
    assert sum(event["count"] for event in found if event["kind"] == "events_lost") <= log.lost
    assert capsys.readouterr().err.count("does not keep up") == 1


def test_a_disk_that_never_answers_does_not_keep_a_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lines, "CLOSE_S", 0.05)
    disk = StuckDisk()
    log = EventLog(tmp_path / "e", 0, run_id="r", write=disk.write)
    for number in range(3):
        log.emit("tick", number=number)
    log.close()
    assert log.lost == 3
    assert "does not answer" in capsys.readouterr().err
    disk.released.set()


def test_events_after_close_are_lost_not_raised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(tmp_path / "e", 0, run_id="r")
    log.close()
    log.close()
    log.emit("late")
    assert log.lost == 1
    assert (tmp_path / "e").read_bytes() == b""
    assert "cannot write" in capsys.readouterr().err


def test_only_the_owner_may_read_and_links_are_not_followed(tmp_path: Path) -> None:
    EventLog(tmp_path / "e", 0, run_id="r").close()
    assert stat.S_IMODE((tmp_path / "e").stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "e")
    with pytest.raises(RunDirError, match="link"):
        EventLog(tmp_path / "link", 0, run_id="r")
    with pytest.raises(RunDirError, match="cannot be opened"):
        EventLog(tmp_path / "absent" / "e", 0, run_id="r")


def test_damaged_lines_are_skipped_on_reading(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b'{"a": 1}\n{"b": \n\xff\xfe\n[1]\n{"c": 3}')
    assert list(read_lines(tmp_path / "e")) == [{"a": 1}, {"c": 3}]


def test_metrics_have_step_time_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path / "m", wall_ns=lambda: 9, write=failing_write(1))
    log.write(10, loss=1.0)
    log.write(20, loss=0.5, lr=float("inf"))
    log.close()
    assert log.lost == 1
    (line,) = read_metrics(tmp_path / "m")
    assert line == {"step": 20, "branch": 0, "wall_ns": 9, "loss": 0.5, "lr": "Infinity"}
    assert "No space left" in capsys.readouterr().err
