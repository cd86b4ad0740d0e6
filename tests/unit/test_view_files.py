"""What a run's files say: read while they are written, by a reader that takes nothing from the run."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.record_runs import SITUATIONS
from tests.seen import copied, events_of, moment, recorded, status_document
from tolaria.errors import RunDirError
from tolaria.rundir.ownership import FENCE_NAME, LOCK_NAME
from tolaria.view.course import Course
from tolaria.view.files import RunFiles, open_files
from tolaria.view.listing import list_runs
from tolaria.view.lookout import Lookout, look
from tolaria.view.selection import Selection
from tolaria.view.standing import FRESH_S, is_alive
from tolaria.view.steps import MAX_POINTS, StepsReader
from tolaria.view.tail import Tail
from tolaria.view.telling import TELLERS, tell

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def held_lock(path: Path) -> "subprocess.Popen[bytes]":
    """A process that holds a run's lock."""
    path.touch()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_a_run_lives_while_its_lock_is_held_and_a_look_never_takes_it(tmp_path: Path) -> None:
    files = RunFiles(copied("restarted", tmp_path))
    assert not files.alive and files.holder is None
    with held_lock(files.path / LOCK_NAME) as process:
        assert files.alive and files.holder == process.pid
        assert look(files).now.state == "starting"  # its last words are of a run that ended
        process.communicate()
    assert not files.alive
    with (files.path / LOCK_NAME).open("r+b") as mine:
        assert not files.alive  # a reader's lock would be one's own, and hide this
        fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_has_no_more_process_was_killed(tmp_path: Path) -> None:
    path = copied("killed", tmp_path)
    (path / "status.json").write_text(json.dumps(status_document(wall_ns=4 * 10**18)))
    now = look(RunFiles(path)).now
    assert (now.state, now.alive, now.activity) == ("killed", False, "compute")


def test_a_fresh_status_of_another_machine_is_a_sign_of_life(tmp_path: Path) -> None:
    path = copied("killed", tmp_path)
    (path / LOCK_NAME).write_text("4242 node-a\n")
    status = status_document(wall_ns=10**18)
    assert is_alive(RunFiles(path), status, now_ns=10**18 + int(1e9))
    assert not is_alive(RunFiles(path), status, now_ns=10**18 + int((FRESH_S + 1) * 1e9))
    assert not is_alive(RunFiles(path), {**status, "state": "finished"}, now_ns=10**18)
    (path / LOCK_NAME).write_text(f"4242 {socket.gethostname()}\n")
    assert not is_alive(RunFiles(path), status, now_ns=10**18)  # here the lock is the answer


def test_a_status_of_an_earlier_start_is_left_aside(tmp_path: Path) -> None:
    path = copied("restarted", tmp_path)
    (path / "status.json").write_text(json.dumps(status_document(wall_ns=1, step=999_999)))
    assert look(RunFiles(path)).now.step == 60


def test_every_key_of_the_status_is_shown_and_none_is_needed(tmp_path: Path) -> None:
    path = copied("killed", tmp_path)
    (path / "status.json").write_text(json.dumps(status_document(wall_ns=4 * 10**18)))
    now = look(RunFiles(path)).now
    assert (now.step, now.epoch, now.samples_per_s, now.steps_per_epoch) == (264, 12, 15230.5, 22)
    assert now.lr == {"host": 0.02, "seed/early": 0.002} and now.ranks[1].data_ms == 0.3
    assert now.seeds[0].alpha == 0.55 and now.goodput["compile"] == 14.9 and now.memory_mb["rss_mb"] == 612.0
    for key in status_document():
        less = {name: value for name, value in status_document(wall_ns=4 * 10**18).items() if name != key}
        (path / "status.json").write_text(json.dumps(less))
        assert look(RunFiles(path)).now.state == "killed"
    for wrong in ("[]", "{", '{"schema": 1, "ranks": 3, "seeds": [1], "mode": [], "lr": "x", "step": "y"}'):
        (path / "status.json").write_text(wrong)
        assert look(RunFiles(path)).now.step == 33


def test_the_ladder_has_the_checkpoints_that_are_there_by_their_whole_names(tmp_path: Path) -> None:
    path = copied("killed", tmp_path)
    told = [{"name": f"c{n}", "step": 10 * n, "good": n < 3} for n in range(1, 5)]
    (path / "status.json").write_text(json.dumps(status_document(wall_ns=4 * 10**18, checkpoints=told)))
    for name in ("c2-s20", "c3-s30.bad", "c4-s40"):
        (path / "ckpt" / name).mkdir(parents=True)
    found = look(RunFiles(path)).now.checkpoints
    assert [(saved.name, saved.step, saved.good) for saved in found] == [("c2-s20", 20, True), ("c4-s40", 40, False)]


def test_a_tail_gives_each_line_once_and_waits_for_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.new() == []
    path.write_text('{"a":1}\n{"a":')
    assert tail.new() == [{"a": 1}]
    with path.open("a") as file:
        file.write('2}\nnot json\n[1]\n{"a":3}\n')
    assert tail.new() == [{"a": 2}, {"a": 3}]
    assert tail.new() == []
    path.write_text('{"a":4}\n')  # cut, as by hand
    assert tail.new() == [{"a": 4}]
    os.replace(path, tmp_path / "old")
    path.write_text('{"a":5}\n')
    assert tail.new() == [{"a": 5}]


def test_reading_on_comes_to_the_same_as_reading_all(tmp_path: Path) -> None:
    path = copied("spike", tmp_path)
    lines = (path / "events.jsonl").read_text().splitlines(keepends=True)
    (path / "events.jsonl").write_text("")
    lookout = Lookout(RunFiles(path))
    for start in range(0, len(lines), 17):
        with (path / "events.jsonl").open("a") as file:
            file.writelines(lines[start : start + 17])
        lookout.look()
    whole, piecemeal = look(RunFiles(path)).course, lookout.look().course
    assert piecemeal == whole and len(whole.boundaries) == 24


def test_a_return_takes_the_measurements_behind_it_off_the_course() -> None:
    before = moment("unstable", "incident").course
    steps = [point.step for point in before.boundaries]
    after = moment("unstable", "went_back").course
    target = int(after.last["went_back"]["to_step"])
    assert [point.step for point in after.boundaries] == [step for step in steps if step <= target]
    full = look(recorded("spike"))
    assert [p.step for p in full.course.boundaries] == sorted({p.step for p in full.course.boundaries})
    assert [p.step for p in full.steps] == sorted({p.step for p in full.steps})


def test_a_long_run_stays_a_short_list_of_points_with_its_end_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    count, line = 3 * MAX_POINTS, '{{"step": {0}, "wall_ns": 1{0:012}, "loss_rank0": 1.0}}\n'
    path.write_text("".join(map(line.format, range(count))))
    points = StepsReader(Tail(path)).read()
    assert MAX_POINTS // 2 <= len(points) <= MAX_POINTS
    assert [point.step for point in points[-500:]] == list(range(count - 500, count)) and points[0].step == 0


def test_runs_are_listed_newest_first_and_a_damaged_one_hides_none(tmp_path: Path) -> None:
    copied("killed", tmp_path)
    copied("spike", tmp_path)
    damaged = copied("failed", tmp_path)
    (damaged / "events.jsonl").unlink()
    (damaged / "events.jsonl").mkdir()
    (tmp_path / "no run").mkdir()
    listed = list_runs(tmp_path)
    assert [entry.run for entry in listed] == ["killed", "spike", "failed"]
    assert [entry.state for entry in listed] == ["killed", "finished", "unreadable"]
    assert listed[1].epochs == 24 and (listed[1].accuracy or 0) > 0.9 and "Is a directory" in listed[2].reason
    assert list_runs(tmp_path / "none") == []


def test_what_is_no_run_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no such directory; `tolaria runs` lists"):
        open_files(tmp_path / "none")
    with pytest.raises(RunDirError, match="not a run directory"):
        open_files(tmp_path)
    (tmp_path / FENCE_NAME).touch()
    assert look(open_files(tmp_path)).now.state == "unknown"


def test_every_kind_of_event_has_a_sentence() -> None:
    kinds = set()
    for name in (make.__name__ for make in SITUATIONS):
        for event in events_of(name):
            kinds.add(event["kind"])
            sentence = tell(event)
            assert sentence and "\n" not in sentence and "None" not in sentence, (event["kind"], sentence)
    assert len(kinds) > 20 and kinds <= set(TELLERS)
    assert (
        tell({"kind": "brand_new", "rank": 0, "step": 3, "what": "x", "share": 0.25}) == "brand new: what x, share 0.25"
    )


def test_a_selection_shows_once_what_all_ranks_tell() -> None:
    events = events_of("restarted")
    shown = [event for event in events if Selection().takes(event, step=0)]
    assert {event["rank"] for event in shown if event["kind"] == "boundary"} == {0}
    assert [event["kind"] for event in shown if event["rank"] == 1] == []
    errors = [event for event in events_of("failed") if Selection(level="error").takes(event, step=0)]
    assert {event["kind"] for event in errors} == {"run_failed"} and {event["rank"] for event in errors} == {0, 1}
    assert not Selection(since=5).takes(events[0], step=4)
    assert Selection(kinds=("decision",)).takes({"kind": "decision", "rank": 0}, step=0)


def test_an_event_of_another_version_breaks_nothing() -> None:
    course = Course()
    for kind in TELLERS:
        for value in (None, "x", 3, [], {}, [1], True):
            event = {"kind": kind, "rank": 0} | dict.fromkeys(
                ("step", "wall_ns", "reason", "path", "to_step", "seeds", "own_ms", "latency_ms", "what", "samples",
                 "commands", "changed", "milliseconds", "seq", "world_size", "wait_s", "expected", "source"), value
            )  # fmt: skip
            course.take(event)
            assert tell(event)
