"""Checkpoints when the power goes, at any moment: what was not synced is lost, in any combination."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.small_checkpoints import load, require_whole, save
from tolaria.recovery.fsops import FileOps


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, c0-s0 and c1-s1; the next save commits c2 and deletes c0."""
    for step in (0, 1):
        save(tmp_path / "ckpt", step, FileOps())
    return tmp_path / "ckpt"


@dataclass
class File:
    data: bytes = b""
    durable: bytes | None = None


@dataclass
class Folder:
    """``durable`` entries, and changes that the disk may or may not have seen, in order."""

    entries: dict[str, "Node"] = field(default_factory=dict)
    durable: dict[str, "Node"] = field(default_factory=dict)
    pending: list[dict[str, "Node | None"]] = field(default_factory=list)

    def change(self, change: dict[str, "Node | None"]) -> None:
        self.pending.append(change)
        self.entries = applied(self.entries, [change])

    def sync(self) -> None:
        self.durable = dict(self.entries)
        self.pending = []


Node: TypeAlias = File | Folder
Operation: TypeAlias = tuple[str, Path, Any]


def applied(entries: dict[str, Node], changes: list[dict[str, Node | None]]) -> dict[str, Node]:
    merged: dict[str, Node | None] = dict(entries)
    for change in changes:
        merged |= change
    return {name: node for name, node in merged.items() if node is not None}


class Recorder(FileOps):
    """Carries everything out and notes what was asked; ``forget`` names files whose fsync is not carried out."""

    def __init__(self, forget: Callable[[str], bool] = lambda name: False) -> None:
        self.operations: list[Operation] = []
        self.forget = forget

    def note(self, kind: str, path: Path, more: Any = None) -> None:
        self.operations.append((kind, path, more))

    def create(self, path: Path) -> int:
        self.note("create", path)
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        self.note("write", Path(os.readlink(f"/proc/self/fd/{fd}")), bytes(data))
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if not self.forget(path.name):
            self.note("fsync", path)

    def rename(self, source: Path, target: Path) -> None:
        self.note("rename", source, target)
        super().rename(source, target)

    def make_dir(self, path: Path) -> None:
        self.note("make_dir", path)
        super().make_dir(path)

    def unlink(self, path: Path) -> None:
        self.note("remove", path)
        super().unlink(path)

    def remove_dir(self, path: Path) -> None:
        self.note("remove", path)
        super().remove_dir(path)


def read_tree(path: Path) -> Folder:
    """A folder on disk, all of it durable."""
    folder = Folder()
    for child in path.iterdir():
        node: Node = read_tree(child) if child.is_dir() else File(child.read_bytes(), child.read_bytes())
        folder.entries[child.name] = node
    folder.sync()
    return folder


def replay(disk: Folder, root: Path, operations: list[Operation]) -> None:
    def find(path: Path) -> Node:
        node: Node = disk
        for part in path.relative_to(root).parts:
            assert isinstance(node, Folder)
            node = node.entries[part]
        return node

    for kind, path, more in operations:
        node = find(path if kind in ("write", "fsync") else path.parent)
        if kind == "write":
            assert isinstance(node, File)
            node.data += more
        elif kind == "fsync" and isinstance(node, File):
            node.durable = node.data
        elif kind == "fsync" and isinstance(node, Folder):
            node.sync()
        elif isinstance(node, Folder):
            new: dict[str, dict[str, Node | None]] = {
                "create": {path.name: File()},
                "make_dir": {path.name: Folder()},
                "remove": {path.name: None},
                "rename": {path.name: None, more.name if more else "": node.entries.get(path.name)},
            }
            node.change(new[kind])


DATA_LOSSES: list[Callable[[bytes], bytes]] = [
    lambda data: data,
    lambda data: b"",
    lambda data: data[: len(data) // 2],
    lambda data: bytes(len(data)),
]


def survivors(folder: Folder, lose: Callable[[bytes], bytes]) -> Iterator[dict[str, Any]]:
    """Every state in which a folder may be found after a power cut, as nested dicts of bytes."""
    for kept in range(len(folder.pending) + 1):
        entries = applied(folder.durable, folder.pending[:kept])
        choices = []
        for name, node in sorted(entries.items()):
            if isinstance(node, File):
                choices.append([(name, node.durable if node.durable == node.data else lose(node.data))])
            else:
                choices.append([(name, state) for state in survivors(node, lose)])
        for combination in itertools.product(*choices):
            yield dict(combination)


def write_tree(path: Path, tree: dict[str, Any]) -> None:
    path.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(path / name, content)
        else:
            (path / name).write_bytes(content)


def power_cut_violations(root: Path, scratch: Path, forget: Callable[[str], bool]) -> tuple[int, int]:
    """(different states after a power cut at any moment of a save, those that lost something)."""
    before = read_tree(root)
    recorder = Recorder(forget)
    assert save(root, 2, recorder).error is None
    operations = recorder.operations
    commit = next(i for i, (kind, path, _) in enumerate(operations) if kind == "rename" and path.name == "c2-s2.tmp")
    trash = next(i for i, (kind, path, _) in enumerate(operations) if kind == "rename" and path.name == "c0-s0")
    assert commit < trash
    seen: set[str] = set()
    violations = 0
    for length, lose in itertools.product(range(len(operations) + 1), DATA_LOSSES):
        disk = read_copy(before)
        replay(disk, root, operations[:length])
        # Retention starts only when the checkpoint is durable, and the caller is told after it.
        acceptable = {2} if length > trash else {1, 2}
        for tree in survivors(disk, lose):
            key = repr((sorted(acceptable), tree))
            if key in seen:
                continue
            seen.add(key)
            place = scratch / str(len(seen))
            write_tree(place, tree)
            loaded = load(place)
            violations += loaded is None or loaded.step not in acceptable
            if loaded is not None:
                require_whole(loaded, {0, 1, 2})
    return len(seen), violations


def read_copy(folder: Folder) -> Folder:
    copy = Folder(
        {n: read_copy(c) if isinstance(c, Folder) else File(c.data, c.durable) for n, c in folder.entries.items()}
    )
    copy.sync()
    return copy


def test_a_power_cut_at_any_moment_loses_nothing_that_was_acknowledged(root: Path, tmp_path: Path) -> None:
    num_states, violations = power_cut_violations(root, tmp_path, lambda name: False)
    assert num_states > 20
    assert violations == 0


@pytest.mark.parametrize(
    "forgotten", ["shard-00000.safetensors", "state-00000.json", "MANIFEST.json", "c2-s2.tmp", "ckpt"]
)
def test_each_fsync_is_needed(root: Path, tmp_path: Path, forgotten: str) -> None:
    _, violations = power_cut_violations(root, tmp_path, lambda name: name == forgotten)
    assert violations > 0
