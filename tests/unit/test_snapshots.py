"""Snapshots in memory: equal bit for bit, seen by the next start, and never believed when damaged."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rig import same_bits
from tolaria.errors import CheckpointError
from tolaria.recovery.arena import PAGE_BYTES
from tolaria.recovery.leftovers import find, read, sweep
from tolaria.recovery.snapshots import SnapshotRing, copy_back
from tolaria.recovery.staging import Payload

RUN = "0123456789abcdef-run"


def state(step: int, **more: Tensor) -> Payload:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "w": torch.randn(40, 3, generator=generator),
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(float(step)),
        "count": torch.tensor([step], dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        **more,
    }
    return Payload(
        step=step, branch=step // 100, tensors=tensors, meta={"step": step, "loss": float("nan"), "names": ["a", None]},
        local_tensors={"rng": torch.arange(step, step + 9, dtype=torch.uint8)}, local_meta={"own": [step, 0.1]},
    )  # fmt: skip


def make_ring(folder: Path, **changes: Any) -> SnapshotRing:
    given = {
        "run_id": RUN, "generation": "g1", "rank": 0, "run_dir": folder, "slots": 2, "limit_bytes": 2**30,
        "directory": folder, "pinned": False, **changes,
    }  # fmt: skip
    return SnapshotRing(**given)


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[SnapshotRing]:
    made = make_ring(tmp_path)
    yield made
    made.close(remove=True)


def keep(ring: SnapshotRing, payload: Payload) -> int:
    taken = ring.take(payload)
    assert taken is not None
    ring.confirm(taken.info.seq)
    return taken.info.seq


def assert_same(saved: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    assert saved.keys() == tensors.keys()
    assert all(same_bits(saved[name], tensors[name]) for name in tensors)


def test_what_comes_back_is_what_was_taken(ring: SnapshotRing) -> None:
    payload = state(300)
    snapshot = ring.get(keep(ring, payload))
    assert_same(dict(snapshot.tensors), dict(payload.tensors))
    assert_same(dict(snapshot.local_tensors), dict(payload.local_tensors))
    assert (snapshot.info.step, snapshot.info.branch, snapshot.local_meta) == (300, 3, {"own": [300, 0.1]})
    assert repr(snapshot.meta) == repr(payload.meta)
    assert ring.verify(snapshot.info.seq)
    assert ring.live_digest(payload.tensors, payload.meta) == snapshot.info.digest


def test_every_kind_of_change_shows_in_the_digest(ring: SnapshotRing) -> None:
    payload = state(5)
    digest = ring.live_digest(payload.tensors, payload.meta)
    for name in ("w", "half", "flags", "scalar", "count", "nan"):
        changed = {n: t.clone() for n, t in payload.tensors.items()}
        changed[name].reshape(-1)[:1].view(torch.uint8)[0] ^= 1
        assert ring.live_digest(changed, payload.meta) != digest, name
    assert ring.live_digest(payload.tensors, {**payload.meta, "step": 6}) != digest
    renamed = {("v" if name == "w" else name): tensor for name, tensor in payload.tensors.items()}
    assert ring.live_digest(renamed, payload.meta) != digest


def test_the_oldest_goes_first_and_an_unconfirmed_one_before_it(ring: SnapshotRing) -> None:
    for step in (1, 2, 3):
        keep(ring, state(step))
    assert [info.step for info in ring.held()] == [2, 3]
    assert ring.take(state(4)) is not None
    assert [info.step for info in ring.held()] == [3]
    keep(ring, state(5))
    assert [info.step for info in ring.held()] == [3, 5]


def test_growth_changes_the_layout_and_older_snapshots_stay(ring: SnapshotRing) -> None:
    keep(ring, state(1))
    keep(ring, state(2))
    grown = state(3, big=torch.randn(300_000))
    assert_same(dict(ring.get(keep(ring, grown)).tensors), dict(grown.tensors))
    assert_same(dict(ring.get(ring.held()[0].seq).tensors), dict(state(2).tensors))


def test_what_was_taken_after_a_return_is_dropped(ring: SnapshotRing) -> None:
    keep(ring, state(10))
    seq = keep(ring, state(20))
    ring.drop_after(15)
    assert [info.step for info in ring.held()] == [10]
    with pytest.raises(KeyError, match="no snapshot"):
        ring.get(seq)


def test_a_state_that_does_not_fit_is_not_taken_and_why_is_said(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, limit_bytes=1000)
    assert ring.take(state(1)) is None
    assert "does not fit" in ring.disabled
    assert list(tmp_path.iterdir()) == []


def test_without_a_directory_they_lie_in_memory_of_the_process(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, directory=tmp_path / "missing")
    payload = state(1)
    assert_same(dict(ring.get(keep(ring, payload)).tensors), dict(payload.tensors))
    assert not ring.survives
    ring.close(remove=True)


def test_the_next_start_finds_and_reads_them(tmp_path: Path) -> None:
    ring = make_ring(tmp_path)
    for step in (1, 2):
        keep(ring, state(step))
    ring.close(remove=False)
    found = sorted(find(RUN, 0, tmp_path), key=lambda f: f.info.step)
    assert [f.info.step for f in found] == [1, 2]
    assert (found[0].path.stat().st_mode & 0o777, find(RUN, 1, tmp_path), find("other", 0, tmp_path)) == (0o600, [], [])
    snapshot = read(found[1])
    assert_same(dict(snapshot.tensors), dict(state(2).tensors))
    assert_same(dict(snapshot.local_tensors), dict(state(2).local_tensors))


def test_only_confirmed_ones_are_found(tmp_path: Path) -> None:
    ring = make_ring(tmp_path)
    seq = keep(ring, state(1))
    ring.take(state(2))
    assert [f.info.step for f in find(RUN, 0, tmp_path)] == [1]
    ring.drop(seq)
    assert find(RUN, 0, tmp_path) == []
    ring.close(remove=True)


def test_files_of_others_links_and_garbage_are_not_believed(tmp_path: Path) -> None:
    ring = make_ring(tmp_path)
    keep(ring, state(1))
    (path,) = [f.path for f in find(RUN, 0, tmp_path)]
    prefix = f"tolaria-{RUN[:16]}-g0-r0-"
    (tmp_path / f"{prefix}0").symlink_to(path)
    (tmp_path / f"{prefix}1").write_bytes(b"x" * 10_000)
    os.mkfifo(tmp_path / f"{prefix}2")
    assert [f.path for f in find(RUN, 0, tmp_path)] == [path]
    path.chmod(0o644)
    assert find(RUN, 0, tmp_path) == []
    path.chmod(0o600)
    (found,) = find(RUN, 0, tmp_path)
    os.truncate(path, PAGE_BYTES + 10)
    with pytest.raises(CheckpointError, match="shorter"):
        read(found)
    ring.close(remove=True)


def test_no_flipped_bit_is_believed(tmp_path: Path) -> None:
    ring = make_ring(tmp_path)
    keep(ring, state(1))
    (found,) = find(RUN, 0, tmp_path)
    whole = found.path.read_bytes()
    tensors = [(row[3], row[3] + max(1, found_bytes(row))) for row in table_of(whole) if 0 not in row[2]]
    header = [*range(8), *range(16, 24), *range(64, 64 + 5 * 8 + 64 + 4 + 4), *range(512, 560)]
    rng = random.Random(3)
    places = header + [PAGE_BYTES + rng.randrange(*rng.choice(tensors)) for _ in range(300)]
    json_at = whole.rindex(b'{"meta"')
    places += [json_at + rng.randrange(300) for _ in range(100)]
    believed = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        found.path.write_bytes(damaged)
        for again in find(RUN, 0, tmp_path):
            try:
                read(again)
                believed += 1
            except CheckpointError:
                continue
    assert (len(places) > 500, believed) == (True, 0)
    ring.close(remove=True)


def table_of(whole: bytes) -> list[Any]:
    decoded: list[Any] = json.JSONDecoder().raw_decode(whole[whole.rindex(b'{"meta"') :].decode())[0]["tensors"]
    return decoded


def found_bytes(row: list[Any]) -> int:
    sizes = {"F32": 4, "BF16": 2, "BOOL": 1, "I64": 8, "U8": 1}
    return torch.Size(row[2]).numel() * sizes[row[1]]


def test_sweeping_spares_this_generation_and_other_runs_that_live(tmp_path: Path) -> None:
    rings = [make_ring(tmp_path, generation=g) for g in ("g1", "g2")] + [make_ring(tmp_path, run_id="another-run")]
    for ring in rings:
        keep(ring, state(1))
    assert {name.split("-")[2] for name in sweep(RUN, "g2", tmp_path)} == {"g1"}
    assert len(list(tmp_path.iterdir())) == 2
    for ring in rings:
        ring.close(remove=True)


def test_copying_back_stops_between_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tolaria.recovery.snapshots.PIECE_BYTES", 100)
    source = {str(i): torch.full((30,), float(i)) for i in range(5)}
    live = {name: torch.full((30,), -1.0) for name in source}
    answers = iter([False, False, True])
    assert not copy_back(source, live, lambda: next(answers))
    assert [bool((t >= 0).all()) for t in live.values()] == [True, True, False, False, False]
    assert copy_back(source, live, lambda: False)
    assert_same(live, source)


TAKER = """
import itertools, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tolaria.recovery.snapshots import SnapshotRing
from tolaria.recovery.staging import Payload
folder = Path(sys.argv[1])
ring = SnapshotRing(run_id=sys.argv[2], generation="g1", rank=0, run_dir=folder, slots=2, limit_bytes=2**30,
                    directory=folder, pinned=False)
for step in itertools.count(1):
    tensors = {f"t{i}": torch.full((100_000,), float(step)) for i in range(8)}
    taken = ring.take(Payload(step=step, tensors=tensors, meta={"step": step}, local_tensors={}, local_meta={}))
    ring.confirm(taken.info.seq)
    if step == 2:
        print("ready", flush=True)
"""


@pytest.mark.processes
def test_a_death_at_any_moment_leaves_the_one_before(tmp_path: Path) -> None:
    rng = random.Random(5)
    for round_number in range(8):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        taker = subprocess.Popen([sys.executable, "-c", TAKER, str(folder), RUN], stdout=subprocess.PIPE)
        assert taker.stdout is not None
        assert taker.stdout.readline() == b"ready\n"
        time.sleep(rng.random() * 0.05)
        taker.send_signal(signal.SIGKILL)
        taker.wait()
        taker.stdout.close()
        found = find(RUN, 0, folder)
        assert 1 <= len(found) <= 2
        for each in found:
            snapshot = read(each)
            assert {float(t.min()) for t in snapshot.tensors.values()} == {float(each.info.step)}
            assert {float(t.max()) for t in snapshot.tensors.values()} == {float(each.info.step)}


# Kept apart: the state before an operator's last command


def apart(ring: SnapshotRing, payload: Payload) -> int:
    taken = ring.take(payload, apart=True)
    assert taken is not None
    ring.confirm(taken.info.seq)
    return taken.info.seq


def test_what_is_kept_apart_outlives_those_that_come_and_go_and_is_replaced_by_its_like(ring: SnapshotRing) -> None:
    kept = apart(ring, replace(state(1), acts=3))
    for step in range(2, 9):
        keep(ring, state(step))
    assert [(info.seq, info.step, info.acts) for info in ring.held()] == [(kept, 1, 3), (7, 7, 0), (8, 8, 0)]
    assert_same(dict(ring.get(kept).tensors), dict(state(1).tensors))
    apart(ring, replace(state(9), acts=4))
    assert [(info.step, info.acts) for info in ring.held()] == [(7, 0), (8, 0), (9, 4)]


def test_where_there_is_room_for_one_less_it_takes_the_place_of_the_oldest(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, limit_bytes=2 * 8192 + 4096)
    for step in (1, 2):
        keep(ring, state(step))
    apart(ring, state(3))
    assert [info.step for info in ring.held()] == [2, 3] and not ring.disabled
    ring.close(remove=True)


def test_the_next_start_finds_how_many_acts_a_snapshot_has_seen(ring: SnapshotRing, tmp_path: Path) -> None:
    keep(ring, replace(state(5), acts=1))
    apart(ring, replace(state(5), acts=2))
    ring.close(remove=False)
    found = sorted(find(RUN, 0, tmp_path), key=lambda one: one.info.seq)
    assert [(one.info.step, one.info.acts, read(one).info.acts) for one in found] == [(5, 1, 1), (5, 2, 2)]


def test_a_return_takes_what_is_kept_apart_with_it_if_it_came_later(ring: SnapshotRing) -> None:
    keep(ring, state(5))
    apart(ring, state(7))
    keep(ring, state(8))
    ring.drop_after(6)
    assert [info.step for info in ring.held()] == [5]
