"""A run's files on disks that are full, read-only, failing, cut off or damaged.

Real file systems where this process may mount them: they are made in files, for one test each.
"""

import contextlib
import errno
import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.matrix import COUNTED
from tests.run_on_disk import ALONE, Found, Script, Unsynced, broken_promises, first_start, second_start, take_up
from tolaria.errors import CheckpointError, WalError
from tolaria.recovery.checkpoint import load_path
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import WalKind

# Linux, fs/ext4/ext4.h: stop all writing at once and leave the journal unflushed, as a power cut does.
EXT4_IOC_SHUTDOWN = 0x8004587D
WITHOUT_FLUSHING_THE_JOURNAL = 2
PAGE = 4096


def mount(place: Path, *options: str) -> None:
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this process may not mount file systems: {done.stderr.strip()}")


def unmount(place: Path) -> None:
    subprocess.run(["umount", str(place)], check=True, capture_output=True)


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    mount(place, *options)
    try:
        yield place
    finally:
        unmount(place)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB in memory."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=96m", "none") as place:
        yield place


def fill(place: Path, leave: int = 0) -> Path:
    path = place / "somebody else's"
    size = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize - leave
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return path


class Promises:
    """What a script has promised."""

    def __init__(self) -> None:
        self.num_said = 2
        self.saved: list[tuple[int, int, int]] = []

    def __call__(self, kind: str, what: Any) -> None:
        if kind == "said":
            self.num_said = what
        else:
            self.saved.append(what)

    def broken(self, found: Found, said: list[bytes]) -> list[str]:
        return broken_promises(found, said, self.num_said, self.saved)


# A full disk


class Optimist(FileOps):
    """Believes that there is room, so that only the disk itself can say no."""

    def free_bytes(self, path: Path) -> int:
        return 2**40


def test_a_disk_that_fills_up_costs_the_save_and_nothing_else(small: Path) -> None:
    run = small / "run"
    first_start(run, FileOps())
    script = Script(run, Optimist())
    script.begin()
    crowd = fill(small)
    outcome = script.save(2, 0)
    assert outcome.error is not None and "ENOSPC" in outcome.error
    assert sorted(os.listdir(run / "ckpt")) == ["c0-s0", "c1-s1"]
    crowd.unlink()
    assert script.save(2, 0).error is None, "training goes on, and so do saves when there is room again"
    script.kill()
    found = take_up(run)
    assert found.loaded is not None and found.loaded.step == 2


def test_on_a_full_disk_the_log_says_so_and_ends_in_order(small: Path) -> None:
    run = small / "run"
    first_start(run, FileOps())
    script = Script(run, FileOps())
    script.begin()
    fill(small)
    boundary = 2
    try:
        while not script.wal.low_space:
            script.decide(boundary)
            boundary += 1
            assert boundary < 5000, "the disk is not full"
        script.decide(boundary)
        script.journal.ended()
    finally:
        script.kill()
    found = take_up(run)
    assert found.records[-1].kind == WalKind.CLOSE
    decisions = [r for r in found.records if r.kind == WalKind.DECISION]
    assert len(decisions) == boundary + 1


def test_a_log_without_a_reserve_refuses_but_keeps_what_it_promised(small: Path) -> None:
    run = small / "run"
    first_start(run, Unsynced())
    script = Script(run, Unsynced())
    script.begin()
    fill(small)
    promised = script.num_said
    with contextlib.suppress(WalError):
        for boundary in range(2, 5000):
            script.decide(boundary)
            promised += 1
    with pytest.raises(WalError, match="nothing more may take effect"):
        script.decide(5000)
    script.kill()
    (small / "somebody else's").unlink()
    assert len(take_up(run).said) == promised > 10


# Single operations that fail


class Failing(Unsynced):
    """The n-th primitive fails."""

    def __init__(self, nth: int, code: int) -> None:
        self.nth = nth
        self.code = code
        self.calls = 0
        self.fired = ""
        self.after_fsync: list[str] = []

    def reach(self, name: str, path: str) -> None:
        self.calls += 1
        if self.calls - 1 == self.nth:
            self.fired = f"{name} {path}"
            raise OSError(self.code, os.strerror(self.code))
        if self.fired == f"{name} {path}" and "sync" in name:
            self.after_fsync.append(path)


def _counted(name: str) -> Callable[..., Any]:
    def method(self: Failing, *args: Any) -> Any:
        first = args[0]
        self.reach(name, os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first))
        return getattr(Unsynced, name)(self, *args)

    return method


for _name in ("create", "allocate", "write", "fsync", "open_existing", "write_at", "datasync", "rename", "make_dir",
              "unlink", "remove_dir"):  # fmt: skip
    setattr(Failing, _name, _counted(_name))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_whichever_operation_fails_what_was_promised_stays(tmp_path: Path, code: int) -> None:
    first_start(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "whole")
    counting = Failing(-1, code)
    second_start(Script(tmp_path / "whole", counting))
    assert counting.calls > 120
    broken: list[str] = []
    refused = 0
    for nth in range(counting.calls):
        run = tmp_path / f"run{nth}"
        shutil.copytree(tmp_path / "first", run)
        fs, promises = Failing(nth, code), Promises()
        script = Script(run, fs, promises)
        try:
            second_start(script)
        except (WalError, CheckpointError):
            refused += 1
        finally:
            if hasattr(script, "writer"):
                script.kill()
        assert fs.fired, "the fault did not happen"
        repeated = [path for path in fs.after_fsync if not Path(path).is_dir()]
        assert not repeated, f"after its sync failed, {repeated} was synced again"
        found = take_up(run)
        broken += [f"{fs.fired}: {text}" for text in promises.broken(found, found.said)]
        shutil.rmtree(run)
    assert broken == [] and 0 < refused < counting.calls


# Places that cannot be written


def test_a_read_only_disk_refuses_the_start(tmp_path: Path) -> None:
    first_start(tmp_path / "run")
    mount(tmp_path / "seen", "--bind", str(tmp_path / "run"))
    try:
        mount(tmp_path / "seen", "-o", "remount,bind,ro")
        with pytest.raises(WalError, match="Read-only file system"):
            take_up(tmp_path / "seen", FileOps())
    finally:
        unmount(tmp_path / "seen")
    found = take_up(tmp_path / "run")
    assert found.loaded is not None and found.loaded.step == 1


def test_a_disk_that_turns_read_only_costs_the_save_and_then_the_log(tmp_path: Path) -> None:
    first_start(tmp_path / "run")
    mount(tmp_path / "seen", "--bind", str(tmp_path / "run"))
    try:
        script = Script(tmp_path / "seen", FileOps())
        script.begin()
        (tmp_path / "seen" / "ckpt").chmod(0o755)
        with immutable(tmp_path / "run" / "ckpt"):
            outcome = script.save(2, 0)
        assert outcome.error is not None and "EPERM" in outcome.error
        assert script.save(2, 0).error is None
        script.kill()
    finally:
        unmount(tmp_path / "seen")
    found = take_up(tmp_path / "run")
    assert found.loaded is not None and found.loaded.step == 2


@contextlib.contextmanager
def immutable(path: Path, undo: Path | None = None) -> Iterator[None]:
    """``undo``: where to look for it afterwards, if it may have been moved."""
    done = subprocess.run(["chattr", "+i", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this process may not make files immutable: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-R", "-i", str(undo or path)], check=True)


def test_an_immutable_old_checkpoint_does_not_stop_a_save(tmp_path: Path) -> None:
    first_start(tmp_path)
    script = Script(tmp_path, Unsynced())
    script.begin()
    with immutable(tmp_path / "ckpt" / "c0-s0" / "MANIFEST.json", undo=tmp_path / "ckpt"):
        outcome = script.save(2, 0)
        assert outcome.error is None and outcome.cleanup_error is not None
        script.kill()
        found = take_up(tmp_path)
        assert found.loaded is not None and found.loaded.step == 2


def test_a_folder_of_the_log_that_takes_nothing_refuses_the_start(tmp_path: Path) -> None:
    first_start(tmp_path)
    with immutable(tmp_path / "wal"), pytest.raises(WalError, match="Operation not permitted"):
        take_up(tmp_path)
    assert take_up(tmp_path).loaded is not None


# Power cuts on a real file system


class PowerCut(FileOps):
    """Cuts the file system off at the n-th operation."""

    def __init__(self, place: Path, nth: int) -> None:
        self.place = place
        self.nth = nth
        self.calls = 0
        self.cut = False

    def reach(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.nth:
            fd = os.open(self.place, os.O_RDONLY)
            try:
                fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING_THE_JOURNAL))
            finally:
                os.close(fd)
            self.cut = True

    def free_bytes(self, path: Path) -> int:
        return 2**25


def _cutting(name: str) -> Callable[..., Any]:
    def method(self: PowerCut, *args: Any) -> Any:
        self.reach()
        return getattr(FileOps, name)(self, *args)

    return method


for _name in ("create", "allocate", "write", "fsync", "open_existing", "write_at", "datasync", "rename", "make_dir",
              "unlink", "remove_dir"):  # fmt: skip
    setattr(PowerCut, _name, _cutting(_name))


class Forgetful(PowerCut):
    """Never syncs a file."""

    def fsync(self, fd: int) -> None:
        self.reach()

    datasync = fsync


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An ext4 file system in a file, with a run that was killed after two checkpoints."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(24 * 2**20)
    made = subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no mkfs.ext4 here")
    with mounted(tmp_path / "disk", "-o", "loop", str(path)) as place:
        first_start(place / "run", FileOps())
    return path


def cut_at(image: Path, nth: int, kind: type[PowerCut]) -> tuple[bool, list[str]]:
    """(whether the power was cut, what a start afterwards misses)."""
    copy, place = image.with_name("copy"), image.with_name("disk")
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
    promises = Promises()
    with mounted(place, "-o", "loop", str(copy)):
        fs = kind(place, nth)
        script = Script(place / "run", fs, promises)
        with contextlib.suppress(WalError, CheckpointError, OSError):
            second_start(script)
        if hasattr(script, "writer"):
            script.kill()
    with mounted(place, "-o", "loop", str(copy)):
        try:
            found = take_up(place / "run")
            return fs.cut, promises.broken(found, found.said)
        except (WalError, CheckpointError) as error:
            return fs.cut, [f"refused: {error}"]


@pytest.mark.timeout(300)
def test_real_power_cuts_at_every_operation_break_no_promise(
    image: Path, record_property: Callable[[str, object], None]
) -> None:
    broken: list[str] = []
    nth = 0
    while True:
        cut, wrong = cut_at(image, nth, PowerCut)
        broken += [f"cut at operation {nth}: {text}" for text in wrong]
        if not cut:
            break
        nth += 1
    record_property(COUNTED, f"{nth} real power cuts, {len(broken)} broken promises")
    assert broken == [] and nth > 120


@pytest.mark.timeout(300)
def test_real_power_cuts_show_what_was_not_synced(image: Path) -> None:
    results = [cut_at(image, nth, Forgetful) for nth in range(40, 130, 10)]
    assert all(cut for cut, _ in results)
    assert sum(bool(wrong) for _, wrong in results) > 0, "these cuts would find nothing"


# Damage


def flipped(raw: bytes, chance: random.Random, end: int) -> bytes:
    at = chance.randrange(end)
    return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]


def truncated(raw: bytes, chance: random.Random, end: int) -> bytes:
    return raw[: chance.randrange(end)]


def zeroed(raw: bytes, chance: random.Random, end: int) -> bytes:
    at = chance.randrange(end) // PAGE * PAGE
    return raw[:at] + bytes(min(PAGE, len(raw) - at)) + raw[at + PAGE :]


def committed_files(run: Path) -> dict[Path, int]:
    """Every file that a start relies on, with where its content ends: a log segment has zeros behind it."""
    files = {path: path.stat().st_size for path in sorted((run / "ckpt").glob("*/*"))}
    return files | {path: len(path.read_bytes().rstrip(b"\0")) for path in sorted((run / "wal").glob("*.log"))}


def is_noticed(run: Path, damaged: Path) -> bool:
    if damaged.suffix == ".log":
        with pytest.raises(WalError) as refusal:
            take_up(run)
        return damaged.name in str(refusal.value) or "record" in str(refusal.value)
    with pytest.raises(CheckpointError, match="not a usable checkpoint"):
        load_path(damaged.parent, ALONE, FileOps())
    found = take_up(run)
    newest = max(int(path.name[1:].split("-")[0]) for path in (run / "ckpt").glob("c*") if path.suffix != ".bad")
    return found.loaded is not None and found.loaded.seq == newest and found.loaded.path != damaged.parent


@pytest.mark.timeout(300)
def test_a_thousand_random_damages_are_all_noticed(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run = tmp_path / "run"
    first_start(run)
    second_start(Script(run, Unsynced()))
    files = committed_files(run)
    assert len(files) == 11, "three checkpoints of three files, two segments"
    chance = random.Random(3)
    done = 0
    while done < 1000:
        path = chance.choice(list(files))
        raw = path.read_bytes()
        worse = chance.choice([flipped, truncated, zeroed])(raw, chance, files[path])
        if worse == raw:
            continue
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        damaged = copy / path.relative_to(run)
        damaged.write_bytes(worse)
        assert is_noticed(copy, damaged), f"damage {done} of {path.name}"
        shutil.rmtree(copy)
        done += 1
    record_property(COUNTED, f"{done} damages to {len(files)} files, all noticed")
