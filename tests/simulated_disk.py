"""A disk on paper: what may be found on it when the power goes at a given moment.

`Recorder` carries file operations out and notes them; `replay` does the first n of them on paper; `survivors` lists
what a power cut may leave: of what was not synced anything may be lost.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tolaria.recovery.fsops import FileOps

Write: TypeAlias = tuple[int, bytes]
Loss: TypeAlias = Callable[[list[Write]], list[Write]]
Tree: TypeAlias = dict[str, Any]


@dataclass
class File:
    """``durable`` content and the writes that the disk may or may not have seen, in order."""

    durable: bytes = b""
    pending: list[Write] = field(default_factory=list)
    position: int = 0

    def write(self, data: bytes, offset: int | None = None) -> None:
        at = self.position if offset is None else offset
        self.pending.append((at, data))
        self.position = at + len(data) if offset is None else self.position

    def sync(self) -> None:
        self.durable = self.after(lambda writes: writes)
        self.pending = []

    def after(self, lose: Loss) -> bytes:
        data = bytearray(self.durable)
        for at, new in lose(self.pending):
            data.extend(bytes(max(0, at + len(new) - len(data))))
            data[at : at + len(new)] = new
        return bytes(data)


@dataclass
class Folder:
    """``durable`` entries, and changes that the disk may or may not have seen, in order."""

    entries: "dict[str, Node]" = field(default_factory=dict)
    durable: "dict[str, Node]" = field(default_factory=dict)
    pending: "list[dict[str, Node | None]]" = field(default_factory=list)

    def change(self, change: "dict[str, Node | None]") -> None:
        self.pending.append(change)
        self.entries = _applied(self.entries, [change])

    def sync(self) -> None:
        self.durable = dict(self.entries)
        self.pending = []


Node: TypeAlias = File | Folder
Operation: TypeAlias = tuple[str, Path, Any]


def _applied(entries: dict[str, Node], changes: list[dict[str, Node | None]]) -> dict[str, Node]:
    merged: dict[str, Node | None] = dict(entries)
    for change in changes:
        merged |= change
    return {name: node for name, node in merged.items() if node is not None}


class Recorder(FileOps):
    """Carries everything out but the syncs and notes what was asked; ``forget(path)``: a sync that never was."""

    def __init__(self, forget: Callable[[Path], bool] = lambda path: False) -> None:
        self.operations: list[Operation] = []
        self.forget = forget
        self.forgotten = 0

    def note(self, kind: str, path: Path, more: Any = None) -> None:
        self.operations.append((kind, path, more))

    def create(self, path: Path) -> int:
        self.note("create", path)
        return super().create(path)

    def allocate(self, fd: int, size: int) -> None:
        self.note("allocate", _path_of(fd), size)
        super().allocate(fd, size)

    def write(self, fd: int, data: memoryview) -> int:
        self.note("write", _path_of(fd), (None, bytes(data)))
        return super().write(fd, data)

    def write_at(self, fd: int, data: memoryview, offset: int) -> int:
        self.note("write", _path_of(fd), (offset, bytes(data)))
        return super().write_at(fd, data, offset)

    def fsync(self, fd: int) -> None:
        if self.forget(_path_of(fd)):
            self.forgotten += 1
        else:
            self.note("sync", _path_of(fd))

    datasync = fsync

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

    def free_bytes(self, path: Path) -> int:
        return 2**25  # enough for small checkpoints, too little for a log to make its reserve: that says nothing here


def _path_of(fd: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{fd}"))


def read_tree(path: Path) -> Folder:
    """A folder on disk, all of it durable."""
    folder = Folder()
    for child in path.iterdir():
        folder.entries[child.name] = read_tree(child) if child.is_dir() else File(child.read_bytes())
    folder.sync()
    return folder


def copy_of(folder: Folder) -> Folder:
    """Another disk with the same durable content."""
    copy = Folder({n: copy_of(c) if isinstance(c, Folder) else File(c.durable) for n, c in folder.entries.items()})
    copy.sync()
    return copy


def replay(disk: Folder, root: Path, operations: list[Operation]) -> None:
    """Do on paper what was recorded under ``root``."""

    def find(path: Path) -> Node:
        node: Node = disk
        for part in path.relative_to(root).parts:
            assert isinstance(node, Folder)
            node = node.entries[part]
        return node

    for kind, path, more in operations:
        if kind in ("write", "allocate", "sync"):
            node = find(path)
            if kind == "sync":
                node.sync()
                continue
            assert isinstance(node, File)
            if kind == "write":
                node.write(more[1], more[0])
            else:
                size = len(node.after(lambda writes: writes))
                node.write(bytes(max(0, more - size)), size)
            continue
        folder = find(path.parent)
        assert isinstance(folder, Folder)
        if kind == "rename":
            folder.change({path.name: None, more.name: folder.entries[path.name]})
        else:
            new: dict[str, Node | None] = {"create": File(), "make_dir": Folder(), "remove": None}
            folder.change({path.name: new[kind]})


LOSSES: dict[str, Loss] = {
    "none": lambda writes: writes,
    "all": lambda writes: [],
    "second halves": lambda writes: [(at, data[: len(data) // 2]) for at, data in writes],
    "first halves": lambda writes: [(at + len(data) // 2, data[len(data) // 2 :]) for at, data in writes],
    "content, not size": lambda writes: [(at, bytes(len(data))) for at, data in writes],
    "all but the last": lambda writes: writes[-1:],
    "the last": lambda writes: writes[:-1],
}


def survivors(folder: Folder, lose: Loss) -> Iterator[Tree]:
    """Every state in which a folder may be found after a power cut, as nested dicts of bytes."""
    for kept in range(len(folder.pending) + 1):
        entries = _applied(folder.durable, folder.pending[:kept])
        choices: list[list[tuple[str, Any]]] = []
        for name, node in sorted(entries.items()):
            if isinstance(node, File):
                choices.append([(name, node.after(lose))])
            else:
                choices.append([(name, state) for state in survivors(node, lose)])
        for combination in itertools.product(*choices):
            yield dict(combination)


def write_tree(path: Path, tree: Tree) -> None:
    """Put such a state on a real disk."""
    path.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(path / name, content)
        else:
            (path / name).write_bytes(content)
