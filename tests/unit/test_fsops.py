"""File operations: exclusive, private, synced, link-proof."""

import errno
import os
import stat
from pathlib import Path

import pytest

from tolaria.recovery.fsops import WRITE_PIECE_BYTES, FileOps


class Journal(FileOps):
    """Notes the order of the system calls that matter for durability."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def fsync(self, fd: int) -> None:
        self.calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        super().fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self.calls.append(("rename", target.name))
        super().rename(source, target)


class ShortWrites(FileOps):
    def __init__(self) -> None:
        self.num_writes = 0

    def write(self, fd: int, data: memoryview) -> int:
        self.num_writes += 1
        return super().write(fd, data[:3])


def mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_write_new_is_exclusive_private_and_synced(tmp_path: Path) -> None:
    fs = Journal()
    file = tmp_path / "a"
    fs.write_new(file, [b"one", memoryview(b"two"), b""], 6)
    assert file.read_bytes() == b"onetwo"
    assert mode(file) == 0o600
    assert fs.calls == [("fsync", "a")]
    with pytest.raises(FileExistsError):
        fs.write_new(file, [b"x"], 1)
    assert file.read_bytes() == b"onetwo"


def test_write_new_does_not_write_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(FileExistsError):
        FileOps().write_new(tmp_path / "link", [b"x"], 1)
    assert not target.exists()


def test_short_writes_are_continued(tmp_path: Path) -> None:
    fs = ShortWrites()
    fs.write_new(tmp_path / "a", [b"0123456789"], 10)
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert fs.num_writes == 4


def test_large_chunks_are_written_in_pieces(tmp_path: Path) -> None:
    sizes = []

    class Sizes(FileOps):
        def write(self, fd: int, data: memoryview) -> int:
            sizes.append(len(data))
            return super().write(fd, data)

    content = bytes(WRITE_PIECE_BYTES) + b"end"
    Sizes().write_new(tmp_path / "a", [content], len(content))
    assert sizes == [WRITE_PIECE_BYTES, 3]
    assert (tmp_path / "a").read_bytes() == content


@pytest.mark.parametrize("announced", [2, 4])
def test_a_wrong_size_is_an_error(tmp_path: Path, announced: int) -> None:
    fs = Journal()
    with pytest.raises(OSError, match="announced"):
        fs.write_new(tmp_path / "a", [b"123"], announced)
    assert fs.calls == []


def test_a_file_system_that_cannot_reserve_is_written_anyway(tmp_path: Path) -> None:
    class NoReserve(FileOps):
        code = errno.EOPNOTSUPP

        def allocate(self, fd: int, size: int) -> None:
            raise OSError(self.code, "no")

    fs = NoReserve()
    fs.write_new(tmp_path / "a", [b"x"], 1)
    assert (tmp_path / "a").read_bytes() == b"x"
    fs.code = errno.ENOSPC
    with pytest.raises(OSError, match="no"):
        fs.write_new(tmp_path / "b", [b"x"], 1)


def test_replace_file_syncs_before_it_renames_and_the_folder_after(tmp_path: Path) -> None:
    fs = Journal()
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f.tmp").write_bytes(b"left by a crash")
    fs.replace_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert fs.calls == [("fsync", "f.tmp"), ("rename", "f"), ("fsync", tmp_path.name)]
    assert fs.list_dir(tmp_path) == ["f"]


def test_mkdir_makes_private_parents_and_syncs_each(tmp_path: Path) -> None:
    fs = Journal()
    deep = tmp_path / "x" / "y"
    fs.mkdir(deep)
    assert mode(deep) == mode(deep.parent) == 0o700
    assert fs.calls == [("fsync", tmp_path.name), ("fsync", "x")]
    fs.mkdir(deep)
    assert len(fs.calls) == 2


def test_remove_tree_removes_links_and_not_what_they_point_to(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_bytes(b"x")
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "inner" / "link").symlink_to(kept)
    (tree / "file").write_bytes(b"x")
    FileOps().remove_tree(tree)
    assert not tree.exists() and (kept / "file").exists()
    (tmp_path / "link").symlink_to(kept)
    FileOps().remove_tree(tmp_path / "link")
    assert FileOps().list_dir(tmp_path) == ["kept"]


def test_read_file_refuses_what_is_no_plain_file_of_bounded_size(tmp_path: Path) -> None:
    fs = FileOps()
    (tmp_path / "a").write_bytes(b"12345")
    assert fs.read_file(tmp_path / "a", 5) == b"12345"
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    expected = {"a": errno.EFBIG, "link": errno.ELOOP, "pipe": errno.EINVAL, ".": errno.EINVAL, "no": errno.ENOENT}
    for name, code in expected.items():
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the code is checked below
            fs.read_file(tmp_path / name, 4)
        assert caught.value.errno == code, name


def test_is_dir_does_not_follow_links(tmp_path: Path) -> None:
    fs = FileOps()
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_bytes(b"")
    (tmp_path / "link").symlink_to("d")
    assert [fs.is_dir(tmp_path / n) for n in ("d", "f", "link", "no", "f/x")] == [True, False, False, False, False]


def test_free_bytes_is_what_the_system_says(tmp_path: Path) -> None:
    assert 0 < FileOps().free_bytes(tmp_path) < 2**63
