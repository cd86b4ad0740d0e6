"""Checkpoints when the power goes, at any moment: what was not synced is lost, in any combination."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.simulated_disk import LOSSES, Recorder, copy_of, read_tree, replay, survivors, write_tree
from tests.small_checkpoints import load, require_whole, save
from tolaria.recovery.fsops import FileOps


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, c0-s0 and c1-s1; the next save commits c2 and deletes c0."""
    for step in (0, 1):
        save(tmp_path / "ckpt", step, FileOps())
    return tmp_path / "ckpt"


def power_cut_violations(root: Path, scratch: Path, forget: Callable[[Path], bool]) -> tuple[int, int]:
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
    for length, lose in itertools.product(range(len(operations) + 1), LOSSES.values()):
        disk = copy_of(before)
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


def test_a_power_cut_at_any_moment_loses_nothing_that_was_acknowledged(root: Path, tmp_path: Path) -> None:
    num_states, violations = power_cut_violations(root, tmp_path, lambda path: False)
    assert num_states > 20
    assert violations == 0


@pytest.mark.parametrize(
    "forgotten", ["shard-00000.safetensors", "state-00000.json", "MANIFEST.json", "c2-s2.tmp", "ckpt"]
)
def test_each_fsync_is_needed(root: Path, tmp_path: Path, forgotten: str) -> None:
    _, violations = power_cut_violations(root, tmp_path, lambda path: path.name == forgotten)
    assert violations > 0
