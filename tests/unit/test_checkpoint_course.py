"""Checkpoints and the log: which are loaded, which are kept, and what happens when a commit cannot be logged."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.run_on_disk import ALONE, RUN_ID, Script, Unsynced, first_start, open_log, payload, take_up
from tests.small_checkpoints import payload as plain
from tolaria.errors import CheckpointError, RunLocked, WalError
from tolaria.recovery.checkpoint import CheckpointWriter, Loaded, Retention, load_newest
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import WalKind

Reports = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """c0-s0 and c1-s1, logged; killed."""
    first_start(tmp_path)
    return tmp_path


def load(root: Path, reports: Reports | None = None, **options: Any) -> Loaded | None:
    seen = reports if reports is not None else []
    return load_newest(
        root / "ckpt", ALONE, FileOps(), report=lambda kind, details: seen.append((kind, details)), **options
    )


def started(root: Path, fs: FileOps | None = None) -> Script:
    script = Script(root, fs or Unsynced())
    script.begin()
    return script


def damage(folder: Path) -> None:
    (folder / "state-00000.json").write_bytes(b"{}")


# What is loaded


def test_a_checkpoint_knows_its_place_in_the_course_and_in_the_log(root: Path) -> None:
    script = started(root)
    before = script.wal.last_lsn
    script.save(2, 7)
    script.kill()
    loaded = load(root)
    assert loaded is not None
    assert (loaded.seq, loaded.step, loaded.branch, loaded.wal_lsn) == (2, 2, 7, before)
    manifest = (root / "ckpt" / "c2-s2" / "MANIFEST.json").read_bytes()
    assert loaded.manifest_sha256 == hashlib.sha256(manifest).hexdigest()
    record = take_up(root).records[-1]
    assert record.kind == WalKind.CHECKPOINT
    assert record.document == {"seq": 2, "step": 2, "branch": 7, "acts": 0, "manifest_sha256": loaded.manifest_sha256}


@pytest.mark.parametrize("by_name", [True, False])
def test_one_that_is_off_the_course_is_passed_over_and_left_as_it_is(root: Path, by_name: bool) -> None:
    reports: Reports = []

    def accept(seq: int, step: int, branch: int | None) -> bool:
        return seq != 1 if by_name else branch is None or seq != 1

    loaded = load(root, reports, accept=accept)
    assert loaded is not None and loaded.seq == 0 and reports == []
    assert sorted(os.listdir(root / "ckpt")) == ["c0-s0", "c1-s1"]


def test_when_none_is_on_the_course_there_is_none(root: Path) -> None:
    assert load(root, accept=lambda seq, step, branch: False) is None


def test_one_whose_manifest_is_not_the_logged_one_is_damaged(root: Path) -> None:
    reports: Reports = []
    loaded = load(root, reports, known={1: "0" * 64})
    assert loaded is not None and loaded.seq == 0
    assert [details["reason"] for _, details in reports] == [
        f"{root}/ckpt/c1-s1: its manifest is not the one in the log"
    ]
    assert (root / "ckpt" / "c1-s1.bad").is_dir()


def test_a_log_that_ends_before_the_checkpoint_was_saved_has_lost_records(root: Path) -> None:
    loaded = load(root)
    assert loaded is not None and loaded.wal_lsn > 1
    assert load(root, last_lsn=loaded.wal_lsn) is not None
    for _ in range(2):
        with pytest.raises(CheckpointError, match="the log of decisions has lost its end"):
            load(root, last_lsn=loaded.wal_lsn - 1)
    assert sorted(os.listdir(root / "ckpt")) == ["c0-s0", "c1-s1"], "the checkpoint is not to blame"


def test_all_damaged_is_a_fresh_start_only_for_one_who_asks_for_it(root: Path) -> None:
    for name in ("c0-s0", "c1-s1"):
        damage(root / "ckpt" / name)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"run\.allow_fresh true"):
            load(root)
    assert load(root, allow_fresh=True) is None
    assert sorted(os.listdir(root / "ckpt")) == ["c0-s0.bad", "c1-s1.bad"]


def test_a_commit_that_died_before_it_was_logged_counts_and_is_logged_by_the_next_start(root: Path) -> None:
    class Dying(Unsynced):
        def datasync(self, fd: int) -> None:
            raise OSError(errno.EIO, "gone")

    script = started(root)
    script.wal._fs = Dying()
    script.writer.save(payload(2, 2, 0))
    assert script.writer.wait(30)
    with pytest.raises(WalError, match="nothing more may take effect"):
        script.writer.poll()
    script.kill()
    for path in sorted((root / "wal").glob("*.log"))[-1:]:  # and the record itself did not reach the disk
        raw = path.read_bytes()
        at = raw.rindex(b'{"acts":0,"branch":0,"manifest_sha256"')
        path.write_bytes(raw[:at] + bytes(len(raw) - at))
    first, second = take_up(root), take_up(root)
    for found in (first, second):
        assert found.loaded is not None and found.loaded.seq == 2
    logged = [[r.document["seq"] for r in f.records if r.kind == WalKind.CHECKPOINT] for f in (first, second)]
    assert logged == [[0, 1], [0, 1, 2]]


# When it cannot be logged


def test_a_checkpoint_that_cannot_be_logged_stops_the_run_and_deletes_nothing(root: Path) -> None:
    fired = []

    class NoSync(Unsynced):
        def datasync(self, fd: int) -> None:
            fired.append(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    script = started(root)
    script.wal._fs = NoSync()
    script.writer.save(payload(2, 2, 0))
    assert script.writer.wait(30)
    with pytest.raises(WalError, match="Input/output error"):
        script.writer.poll()
    assert len(fired) == 1
    script.kill()
    assert sorted(os.listdir(root / "ckpt")) == ["c0-s0", "c1-s1", "c2-s2"], "retention comes after the log"


def test_one_who_lost_the_run_after_the_commit_does_not_log_it(root: Path) -> None:
    script = started(root)

    def check_owner() -> None:
        raise RunLocked("taken over")

    script.wal._check_owner = check_owner
    last = script.wal.last_lsn
    script.writer.save(payload(2, 2, 0))
    assert script.writer.wait(30)
    with pytest.raises(RunLocked):
        script.writer.poll()
    assert script.wal.last_lsn == last
    script.kill()


def test_the_log_gets_a_new_segment_once_a_checkpoint_is_committed(root: Path) -> None:
    script = started(root, FileOps())
    for _ in range(5):
        script.wal.append(WalKind.MODE, {"long": "x" * 250_000})
    before = len(list((root / "wal").glob("*.log")))
    script.save(2, 0)
    assert len(list((root / "wal").glob("*.log"))) == before + 1
    script.kill()
    found = take_up(root)
    assert found.loaded is not None and found.loaded.seq == 2


# What is kept


def keep_after(root: Path, retention: Retention, *, saves: int = 3, keep: int = 2) -> list[str]:
    writer = CheckpointWriter(
        root / "ckpt", run_id=RUN_ID, generation="g", peers=ALONE, fs=Unsynced(), keep=keep,
        retention=lambda: retention,
    )  # fmt: skip
    for step in range(2, 2 + saves):
        writer.save(plain(step))
        assert writer.wait(30)
        (outcome,) = writer.poll()
        assert outcome.error is None and outcome.cleanup_error is None
    writer.close()
    return sorted(os.listdir(root / "ckpt"))


def test_the_newest_stay(root: Path) -> None:
    assert keep_after(root, Retention()) == ["c3-s3", "c4-s4"]


def test_the_protected_stay(root: Path) -> None:
    assert keep_after(root, Retention(frozenset({1}))) == ["c1-s1", "c3-s3", "c4-s4"]


def test_the_pinned_stay_until_the_pin_is_gone(root: Path) -> None:
    (root / "ckpt" / "c0-s0.pin").touch()
    assert keep_after(root, Retention()) == ["c0-s0", "c0-s0.pin", "c3-s3", "c4-s4"]
    (root / "ckpt" / "c0-s0.pin").unlink()
    assert keep_after(root, Retention(), saves=1) == ["c4-s4", "c5-s2"]


def test_the_void_go_first_and_take_no_place_of_the_newest(root: Path) -> None:
    assert keep_after(root, Retention(void=frozenset({1})), saves=1) == ["c0-s0", "c2-s2"]


def test_a_void_one_is_not_protected_but_may_be_pinned(root: Path) -> None:
    (root / "ckpt" / "c1-s1.pin").touch()
    assert keep_after(root, Retention(frozenset({0}), frozenset({0, 1}))) == ["c1-s1", "c1-s1.pin", "c3-s3", "c4-s4"]


def test_the_one_just_committed_stays_even_if_void(root: Path) -> None:
    assert keep_after(root, Retention(void=frozenset({2})), saves=1) == ["c0-s0", "c1-s1", "c2-s2"]


def test_after_a_return_the_void_one_is_neither_loaded_nor_kept(root: Path) -> None:
    script = started(root)
    script.save(2, 0)
    script.save(3, 0)
    script.go_back(2, 1, 3)
    script.kill()
    assert (root / "ckpt" / "c3-s3").is_dir(), "a return itself deletes nothing"
    found = take_up(root)
    assert found.loaded is not None and (found.loaded.seq, found.loaded.branch) == (2, 0)
    script = started(root)
    script.save(3, 1)
    script.kill()
    assert sorted(os.listdir(root / "ckpt")) == ["c2-s2", "c4-s3"]
    found = take_up(root)
    assert found.loaded is not None and (found.loaded.seq, found.loaded.branch) == (4, 1)


def test_a_log_and_its_run_are_opened_again_and_again(root: Path) -> None:
    for start in range(3, 8):
        wal, records, _ = open_log(root, Unsynced())
        assert records[-1].start == start - 2
        wal.close()
