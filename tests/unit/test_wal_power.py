"""Log, checkpoints and a return together, when the power goes at any moment, also while a start recovers."""

import hashlib
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.matrix import COUNTED
from tests.run_on_disk import Script, broken_promises, first_start, second_start, take_up
from tests.simulated_disk import LOSSES, Operation, Recorder, copy_of, read_tree, replay, survivors, write_tree
from tolaria.errors import CheckpointError, WalError

EVERY_NTH = 25


@dataclass
class Recorded:
    """A start, operation by operation, with what it had promised after how many of them."""

    operations: list[Operation]
    said: list[bytes]
    promises: list[tuple[int, str, Any]] = field(default_factory=list)
    forgotten: int = 0

    def promised_after(self, length: int) -> tuple[int, list[tuple[int, int, int]]]:
        kept = [(kind, what) for count, kind, what in self.promises if count <= length]
        return max((w for k, w in kept if k == "said"), default=2), [w for k, w in kept if k == "saved"]


def record(root: Path, forget: Callable[[Path], bool]) -> Recorded:
    recorder = Recorder(forget)
    recorded = Recorded(recorder.operations, [])
    script = Script(root, recorder, lambda kind, what: recorded.promises.append((len(recorder.operations), kind, what)))
    second_start(script)
    recorded.said = take_up(root).said
    recorded.forgotten = recorder.forgotten
    return recorded


def key_of(promised: object, tree: object) -> bytes:
    return hashlib.sha256(repr((promised, tree)).encode()).digest()


def violations_of(place: Path, said: list[bytes], promised: tuple[int, list[tuple[int, int, int]]]) -> list[str]:
    try:
        return broken_promises(take_up(place), said, *promised)
    except (WalError, CheckpointError) as error:
        return [f"refused: {error}"]


@dataclass
class Count:
    states: int = 0
    violations: list[str] = field(default_factory=list)
    in_recovery: int = 0


def enumerate_cuts(
    root: Path, scratch: Path, forget: Callable[[Path], bool], *, deep: bool = False, enough: int | None = None
) -> tuple[Count, Recorded]:
    """Every state after a power cut at any operation; from every `EVERY_NTH`, also cuts of the recovery from it.

    ``enough``: this many violations end it.
    """
    scratch.mkdir()
    before = read_tree(root)
    recorded = record(root, forget)
    count = Count()
    seen: set[bytes] = set()
    for length, lose in itertools.product(range(len(recorded.operations) + 1), LOSSES.values()):
        disk = copy_of(before)
        replay(disk, root, recorded.operations[:length])
        promised = recorded.promised_after(length)
        for tree in survivors(disk, lose):
            key = key_of(promised, tree)
            if key in seen:
                continue
            seen.add(key)
            place = scratch / "state"
            write_tree(place, tree)
            if deep and len(seen) % EVERY_NTH == 0:
                cut_recovery(place, scratch, recorded.said, promised, count)
            count.violations += violations_of(place, recorded.said, promised)
            shutil.rmtree(place)
            if enough is not None and len(count.violations) >= enough:
                return Count(len(seen), count.violations), recorded
    count.states = len(seen)
    return count, recorded


def cut_recovery(
    place: Path, scratch: Path, said: list[bytes], promised: tuple[int, list[tuple[int, int, int]]], count: Count
) -> None:
    before = read_tree(place)
    copy = scratch / "copy"
    shutil.copytree(place, copy)
    recorder = Recorder()
    take_up(copy, recorder)
    shutil.rmtree(copy)
    seen: set[bytes] = set()
    for length, name in itertools.product(range(len(recorder.operations) + 1), ("none", "all", "second halves")):
        disk = copy_of(before)
        replay(disk, copy, recorder.operations[:length])
        for tree in survivors(disk, LOSSES[name]):
            key = key_of((), tree)
            if key in seen:
                continue
            seen.add(key)
            again = scratch / "again"
            write_tree(again, tree)
            count.violations += [f"in recovery: {text}" for text in violations_of(again, said, promised)]
            shutil.rmtree(again)
    count.in_recovery += len(seen)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    first_start(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.timeout(300)
def test_a_power_cut_at_any_moment_breaks_no_promise(
    root: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    count, recorded = enumerate_cuts(root, tmp_path / "scratch", lambda path: False, deep=True)
    found = f"{count.states} states, {count.in_recovery} cuts in recovery, {len(count.violations)} violations"
    record_property(COUNTED, f"power cuts on paper: {len(recorded.operations)} operations, {found}")
    assert len(recorded.operations) > 120 and count.states > 500 and count.in_recovery > 200
    assert count.violations == []


def in_any(*suffixes: str) -> Callable[[Path], bool]:
    return lambda path: any(path.name.endswith(suffix) for suffix in suffixes)


MUTANTS: dict[str, Callable[[Path], bool]] = {
    "shard": in_any(".safetensors"),
    "state": in_any("state-00000.json"),
    "manifest": in_any("MANIFEST.json"),
    "checkpoint folder": in_any(".tmp"),
    "folder of checkpoints": in_any("ckpt"),
    "log": in_any(".log"),
    "folder of the log": in_any("wal"),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MUTANTS)
def test_each_sync_is_needed(
    root: Path, tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    count, recorded = enumerate_cuts(root, tmp_path / "scratch", MUTANTS[name], enough=10)
    found = f"{len(count.violations)} violations in the first {count.states} states"
    record_property(COUNTED, f"without the syncs of the {name}: {found}")
    assert recorded.forgotten > 0 and count.violations
