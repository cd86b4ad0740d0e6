"""Checkpoints when the disk fails, the process dies, or the power goes, at every single file operation."""

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from tolaria.dist import Peers
from tolaria.recovery.checkpoint import CheckpointWriter, Loaded, Payload, SaveOutcome, load_newest
from tolaria.recovery.commit import Abandoned, Committer
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.staging import HostBuffers

ALONE = Peers(None, 0, 1)
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


def payload(step: int) -> Payload:
    tensors = {"w": torch.full((64,), float(step)), "v": torch.full((3,), step, dtype=torch.int64)}
    return Payload(step=step, tensors=tensors, meta={"m": step}, local_tensors={}, local_meta={"l": step})


def save(root: Path, step: int, fs: FileOps) -> SaveOutcome:
    writer = CheckpointWriter(root, run_id="r", generation="g", peers=ALONE, fs=fs, keep=2)
    writer.save(payload(step))
    assert writer.wait(30)
    (outcome,) = writer.poll()
    return outcome


def load(root: Path, fs: FileOps | None = None) -> Loaded | None:
    return load_newest(root, ALONE, fs or FileOps(), report=lambda kind, info: None)


def require_whole(loaded: Loaded | None, steps: set[int]) -> None:
    """The loaded state is one of these, in all its parts."""
    assert loaded is not None and loaded.step in steps
    expected = payload(loaded.step)
    assert loaded.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert (loaded.meta, loaded.local_meta) == (expected.meta, expected.local_meta)


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
        committer.commit(staged)
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


# --- power cuts: what was not synced may be lost, in any combination ----------------------------------------


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
