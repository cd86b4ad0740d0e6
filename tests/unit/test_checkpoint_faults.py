"""Checkpoints when the disk fails or the process dies, at every single file operation."""

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small_checkpoints import ALONE, load, payload, require_whole, save
from tolaria.recovery.checkpoint import CheckpointWriter
from tolaria.recovery.commit import Abandoned, Committer
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.retain import Retention
from tolaria.recovery.staging import HostBuffers

PRIMITIVES = ("create", "allocate", "write", "fsync", "rename", "make_dir", "unlink", "remove_dir")
# What one save does here, with one old checkpoint to delete: folder, three files, commit, deletion.
NUM_OPERATIONS = 24


class Killed(BaseException):
    """The process is gone: nothing that it would still do can happen."""


class Faulty(FileOps):
    """Calls ``fault(name)`` instead of the n-th primitive; counts from 0."""

    def __init__(self, nth: int | None, fault: Callable[[str], None] = lambda name: None) -> None:
        self.nth = nth
        self.fault = fault
        self.calls: list[str] = []

    def reach(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.nth:
            self.fault(name)


def _counted(name: str) -> Callable[..., Any]:
    def method(self: Faulty, *args: Any) -> Any:
        self.reach(name)
        return getattr(FileOps, name)(self, *args)

    return method


for _name in PRIMITIVES:
    setattr(Faulty, _name, _counted(_name))


class Dying(Faulty):
    """Dies at the n-th primitive, half-way through when it is a write, and stays dead."""

    def reach(self, name: str) -> None:
        super().reach(name)
        if self.nth is not None and len(self.calls) > self.nth:
            raise Killed

    def write(self, fd: int, data: memoryview) -> int:
        if len(self.calls) == self.nth:
            os.write(fd, data[: len(data) // 2])
        self.reach("write")
        return super(Faulty, self).write(fd, data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, c0-s0 and c1-s1; the next save commits c2 and deletes c0."""
    for step in (0, 1):
        save(tmp_path / "ckpt", step, FileOps())
    return tmp_path / "ckpt"


def test_the_loops_below_cover_every_operation(root: Path) -> None:
    fs = Faulty(None)
    assert save(root, 2, fs).error is None
    assert len(fs.calls) == NUM_OPERATIONS and set(fs.calls) == set(PRIMITIVES)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("nth", range(NUM_OPERATIONS))
def test_a_failing_disk_never_costs_the_previous_checkpoint(root: Path, nth: int, code: int) -> None:
    failed = []

    def fail(name: str) -> None:
        failed.append(name)
        raise OSError(code, os.strerror(code))

    fs = Faulty(nth, fail)
    outcome = save(root, 2, fs)
    assert len(failed) == 1
    if outcome.error is None:
        # Committed before the fault: it hit the deletion of the old one.
        assert outcome.cleanup_error is not None and os.strerror(code) in outcome.cleanup_error
        require_whole(load(root), {2})
    else:
        assert errno.errorcode[code] in outcome.error and "rank 0" in outcome.error and outcome.path is None
        require_whole(load(root), {1, 2})
        committed = (root / "c2-s2").exists()
        assert committed == (failed == ["fsync"] and "rename" in fs.calls), "only a lost folder fsync comes after"
    # Training goes on: the next save succeeds and clears up.
    assert save(root, 3, FileOps()).error is None
    require_whole(load(root), {3})
    assert not [name for name in os.listdir(root) if name.endswith((".tmp", ".trash", ".bad"))]


def test_no_fsync_is_tried_twice_on_one_file(root: Path) -> None:
    files: list[str] = []

    class Once(FileOps):
        def fsync(self, fd: int) -> None:
            files.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
            if len(files) == 1:
                raise OSError(errno.EIO, "lost")
            super().fsync(fd)

    assert save(root, 2, Once()).error is not None
    assert files == ["shard-00000.safetensors"]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(root: Path) -> None:
    class Small(Faulty):
        def free_bytes(self, path: Path) -> int:
            return 1000

    fs = Small(None)
    outcome = save(root, 2, fs)
    assert outcome.error is not None and "ENOSPC" in outcome.error
    assert fs.calls == []


def test_staged_bytes_that_change_before_they_are_written_are_not_committed(root: Path) -> None:
    staged = HostBuffers().stage(payload(2))

    class Meddling(FileOps):
        def make_dir(self, path: Path) -> None:
            super().make_dir(path)
            staged.replicated["replicated/w"][5] += 1

    committer = Committer(
        root, run_id="r", generation="g", peers=ALONE, fs=Meddling(), keep=2, check_owner=lambda: None
    )
    with pytest.raises(Abandoned, match="staged bytes changed"):
        committer.commit(staged, Retention())
    require_whole(load(root), {1})


@pytest.mark.parametrize("nth", range(NUM_OPERATIONS))
def test_a_kill_at_any_operation_leaves_the_previous_or_the_new_one(
    root: Path, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: deaths.append(args.exc_type))
    fs = Dying(nth)
    writer = CheckpointWriter(root, run_id="r", generation="g", peers=ALONE, fs=fs, keep=2)
    writer.save(payload(2))
    assert writer.wait(30)
    with pytest.raises(RuntimeError, match="unforeseen"):
        writer.poll()
    assert deaths == [Killed] and len(fs.calls) == nth + 1
    committed = "rename" in fs.calls[:nth]
    require_whole(load(root), {2} if committed else {1})
    assert save(root, 3, FileOps()).error is None
    require_whole(load(root), {3})
    assert len(os.listdir(root)) == 2


def test_a_kill_while_damage_is_set_aside_changes_nothing_for_the_next_start(root: Path) -> None:
    save(root, 2, FileOps())
    (root / "c2-s2" / "state-00000.json").write_bytes(b"{}")
    for nth in itertools.count():
        fs = Dying(nth)
        try:
            loaded = load(root, fs)
        except Killed:
            continue
        break
    assert nth == 2, "the rename and the fsync after it"
    require_whole(loaded, {1})
    assert (root / "c2-s2.bad").is_dir()
