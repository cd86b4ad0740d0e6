"""The log of decisions: what it keeps, what it refuses to believe, and what it does when the disk fails."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tolaria.errors import RunLocked, WalError
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import Wal, WalKind, WalRecord
from tolaria.recovery.wal.log import GROWTH_BYTES, LARGE_BYTES, RESERVE, ROTATE_BYTES, SEAL
from tolaria.recovery.wal.records import HEAD_BYTES, MAX_BODY_BYTES, encode, link

NOTES = [{"n": n} for n in range(5)]


def start(
    root: Path, fs: FileOps | None = None, *, run_id: str = "run", check_owner: Callable[[], None] = lambda: None
) -> tuple[Wal, list[WalRecord]]:
    return Wal.open(root, run_id=run_id, generation="g", facts={"seed": 1}, fs=fs or FileOps(), check_owner=check_owner)


def notes(records: list[WalRecord]) -> list[dict[str, Any]]:
    return [record.document for record in records if record.kind == WalKind.MODE]


def require_refused(root: Path, why: str) -> None:
    """Twice, so that the first refusal has neither repaired nor worsened anything."""
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    for _ in range(2):
        with pytest.raises(WalError, match=why):
            start(root)
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A log with five notes of one start that was killed: nothing was closed in order."""
    wal, earlier = start(tmp_path / "wal")
    assert earlier == []
    for note in NOTES:
        wal.append(WalKind.MODE, note)
    wal.close()
    return tmp_path / "wal"


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("*.log"))


def spans(path: Path) -> list[tuple[int, int]]:
    """(begin, end) of each record of a segment, walked by the announced lengths."""
    raw, at, found = path.read_bytes(), 0, []
    while size := int.from_bytes(raw[at : at + 4], "little"):
        found.append((at, at + 8 + size))
        at += 8 + size
    return found


def change(path: Path, at: int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(new)] = new
    path.write_bytes(bytes(raw))


def flip(path: Path, at: int, bit: int = 0) -> None:
    change(path, at, bytes([path.read_bytes()[at] ^ 1 << bit]))


# What it keeps


def test_records_come_back_in_order_with_the_start_they_belong_to(root: Path) -> None:
    wal, records = start(root)
    assert notes(records) == NOTES
    assert [record.lsn for record in records] == [1, 2, 3, 4, 5, 6] and wal.last_lsn == 7
    assert records[0].document == {"run_id": "run", "generation": "g", "facts": {"seed": 1}}
    assert wal.append(WalKind.DECISION, b"\x00\xff exact bytes") == 8
    wal.close()
    again, records = start(root)
    again.close()
    assert records[-1] == WalRecord(8, 2, WalKind.DECISION, b"\x00\xff exact bytes")
    assert [record.start for record in records] == [1] * 6 + [2] * 2
    with pytest.raises(WalError, match="not JSON"):
        _ = records[-1].document


def test_json_bodies_have_one_spelling(root: Path) -> None:
    wal, _ = start(root)
    wal.append(WalKind.GOOD, {"step": 1, "seq": 0})
    wal.close()
    _, records = reopened(root)
    assert records[-1].body == b'{"seq":0,"step":1}'


def reopened(root: Path) -> tuple[int, list[WalRecord]]:
    wal, records = start(root)
    wal.close()
    return wal.last_lsn, records


def test_every_append_is_synced_before_it_returns(tmp_path: Path) -> None:
    calls: list[str] = []

    class Noting(FileOps):
        def write_at(self, fd: int, data: memoryview, offset: int) -> int:
            calls.append(f"write {Path(os.readlink(f'/proc/self/fd/{fd}')).suffix}")
            return super().write_at(fd, data, offset)

        def datasync(self, fd: int) -> None:
            calls.append("sync")
            super().datasync(fd)

    wal, _ = start(tmp_path / "wal", Noting())
    calls.clear()
    wal.append(WalKind.MODE, {})
    wal.close()
    assert calls == ["write .log", "sync", "write "], "record, disk, and only then the seal"


def test_two_threads_append_without_losing_or_mixing_records(tmp_path: Path) -> None:
    wal, _ = start(tmp_path / "wal")
    threads = [
        threading.Thread(target=lambda who=who: [wal.append(WalKind.MODE, {"who": who, "n": n}) for n in range(50)])
        for who in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    wal.close()
    found = notes(reopened(tmp_path / "wal")[1])
    for who in range(2):
        assert [note["n"] for note in found if note["who"] == who] == list(range(50))


def test_a_new_segment_begins_when_one_has_grown_large(root: Path) -> None:
    wal, _ = start(root)
    before = len(segments(root))
    wal.rotate()
    assert len(segments(root)) == before
    while wal.last_lsn * MAX_BODY_BYTES < 7 * ROTATE_BYTES:
        wal.append(WalKind.MODE, b'"' + b"x" * (MAX_BODY_BYTES - 2) + b'"')
    wal.rotate()
    assert len(segments(root)) == before + 1
    wal.append(WalKind.MODE, {"n": 99})
    wal.close()
    last, records = reopened(root)
    assert records[-1].document == {"n": 99} and last == records[-1].lsn + 1
    assert [record.lsn for record in records] == list(range(1, last))


def test_a_run_that_never_rotates_stays_readable(root: Path) -> None:
    wal, _ = start(root)
    for _ in range(LARGE_BYTES // MAX_BODY_BYTES + 4):
        wal.append(WalKind.MODE, b"x" * MAX_BODY_BYTES)
    wal.close()
    assert max(path.stat().st_size for path in segments(root)) < LARGE_BYTES + 2 * MAX_BODY_BYTES
    reopened(root)


def test_a_record_that_is_too_long_is_refused_and_harms_nothing(root: Path) -> None:
    wal, _ = start(root)
    with pytest.raises(WalError, match="at most"):
        wal.append(WalKind.DECISION, bytes(MAX_BODY_BYTES + 1))
    assert wal.append(WalKind.DECISION, bytes(MAX_BODY_BYTES)) == 8
    wal.close()


def test_a_closed_log_takes_nothing_more_and_leaves_no_reserve(root: Path) -> None:
    wal, _ = start(root)
    assert (root / RESERVE).stat().st_size == 16 * 2**20
    wal.close()
    wal.close()
    assert not (root / RESERVE).exists()
    with pytest.raises(WalError, match="closed"):
        wal.append(WalKind.CLOSE, {})


def test_one_who_has_lost_the_run_writes_nothing(root: Path) -> None:
    taken_over: list[bool] = []

    def check_owner() -> None:
        if taken_over:
            raise RunLocked("taken over")

    wal, _ = start(root, check_owner=check_owner)
    taken_over.append(True)
    before = {path: path.read_bytes() for path in segments(root)}
    with pytest.raises(RunLocked):
        wal.append(WalKind.MODE, {})
    assert {path: path.read_bytes() for path in segments(root)} == before
    wal.close()
    with pytest.raises(RunLocked):
        start(root, check_owner=check_owner)


# What it refuses to believe


def test_a_torn_end_is_cut_off_wherever_it_is_torn(root: Path, tmp_path: Path) -> None:
    begin, end = spans(segments(root)[0])[-1]
    for at in range(begin + 1, end):
        place = tmp_path / f"torn{at}"
        shutil.copytree(root, place)
        (place / SEAL).unlink()  # the seal of the record before did not reach the disk either
        (path,) = segments(place)
        change(path, at, bytes(end - at))
        if path.read_bytes() == segments(root)[0].read_bytes():
            continue  # the record ends in zeros
        last, records = reopened(place)
        assert notes(records) == NOTES[:-1] and last == 6
        assert not any(path.read_bytes()[begin:]), "wiped out, so that the next segment follows a clean one"
        assert notes(reopened(place)[1]) == NOTES[:-1]


def test_a_segment_that_ends_in_the_middle_of_a_record_is_torn_too(root: Path) -> None:
    begin, end = spans(segments(root)[0])[-1]
    (root / SEAL).unlink()
    os.truncate(segments(root)[0], (begin + end) // 2)
    assert notes(reopened(root)[1]) == NOTES[:-1]
    assert notes(reopened(root)[1]) == NOTES[:-1]


def test_an_end_that_was_durable_may_not_be_missing(root: Path) -> None:
    begin, end = spans(segments(root)[0])[-1]
    change(segments(root)[0], begin, bytes(end - begin))
    require_refused(root, "record 6 was durable")


def test_damage_in_the_middle_is_refused_at_every_byte(root: Path) -> None:
    (path,) = segments(root)
    whole = path.read_bytes()
    (root / SEAL).unlink()
    begin, end = spans(path)[2]
    for at in range(begin, end):
        flip(path, at, at % 8)
        with pytest.raises(WalError, match="damaged, and sound records follow"):
            start(root)
        path.write_bytes(whole)


def test_a_repeated_end_is_refused(root: Path) -> None:
    (path,) = segments(root)
    begin, end = spans(path)[-1]
    change(path, end, path.read_bytes()[begin:end])
    require_refused(root, "record 6 stands where 7 should")


def test_a_lost_record_is_refused(root: Path) -> None:
    (path,) = segments(root)
    begin, end = spans(path)[3]
    raw = path.read_bytes()
    path.write_bytes(raw[:begin] + raw[end:])
    require_refused(root, "record 5 stands where 4 should")


def test_a_record_of_another_log_with_the_right_number_is_refused(root: Path) -> None:
    (path,) = segments(root)
    begin, end = spans(path)[-1]
    other = encode(WalRecord(6, 1, WalKind.MODE, b'{"n":4}'), link(b"somewhere else"))
    assert len(other) == end - begin
    change(path, begin, other)
    require_refused(root, "does not follow from record 5")


def test_a_log_of_another_run_is_refused(root: Path) -> None:
    with pytest.raises(WalError, match="of run 'run', not of 'other'"):
        start(root, run_id="other")
    assert notes(reopened(root)[1]) == NOTES


def test_a_stale_segment_of_another_run_is_refused(root: Path, tmp_path: Path) -> None:
    other, _ = start(tmp_path / "other", run_id="other")
    other.close()
    shutil.copy(segments(tmp_path / "other")[0], root / f"{7:020d}.log")
    require_refused(root, "does not begin with the record of its start")


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_segment_is_refused(root: Path, which: int) -> None:
    for _ in range(2):
        reopened(root)
    segments(root)[which].unlink()
    require_refused(root, "stands where")


def test_a_missing_last_segment_is_refused(root: Path) -> None:
    reopened(root)
    segments(root)[-1].unlink()
    require_refused(root, "record 7 was durable")


@pytest.mark.parametrize("content", [b"", bytes(GROWTH_BYTES), b"\x30\x00\x00\x00half of an OPEN record"])
def test_a_last_segment_that_was_not_begun_is_deleted(root: Path, content: bytes) -> None:
    path = root / f"{7:020d}.log"
    path.write_bytes(content)
    last, records = reopened(root)
    assert notes(records) == NOTES and last == 7
    assert path.exists() and spans(path), "this start's own segment took its name"
    assert notes(reopened(root)[1]) == NOTES


def test_an_empty_log_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "wal").mkdir()
    (tmp_path / "wal" / f"{1:020d}.log").write_bytes(b"")
    last, records = reopened(tmp_path / "wal")
    assert (last, records) == (1, [])


def test_a_record_of_a_kind_from_the_future_is_refused(root: Path) -> None:
    (path,) = segments(root)
    begin, end = spans(path)[-1]
    raw = path.read_bytes()
    body = raw[begin + HEAD_BYTES : end]
    prev = raw[begin + HEAD_BYTES - 16 : begin + HEAD_BYTES]
    strange = encode(WalRecord(6, 1, 99, body), prev)  # type: ignore[arg-type]
    change(path, begin, strange)
    require_refused(root, "kind 99, which this version does not know")


def test_a_segment_that_is_a_link_or_a_pipe_or_huge_is_refused(root: Path, tmp_path: Path) -> None:
    path = root / f"{7:020d}.log"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WalError, match="cannot be read"):
        start(root)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(WalError, match="cannot be read"):
        start(root)
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(WalError, match="cannot be read"):
        start(root)


def test_other_names_in_the_folder_are_left_alone(root: Path) -> None:
    (root / "notes.txt").write_text("mine")
    assert notes(reopened(root)[1]) == NOTES
    assert (root / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"TSEA", bytes(16), b"TSEA" + bytes(12)])
def test_a_damaged_seal_is_as_good_as_none(root: Path, content: bytes) -> None:
    (root / SEAL).write_bytes(content)
    assert notes(reopened(root)[1]) == NOTES


# When the disk fails


class Failing(FileOps):
    """From the moment that ``code`` is set, the primitive called ``name`` raises it, ``times`` times."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.code = 0
        self.times = 0
        self.fired = 0
        self.calls: list[str] = []

    def reach(self, name: str) -> None:
        self.calls.append(name)
        if self.code and name == self.name and self.fired < self.times:
            self.fired += 1
            raise OSError(self.code, os.strerror(self.code))

    def write_at(self, fd: int, data: memoryview, offset: int) -> int:
        if self.code and self.name == "write_at" and self.fired < self.times:
            super().write_at(fd, data[: len(data) // 2], offset)  # the disk takes a part, then no more
        self.reach("write_at")
        return super().write_at(fd, data, offset)

    def datasync(self, fd: int) -> None:
        self.reach("datasync")
        super().datasync(fd)

    def allocate(self, fd: int, size: int) -> None:
        self.reach("allocate")
        super().allocate(fd, size)


@pytest.mark.parametrize("name", ["write_at", "datasync"])
def test_a_failing_disk_is_not_asked_again(root: Path, name: str) -> None:
    fs = Failing(name)
    wal, _ = start(root, fs)
    fs.code, fs.times = errno.EIO, 1
    with pytest.raises(WalError, match="nothing more may take effect"):
        wal.append(WalKind.MODE, {"n": 5})
    assert fs.fired == 1 and wal.last_lsn == 7
    fs.calls.clear()
    for _ in range(2):
        with pytest.raises(WalError, match="nothing more may take effect"):
            wal.append(WalKind.MODE, {"n": 6})
    wal.rotate()
    assert fs.calls == []
    wal.close()
    found = notes(reopened(root)[1])
    assert found in (NOTES, [*NOTES, {"n": 5}]), "whole or not at all, and nothing after it"


def fill_segment(wal: Wal) -> None:
    """So that the next record needs new room."""
    room = GROWTH_BYTES - wal._end % GROWTH_BYTES
    wal.append(WalKind.MODE, b"x" * (room - HEAD_BYTES))


@pytest.mark.parametrize("name", ["write_at", "datasync", "allocate"])
def test_on_a_full_disk_it_lives_on_its_reserve(root: Path, name: str) -> None:
    fs = Failing(name)
    wal, _ = start(root, fs)
    fill_segment(wal)
    last = wal.last_lsn
    fs.code, fs.times = errno.ENOSPC, 1
    assert wal.append(WalKind.VOID, {"branch": 1}) == last + 2, "a new segment's OPEN comes before it"
    assert fs.fired == 1 and wal.low_space and not (root / RESERVE).exists()
    wal.append(WalKind.CLOSE, {})
    wal.close()
    records = reopened(root)[1]
    assert [record.kind for record in records[-3:]] == [WalKind.OPEN, WalKind.VOID, WalKind.CLOSE]


def test_a_disk_that_stays_full_ends_it(root: Path) -> None:
    fs = Failing("allocate")
    wal, _ = start(root, fs)
    fill_segment(wal)
    fs.code, fs.times = errno.ENOSPC, 99
    for _ in range(2):
        with pytest.raises(WalError, match="No space"):
            wal.append(WalKind.MODE, {"n": 7})
    assert fs.fired == 2, "once, and once more on the reserve"
    wal.close()
    assert {"n": 7} not in [r.document for r in reopened(root)[1] if r.body.startswith(b"{")]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_log_that_cannot_be_begun_refuses_the_start(root: Path, code: int) -> None:
    fs = Failing("datasync")
    fs.code, fs.times = code, 1
    with pytest.raises(WalError, match="cannot be written"):
        start(root, fs)
    assert fs.fired == 1
    assert notes(reopened(root)[1]) == NOTES


def test_without_room_for_a_reserve_it_works_without(root: Path) -> None:
    class Small(FileOps):
        def free_bytes(self, path: Path) -> int:
            return 1000

    wal, _ = start(root, Small())
    assert not (root / RESERVE).exists()
    wal.append(WalKind.MODE, {"n": 5})
    wal.close()
    assert notes(reopened(root)[1])[-1] == {"n": 5}
