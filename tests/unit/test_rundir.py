"""Run directories: which one a start takes, who may write there, what a restart finds."""

import errno
import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from tolaria.config import RunConfig
from tolaria.dist import Peers
from tolaria.errors import RunDirError, RunLocked
from tolaria.recovery.fsops import FileOps
from tolaria.rundir import (
    Fence,
    Resume,
    RunDir,
    choose,
    default_path,
    find_newest,
    find_restart,
    has_checkpoints,
    lock,
    open_run,
    read_fence,
    write_fence,
)

ALONE = Peers(None, 0, 1)
NOW = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
FENCE = Fence(generation="g1", run_id="0" * 32, boot_id="b", pid=7, agent="1-2-b")
FS = FileOps()

HOLDER = """
import sys
from pathlib import Path
from tolaria.rundir.ownership import lock
held = lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def start(tmp_path: Path, *, generation: str = "g1", agent: str | None = None, **options: str) -> RunDir:
    config = RunConfig(root=str(tmp_path / "runs"), **options)
    return open_run(config, ALONE, generation=generation, agent=agent, now=NOW, fs=FS)


def make_checkpoint(run: Path, name: str = "c0-s1") -> Path:
    folder = run / "ckpt" / name
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{}")
    return folder


def picture(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything under a folder: mode, time of change, content."""
    found = {}
    for item in sorted(path.rglob("*")):
        status = item.lstat()
        found[str(item)] = (status.st_mode, status.st_mtime_ns, item.read_bytes() if item.is_file() else b"")
    return found


def hold_in_another_process(path: Path) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", HOLDER, str(path)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    holder = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


def test_the_default_path_is_in_utc() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=9)))
    assert default_path(Path("runs"), "x", there) == Path("runs/20250102T030405Z-x")


def test_a_new_run_is_private_locked_and_fenced(tmp_path: Path) -> None:
    with start(tmp_path, agent="a") as run:
        assert run.path == tmp_path / "runs" / "20250102T030405Z-run"
        assert (run.resume, run.restarted) == (None, False)
        assert run.checkpoints.is_dir() and not has_checkpoints(run.path, FS)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "runs").rglob("*")}
        assert modes == {run.path.name: 0o700, "LOCK": 0o600, "FENCE": 0o600, "ckpt": 0o700}
        fence = read_fence(run.path, FS)
        assert fence is not None and (fence.generation, fence.agent, fence.pid) == ("g1", "a", os.getpid())
        assert fence.run_id == run.run_id and len(run.run_id) == 32
        run.check_owner()


def test_two_starts_in_one_second_take_two_directories(tmp_path: Path) -> None:
    paths = [start(tmp_path).path.name for _ in range(2)]
    assert paths == ["20250102T030405Z-run", "20250102T030406Z-run"]


@pytest.mark.processes
def test_a_second_start_is_refused_and_touches_nothing_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    start(tmp_path, dir=str(folder)).close()
    make_checkpoint(folder)
    holder = hold_in_another_process(folder)
    try:
        before = picture(folder)
        for resume in ("no", "auto", str(folder)):
            with pytest.raises(RunLocked, match=f"process {holder.pid} on ") as caught:
                start(tmp_path, dir=str(folder), resume=resume, generation="g2")
            assert caught.value.exit_code == 75
        assert picture(folder) == before
    finally:
        end(holder)
    with start(tmp_path, dir=str(folder), resume="auto", generation="g2") as run:
        assert run.resume is not None


def test_an_older_start_sees_that_it_was_taken_over(tmp_path: Path) -> None:
    old = start(tmp_path, dir=str(tmp_path / "one"))
    old.check_owner()
    (old.path / "LOCK").unlink()
    new = start(tmp_path, dir=str(tmp_path / "one"), generation="g2")
    with pytest.raises(RunLocked, match="generation g2"):
        old.check_owner()
    new.check_owner()
    assert new.run_id == old.run_id, "it is the same run"
    (new.path / "FENCE").unlink()
    with pytest.raises(RunLocked, match="nobody"):
        new.check_owner()


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_a_folder_with_other_files_is_never_taken(tmp_path: Path, resume: str) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunDirError, match="never a run directory"):
        start(tmp_path, dir=str(tmp_path), resume=resume)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_folder_with_checkpoints_is_not_started_afresh(tmp_path: Path) -> None:
    run = start(tmp_path, dir=str(tmp_path / "one"))
    run.close()
    make_checkpoint(run.path, "c3-s9.bad")
    with pytest.raises(RunDirError, match=r"run\.resume=auto"):
        start(tmp_path, dir=str(tmp_path / "one"))
    other = make_checkpoint(tmp_path / "two")
    for foreign in (other, tmp_path / "two"):
        with pytest.raises(RunDirError, match="holds checkpoints"):
            start(tmp_path, dir=str(tmp_path / "one"), resume=str(foreign))
    # The refused starts have let the lock go.
    start(tmp_path, dir=str(tmp_path / "one"), resume="auto").close()


def test_an_empty_or_crashed_directory_may_be_used_again(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    first = start(tmp_path, dir=str(tmp_path / "one"))
    first.close()
    (first.checkpoints / "c0-s1.tmp").mkdir()
    assert start(tmp_path, dir=str(tmp_path / "one"), resume="auto").resume is None


def test_auto_takes_the_newest_run_of_this_name_with_a_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for name in ("20240101T000000Z-run", "20240301T000000Z-run", "20240601T000000Z-run-2", "x20250101T000000Z-run"):
        make_checkpoint(root / name)
    (root / "20240401T000000Z-run" / "ckpt" / "c0-s1.tmp").mkdir(parents=True)
    (root / "20240501T000000Z-run").symlink_to("20240101T000000Z-run")
    assert find_newest(root, "run", FS) == root / "20240301T000000Z-run"
    assert find_newest(root, "run-2", FS) == root / "20240601T000000Z-run-2"
    assert find_newest(root, "other", FS) is None and find_newest(tmp_path / "no", "run", FS) is None
    chosen = choose(RunConfig(root=str(root), resume="auto"), agent=None, now=NOW, fs=FS)
    assert chosen.path == root / "20240301T000000Z-run"
    assert chosen.resume == Resume(path=chosen.path / "ckpt", is_checkpoint=False)
    fresh = choose(RunConfig(root=str(root), resume="auto", name="other"), agent=None, now=NOW, fs=FS)
    assert (fresh.path.name, fresh.resume) == ("20250102T030405Z-other", None)


def test_a_run_is_continued_in_place_a_single_checkpoint_in_a_new_directory(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    checkpoint = make_checkpoint(root / "20240101T000000Z-run")
    run = checkpoint.parent.parent
    at_run = choose(RunConfig(root=str(root), resume=str(run)), agent=None, now=NOW, fs=FS)
    assert (at_run.path, at_run.resume) == (run, Resume(path=run / "ckpt", is_checkpoint=False))
    at_checkpoint = choose(RunConfig(root=str(root), resume=str(checkpoint)), agent=None, now=NOW, fs=FS)
    assert at_checkpoint.path.name == "20250102T030405Z-run"
    assert at_checkpoint.resume == Resume(path=checkpoint, is_checkpoint=True)
    copied = choose(RunConfig(root=str(root), resume=str(run), dir=str(tmp_path / "n")), agent=None, now=NOW, fs=FS)
    assert (copied.path, copied.resume) == (tmp_path / "n", at_run.resume)
    for wrong in (tmp_path / "nowhere", root, checkpoint / "MANIFEST.json"):
        with pytest.raises(RunDirError, match=r"run\.resume=.*expected no, auto, or the path"):
            choose(RunConfig(root=str(root), resume=str(wrong)), agent=None, now=NOW, fs=FS)


def test_a_rank_started_again_by_its_agent_continues_its_own_run(tmp_path: Path) -> None:
    first = start(tmp_path, agent="me")
    first.close()
    start(tmp_path, agent="somebody else").close()
    # Started again before its first checkpoint: the same directory, from the beginning.
    again = start(tmp_path, agent="me", generation="g2")
    assert (again.path, again.resume, again.restarted, again.run_id) == (first.path, None, True, first.run_id)
    again.close()
    make_checkpoint(first.path)
    third = start(tmp_path, agent="me", generation="g3")
    assert (third.path, third.restarted) == (first.path, True)
    assert third.resume == Resume(path=first.path / "ckpt", is_checkpoint=False)
    third.close()
    # Without torchrun nobody is a restart.
    assert start(tmp_path, generation="g4").path != first.path


def test_a_restart_before_the_first_checkpoint_still_resumes_from_what_was_asked(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "old")
    for restarted in (False, True):
        with start(tmp_path, agent="me", resume=str(checkpoint)) as run:
            assert run.restarted is restarted
            assert run.resume == Resume(path=checkpoint, is_checkpoint=True)


def test_a_restart_with_a_given_directory_looks_only_there(tmp_path: Path) -> None:
    start(tmp_path, agent="me").close()
    run = start(tmp_path, agent="me", dir=str(tmp_path / "given"))
    assert (run.path, run.restarted) == (tmp_path / "given", False)


def test_damaged_records_of_other_runs_do_not_stop_the_search(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "FENCE").write_text("{")
    write_fence(tmp_path / "b", FENCE, FS)
    assert find_restart([tmp_path / "a", tmp_path / "b"], "1-2-b", FS) == tmp_path / "b"
    assert find_restart([tmp_path / "a", tmp_path / "b"], "other", FS) is None


def test_the_fence_comes_back_and_is_replaced_whole(tmp_path: Path) -> None:
    assert read_fence(tmp_path, FS) is None
    for generation in ("g1", "g2"):
        fence = Fence(generation=generation, run_id="0" * 32, boot_id="b", pid=7, agent=None)
        write_fence(tmp_path, fence, FS)
        assert read_fence(tmp_path, FS) == fence
    assert os.listdir(tmp_path) == ["FENCE"]


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "7"}, {"pid": True}, {"run_id": "../x"}, {"run_id": 5}, {"agent": 3}, {"generation": None}, {"more": 1},
    ],
)  # fmt: skip
def test_a_damaged_fence_of_this_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_fence(tmp_path, FENCE, FS)
    document = json.loads((tmp_path / "FENCE").read_text()) | change
    (tmp_path / "FENCE").write_text(json.dumps(document))
    with pytest.raises(RunDirError, match="FENCE"):
        read_fence(tmp_path, FS)


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"[" * 4000, b" " * 5000])
def test_a_fence_that_is_no_record_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "FENCE").write_bytes(raw)
    with pytest.raises(RunDirError, match="FENCE"):
        read_fence(tmp_path, FS)


def test_a_linked_lock_or_fence_is_not_followed(tmp_path: Path) -> None:
    for name in ("LOCK", "FENCE"):
        (tmp_path / name).symlink_to(tmp_path / f"target-{name}")
    with pytest.raises(RunDirError, match="LOCK"):
        lock(tmp_path)
    with pytest.raises(RunDirError, match="FENCE"):
        read_fence(tmp_path, FS)
    assert not (tmp_path / "target-LOCK").exists()


class Refusing(FileOps):
    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.fired = False

    def refuse(self, operation: str) -> None:
        if operation == self.operation:
            self.fired = True
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def make_dir(self, path: Path) -> None:
        self.refuse("make_dir " + path.name)
        super().make_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self.refuse("rename " + target.name)
        super().rename(source, target)


@pytest.mark.parametrize("operation", ["make_dir one", "rename FENCE", "make_dir ckpt"])
def test_an_unwritable_directory_is_said_so_and_not_left_locked(tmp_path: Path, operation: str) -> None:
    fs = Refusing(operation)
    config = RunConfig(dir=str(tmp_path / "one"))
    with pytest.raises(RunDirError, match="Read-only file system") as caught:
        open_run(config, ALONE, generation="g", agent=None, now=NOW, fs=fs)
    assert fs.fired and caught.value.exit_code == 73
    open_run(config, ALONE, generation="g", agent=None, now=NOW, fs=FS).close()


def test_a_file_in_the_place_of_the_directory_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunDirError, match=r"Not a directory|File exists"):
            start(tmp_path, dir=str(place))
