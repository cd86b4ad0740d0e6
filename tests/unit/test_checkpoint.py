"""Checkpoints, one rank: what is saved comes back, exactly; one save at a time; old ones go."""

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tolaria.dist import Peers
from tolaria.errors import CheckpointError, RunDirError, RunLocked
from tolaria.recovery.checkpoint import CheckpointWriter, Loaded, Payload, SaveOutcome, load_newest, load_path, sweep
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.shards import assign_to_ranks

ALONE = Peers(None, 0, 1)
TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def payload(step: int = 1, **changes: Any) -> Payload:
    content: dict[str, Any] = {
        "step": step,
        "tensors": {"model/w": torch.full((3, 2), float(step)), "model/b": torch.tensor(step)},
        "meta": {"epoch": step, "slots": {"a": ["DORMANT", None, 0.1]}},
        "local_tensors": {"rng": torch.arange(step, step + 5, dtype=torch.uint8)},
        "local_meta": {"cursor": step},
    }
    return Payload(**(content | changes))


def make_writer(root: Path, fs: FileOps | None = None, keep: int = 3, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(
        root, run_id="r" * 32, generation="g1", peers=ALONE, fs=fs or FileOps(), keep=keep, **options
    )


def save(writer: CheckpointWriter, what: Payload) -> SaveOutcome:
    writer.save(what)
    assert writer.wait(30)
    (outcome,) = writer.poll()
    return outcome


def newest(root: Path) -> Loaded | None:
    reports: list[Any] = []
    loaded = load_newest(root, ALONE, FileOps(), report=lambda kind, info: reports.append((kind, info)))
    assert reports == []
    return loaded


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"t/{dtype}": (torch.randn(5, 3) * 50).to(dtype) for dtype in TYPES}
    tensors |= {"scalar": torch.tensor(-0.0), "empty": torch.empty(0, 4), "nan": torch.tensor([float("nan"), 1.0])}
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).t()
    tensors["images"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    meta = {"b": [1, 2.5, None, True, "é"], "a": {"inf": float("inf"), "tiny": 5e-324, "big": 2**80}}
    outcome = save(make_writer(tmp_path / "ckpt"), payload(7, tensors=tensors, meta=meta))
    loaded = newest(tmp_path / "ckpt")
    assert loaded is not None and (loaded.seq, loaded.step, loaded.path) == (0, 7, outcome.path)
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = loaded.tensors[name]
        assert (back.dtype, back.shape, back.requires_grad) == (tensor.dtype, tensor.shape, False)
        assert torch.equal(back.nan_to_num(7.0), tensor.detach().nan_to_num(7.0)), name
    assert torch.signbit(loaded.tensors["scalar"])
    assert loaded.meta == meta and list(loaded.meta) == ["b", "a"]
    assert loaded.local_meta == {"cursor": 7} and loaded.local_tensors is not None
    assert loaded.local_tensors["rng"].tolist() == [7, 8, 9, 10, 11]
    loaded.tensors["scalar"] += 1


def test_files_are_private_and_readable_by_the_safetensors_library(tmp_path: Path) -> None:
    path = save(make_writer(tmp_path / "ckpt"), payload(3)).path
    assert path == tmp_path / "ckpt" / "c0-s3"
    assert sorted(os.listdir(path)) == ["MANIFEST.json", "shard-00000.safetensors", "state-00000.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}
    shard = safetensors.torch.load_file(path / "shard-00000.safetensors")
    assert torch.equal(shard["replicated/model/w"], torch.full((3, 2), 3.0))
    assert json.loads((path / "state-00000.json").read_text())["replicated"]["epoch"] == 3


def test_the_saved_state_is_that_of_the_call_although_it_is_changed_afterwards(tmp_path: Path) -> None:
    gate = threading.Event()

    class Held(FileOps):
        def make_dir(self, path: Path) -> None:
            gate.wait(30)
            super().make_dir(path)

    writer = make_writer(tmp_path / "ckpt", Held())
    what = payload(1)
    writer.save(what)
    what.tensors["model/w"].fill_(99)
    what.meta["epoch"] = 99  # type: ignore[index]
    assert writer.in_flight and writer.poll() == [] and not writer.wait(0)
    with pytest.raises(RuntimeError, match="still in flight"):
        writer.save(payload(2))
    gate.set()
    assert writer.wait(30) and not writer.in_flight
    assert [outcome.error for outcome in writer.poll()] == [None]
    loaded = newest(tmp_path / "ckpt")
    assert loaded is not None and loaded.meta["epoch"] == 1 and loaded.tensors["model/w"].unique().tolist() == [1.0]


def test_buffers_are_reused_and_follow_a_change_of_structure(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "ckpt")
    save(writer, payload(1))
    save(writer, payload(2, tensors={"model/w": torch.ones(9), "seed/w": torch.zeros(2, dtype=torch.int8)}))
    loaded = newest(tmp_path / "ckpt")
    assert loaded is not None and {n: tuple(t.shape) for n, t in loaded.tensors.items()} == {
        "model/w": (9,), "seed/w": (2,),
    }  # fmt: skip


def test_only_the_newest_are_kept_and_numbers_are_never_used_again(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    writer = make_writer(root, keep=2)
    assert [save(writer, payload(step)).seq for step in (5, 6, 3)] == [0, 1, 2]
    assert sorted(os.listdir(root)) == ["c1-s6", "c2-s3"]
    (root / "c2-s3").rename(root / "c2-s3.bad")
    (root / "c7-s1.tmp").mkdir()
    again = save(make_writer(root, keep=2), payload(9))
    assert again.seq == 8
    assert sorted(os.listdir(root)) == ["c1-s6", "c2-s3.bad", "c8-s9"]


def test_newest_is_by_sequence_not_by_step_nor_by_text(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    writer = make_writer(root, keep=20)
    for step in (500, *range(1, 11)):
        save(writer, payload(step))
    loaded = newest(root)
    assert loaded is not None and (loaded.seq, loaded.step) == (10, 10)


def test_none_saved_is_none_loaded(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") is None
    (tmp_path / "ckpt" / "c0-s1.tmp").mkdir(parents=True)
    (tmp_path / "ckpt" / "notes").mkdir()
    assert newest(tmp_path / "ckpt") is None


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    save(make_writer(root), payload())
    for name in ("c4-s1.tmp", "c3-s1.trash", "c2-s1.bad", "mine.tmp"):
        (root / name).mkdir()
        (root / name / "file").write_bytes(b"x")
    assert sweep(root, FileOps()) == ["c3-s1.trash", "c4-s1.tmp"]
    assert sorted(os.listdir(root)) == ["c0-s1", "c2-s1.bad", "mine.tmp"]
    assert sweep(tmp_path / "nothing", FileOps()) == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"meta": {"x": {1: 2}}}, "meta.x: key 1"),
        ({"meta": {"x": [torch.ones(1)]}}, r"meta.x\[0\]: Tensor"),
        ({"local_meta": {"x": b"1"}}, "local_meta.x: bytes"),
        ({"tensors": {"a b": torch.ones(1)}}, "tensor name"),
        ({"tensors": {"a": torch.ones(1, dtype=torch.complex64)}}, "complex64"),
    ],
)
def test_content_that_would_not_come_back_is_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], error: str
) -> None:
    writer = make_writer(tmp_path / "ckpt")
    with pytest.raises((TypeError, ValueError), match=error):
        writer.save(payload(**changes))
    assert not writer.in_flight and not (tmp_path / "ckpt").exists()
    assert save(writer, payload()).error is None


def test_a_closed_writer_saves_no_more(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "ckpt")
    save(writer, payload())
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        writer.save(payload())


def test_ids_and_keep_are_checked_when_the_writer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        make_writer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="run_id='a/b'"):
        CheckpointWriter(tmp_path, run_id="a/b", generation="g", peers=ALONE, fs=FileOps(), keep=2)


@pytest.mark.parametrize("turn", [1, 2])
def test_a_start_that_was_taken_over_commits_nothing_and_stops(tmp_path: Path, turn: int) -> None:
    root = tmp_path / "ckpt"
    asked = []

    def check_owner() -> None:
        asked.append(1)
        if len(asked) == turn:
            raise RunLocked("generation 2 is here")

    writer = make_writer(root, check_owner=check_owner)
    writer.save(payload())
    assert writer.wait(30)
    with pytest.raises(RunLocked, match="taken over"):
        writer.poll()
    assert len(asked) == turn
    assert not root.exists() or os.listdir(root) == []


def test_an_owner_that_cannot_be_told_gives_up_the_attempt_only(tmp_path: Path) -> None:
    def check_owner() -> None:
        raise RunDirError("FENCE: Input/output error")

    outcome = save(make_writer(tmp_path / "ckpt", check_owner=check_owner), payload())
    assert outcome.path is None and outcome.error is not None and "cannot be read" in outcome.error


def test_the_outcome_tells_what_was_written(tmp_path: Path) -> None:
    ticks = iter([10.0, 10.5, 13.0])
    outcome = save(make_writer(tmp_path / "ckpt", clock=lambda: next(ticks)), payload(4))
    assert outcome.path is not None
    files = [f for f in outcome.path.iterdir() if f.name != "MANIFEST.json"]
    assert outcome.size == sum(f.stat().st_size for f in files)
    assert (outcome.seconds, outcome.blocked_seconds, outcome.step) == (3.0, 0.5, 4)


def test_one_checkpoint_may_be_named_and_moved(tmp_path: Path) -> None:
    path = save(make_writer(tmp_path / "ckpt"), payload(4)).path
    assert path is not None
    path.rename(tmp_path / "elsewhere")
    assert load_path(tmp_path / "elsewhere", ALONE, FileOps()).step == 4
    with pytest.raises(CheckpointError, match="not a directory"):
        load_path(tmp_path / "no", ALONE, FileOps())


def test_the_state_digest_depends_on_values_names_step_and_metadata(tmp_path: Path) -> None:
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    variants = [
        payload(1, tensors=base),
        payload(2, tensors=base, meta=payload(1).meta),
        payload(1, tensors={"a": base["b"], "b": base["a"]}),
        payload(1, tensors=base | {"a": torch.tensor([2.0, 1.0])}),
        payload(1, tensors=base, meta={"epoch": 2}),
    ]
    writer = make_writer(tmp_path / "ckpt", keep=9)
    digests = []
    for variant in [*variants, variants[0]]:
        path = save(writer, variant).path
        assert path is not None
        digests.append(load_path(path, ALONE, FileOps()).state_digest)
    assert len(set(digests)) == len(variants) and digests[0] == digests[-1]


def test_shares_are_balanced_complete_and_deterministic() -> None:
    tensors = {f"t{i}": torch.empty(size) for i, size in enumerate([100, 1, 50, 50, 3, 99])}
    shares = assign_to_ranks(tensors, 3)
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    sizes = [sum(tensors[name].numel() for name in share) for share in shares]
    assert max(sizes) - min(sizes) <= 4
    assert shares == assign_to_ranks(dict(reversed(tensors.items())), 3)
    assert assign_to_ranks({"one": torch.ones(1)}, 2) == [["one"], []]
