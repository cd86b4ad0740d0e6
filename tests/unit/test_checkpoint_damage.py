"""Damaged, incomplete and hostile checkpoints: refused, said so, set aside, and the older one is used."""

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tolaria.dist import Peers
from tolaria.errors import CheckpointError
from tolaria.recovery.checkpoint import CheckpointWriter, Loaded, Payload, load_newest, load_path
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.manifest import seal

ALONE = Peers(None, 0, 1)
SHARD, STATE, MANIFEST = "shard-00000.safetensors", "state-00000.json", "MANIFEST.json"
Reports = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """c0-s0 and c1-s1; the tests damage c1-s1."""
    path = tmp_path / "ckpt"
    writer = CheckpointWriter(path, run_id="r", generation="g", peers=ALONE, fs=FileOps(), keep=9)
    for step in (0, 1):
        tensors = {"w": torch.full((2048,), float(step)), "count": torch.tensor(step)}
        rng = {"rng": torch.full((16,), step, dtype=torch.uint8)}
        writer.save(Payload(step=step, tensors=tensors, meta={"m": step}, local_tensors=rng, local_meta={"l": step}))
        assert writer.wait(30) and writer.poll()[0].error is None
    return path


def load(root: Path, reports: Reports, fs: FileOps | None = None, **options: Any) -> Loaded | None:
    return load_newest(root, ALONE, fs or FileOps(), report=lambda kind, info: reports.append((kind, info)), **options)


def require_older_is_used(root: Path, why: str) -> None:
    """c1-s1 is refused for this reason, by name and by search, and set aside; c0-s0 is used."""
    with pytest.raises(CheckpointError, match=why):
        load_path(root / "c1-s1", ALONE, FileOps())
    reports: Reports = []
    loaded = load(root, reports)
    assert loaded is not None and loaded.step == 0 and loaded.tensors["w"].unique().tolist() == [0.0]
    assert [kind for kind, _ in reports] == ["checkpoint_bad"]
    assert reports[0][1]["path"] == str(root / "c1-s1")
    assert reports[0][1]["renamed_to"] == str(root / "c1-s1.bad")
    assert sorted(os.listdir(root)) == ["c0-s0", "c1-s1.bad"]


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / MANIFEST
    document = json.loads(file.read_text())
    change(document)
    document.pop("checksum")
    file.write_bytes(seal(document))


def plant(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and make the manifest agree with it: what somebody who can write the folder can do."""
    (folder / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(folder, lambda document: document["files"].update({name: entry}))


def shard(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def positions(size: int) -> list[int]:
    """A spread of byte positions: both ends and some between."""
    return sorted({0, 1, 7, 8, 9, size // 3, size // 2, size - 2, size - 1})


@pytest.mark.parametrize("name", [SHARD, STATE, MANIFEST])
def test_no_flipped_bit_is_ever_accepted(root: Path, name: str) -> None:
    file = root / "c1-s1" / name
    sound = file.read_bytes()
    for position in positions(len(sound)):
        file.write_bytes(sound[:position] + bytes([sound[position] ^ 0x10]) + sound[position + 1 :])
        with pytest.raises(CheckpointError):
            load_path(root / "c1-s1", ALONE, FileOps())
    file.write_bytes(sound)
    assert load_path(root / "c1-s1", ALONE, FileOps()).step == 1


@pytest.mark.parametrize("name", [SHARD, STATE, MANIFEST])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: raw[:-1], id="one byte short"),
        pytest.param(lambda raw: raw[: len(raw) // 2], id="half"),
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: bytes(len(raw)), id="zeros"),
        pytest.param(lambda raw: raw + b"\0", id="one byte more"),
    ],
)
def test_a_damaged_file_sends_the_load_to_the_older_one(
    root: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    file = root / "c1-s1" / name
    file.write_bytes(damage(file.read_bytes()))
    require_older_is_used(root, "c1-s1")


def test_a_zeroed_page_inside_a_shard_is_noticed(root: Path) -> None:
    file = root / "c1-s1" / SHARD
    raw = bytearray(file.read_bytes())
    assert any(raw[4096:8192])
    raw[4096:8192] = bytes(4096)
    file.write_bytes(raw)
    require_older_is_used(root, "sha256")


@pytest.mark.parametrize("name", [SHARD, STATE, MANIFEST])
def test_a_missing_file_and_a_link_are_refused(root: Path, name: str) -> None:
    file = root / "c1-s1" / name
    copy = root / "copy"
    file.rename(copy)
    with pytest.raises(CheckpointError, match="No such file"):
        load_path(root / "c1-s1", ALONE, FileOps())
    file.symlink_to(copy)
    with pytest.raises(CheckpointError, match="symbolic links"):
        load_path(root / "c1-s1", ALONE, FileOps())
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_path(root / "c1-s1", ALONE, FileOps())


def test_a_linked_folder_is_refused(root: Path) -> None:
    (root / "c1-s1").rename(root / "elsewhere")
    (root / "c1-s1").symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="not a directory"):
        load_path(root / "c1-s1", ALONE, FileOps())
    loaded = load(root, [])
    assert loaded is not None and loaded.step == 0


@pytest.mark.parametrize("name", [SHARD, STATE])
def test_a_file_of_another_checkpoint_is_refused(root: Path, name: str) -> None:
    shutil.copy(root / "c0-s0" / name, root / "c1-s1" / name)
    require_older_is_used(root, name)


def test_a_state_file_of_another_checkpoint_is_refused_although_its_hash_fits(root: Path) -> None:
    plant(root / "c1-s1", STATE, (root / "c0-s0" / STATE).read_bytes())
    require_older_is_used(root, "seq: expected 1")


def test_a_whole_checkpoint_under_a_newer_name_is_refused(root: Path) -> None:
    shutil.rmtree(root / "c1-s1")
    shutil.copytree(root / "c0-s0", root / "c1-s1")
    reports: Reports = []
    loaded = load(root, reports)
    assert loaded is not None and loaded.seq == 0
    assert "holds the manifest of c0-s0" in reports[0][1]["reason"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d["files"].update({"../../../etc/passwd": d["files"].pop(SHARD)}), "wrong names"),
        (lambda d: d["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}), "wrong names"),
        (lambda d: d["files"].pop(STATE), "wrong names"),
        (lambda d: d.update(world_size=2), "wrong names"),
        (lambda d: d.update(world_size=10**9), "world_size"),
        (lambda d: d.update(world_size="1"), "world_size"),
        (lambda d: d.update(world_size=True), "world_size"),
        (lambda d: d.update(step=-1), "step"),
        (lambda d: d.update(seq=1.5), "seq"),
        (lambda d: d.update(format=3), "format"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d.pop("state_digest"), "state_digest"),
        (lambda d: d["files"][SHARD].update(sha256="0" * 63), "sha256"),
        (lambda d: d["files"][SHARD].update(size=10**17), "announces"),
        (lambda d: d["files"][STATE].update(size=10**9), "announces"),
        (lambda d: d.update(run_id="a\nb"), "run_id"),
        (lambda d: d.update(num_tensors=3), "2 tensors"),
    ],
)
def test_a_manifest_that_is_not_exactly_a_manifest_is_refused(
    root: Path, change: Callable[[dict[str, Any]], Any], why: str
) -> None:
    change_manifest(root / "c1-s1", change)
    require_older_is_used(root, why)


@pytest.mark.parametrize("raw", [b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000])
def test_json_that_is_no_manifest_or_state_is_refused(root: Path, raw: bytes) -> None:
    plant(root / "c1-s1", STATE, raw)
    with pytest.raises(CheckpointError, match=STATE):
        load_path(root / "c1-s1", ALONE, FileOps())
    (root / "c1-s1" / MANIFEST).write_bytes(raw)
    require_older_is_used(root, MANIFEST)


def test_giant_json_is_refused_unread(root: Path) -> None:
    bytes_read = 0

    class Counting(FileOps):
        def read_into(self, fd: int, into: memoryview) -> int:
            nonlocal bytes_read
            count = super().read_into(fd, into)
            bytes_read += count
            return count

    manifest = root / "c1-s1" / MANIFEST
    os.truncate(manifest, 1024**3)
    with pytest.raises(CheckpointError, match="at most"):
        load_path(root / "c1-s1", ALONE, Counting())
    assert bytes_read == 0
    require_older_is_used(root, "at most")


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (struct.pack("<Q", 10**9) + b"{}", "header of 1000000000"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header of"),
        (struct.pack("<Q", 17 * 1024**2) + b" " * 17 * 1024**2, "header of"),
        (b"1234", "header of -1"),
        (shard({"replicated/w": TENSOR}, b"1234"), "SHARD"),
        (shard({"replicated/w": TENSOR | {"shape": [2**62, 4]}}, b"12345678"), "SHARD"),
        (shard({"replicated/w": TENSOR | {"data_offsets": [4, 12]}}, b"123456781234"), "SHARD"),
        (shard({"replicated/w": TENSOR | {"dtype": "C64", "shape": [1]}}, b"12345678"), "C64"),
        (shard({"replicated/w": TENSOR | {"dtype": "object"}}, b"12345678"), "SHARD"),
        (shard({"w": TENSOR}, b"12345678"), "unexpected here"),
        (shard({"replicated/w\n": TENSOR}, b"12345678"), "not accepted"),
        (shard({"replicated/" + "w" * 600: TENSOR}, b"12345678"), "not accepted"),
        (shard({"replicated/w": TENSOR}, b"12345678"), "1 tensors where"),
        (shard({"replicated/w": [1, 2]}, b""), "SHARD"),
    ],
)
def test_a_hostile_shard_is_refused_although_its_hash_fits(root: Path, raw: bytes, why: str) -> None:
    plant(root / "c1-s1", SHARD, raw)
    require_older_is_used(root, SHARD if why == "SHARD" else why)


def test_nothing_is_unpickled(root: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    script = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    plant(root / "c1-s1", SHARD, script)
    plant(root / "c1-s1", STATE, script)
    require_older_is_used(root, "c1-s1")
    assert not marker.exists()


def test_when_all_are_bad_nothing_starts_afresh(root: Path) -> None:
    for name in ("c0-s0", "c1-s1"):
        (root / name / SHARD).unlink()
    reports: Reports = []
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        load(root, reports)
    assert len(reports) == 2
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        load(root, reports)


def test_the_folder_of_another_run_is_left_as_it_is(root: Path) -> None:
    (root / "c1-s1" / SHARD).unlink()
    reports: Reports = []
    loaded = load(root, reports, quarantine=False)
    assert loaded is not None and loaded.step == 0
    assert reports[0][1]["renamed_to"] is None
    assert sorted(os.listdir(root)) == ["c0-s0", "c1-s1"]


def test_two_bad_ones_of_one_name_find_different_places(root: Path) -> None:
    shutil.copytree(root / "c1-s1", root / "c1-s1.bad")
    (root / "c1-s1" / SHARD).unlink()
    reports: Reports = []
    assert load(root, reports) is not None
    assert reports[0][1]["renamed_to"] == str(root / "c1-s1.bad-2")


def test_a_folder_that_cannot_be_renamed_does_not_end_the_search(root: Path) -> None:
    class ReadOnly(FileOps):
        def rename(self, source: Path, target: Path) -> None:
            raise OSError(errno.EROFS, "read-only file system")

    (root / "c1-s1" / SHARD).unlink()
    reports: Reports = []
    loaded = load(root, reports, ReadOnly())
    assert loaded is not None and loaded.step == 0
    assert reports[0][1]["renamed_to"] is None


@pytest.mark.parametrize(
    ("code", "condemned"), [(errno.EIO, True), (errno.EACCES, False), (errno.EMFILE, False), (errno.ESTALE, False)]
)
def test_only_damage_condemns_a_checkpoint(root: Path, code: int, condemned: bool) -> None:
    """A missing permission or a network file system that is away must not set a sound checkpoint aside."""

    class Failing(FileOps):
        def read_file(self, path: Path, max_bytes: int) -> bytes:
            if path == root / "c1-s1" / STATE:
                raise OSError(code, os.strerror(code))
            return super().read_file(path, max_bytes)

    if condemned:
        loaded = load(root, [], Failing())
        assert loaded is not None and loaded.step == 0
    else:
        with pytest.raises(CheckpointError, match="cannot be read now"):
            load(root, [], Failing())
        assert sorted(os.listdir(root)) == ["c0-s0", "c1-s1"]
        assert load(root, []) is not None
