"""Checkpoints over two real ranks: one verdict for both, and any number of ranks may load.

This file is also the program of a rank: it works through all scenes once, writes what it saw as JSON, and the
tests look at that.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tolaria.config import RunConfig
from tolaria.dist import Peers
from tolaria.errors import CheckpointError, PeerLost, RunDirError, WalError
from tolaria.recovery.checkpoint import CheckpointWriter, Payload, load_newest, load_path
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import Wal
from tolaria.rundir import open_run

pytestmark = pytest.mark.processes
DEADLINE_S = 60
COLLECTIVE_TIMEOUT_S = 20
NOW = "2025-01-02T03:04:05+00:00"


class Tricky(FileOps):
    """Fails or lies on demand."""

    def __init__(self) -> None:
        self.full_disk = False
        self.flip_in = ""
        self.fail_sync = False
        self.fired = 0

    def datasync(self, fd: int) -> None:
        if self.fail_sync:
            raise OSError(errno.EIO, "lost")
        super().datasync(fd)

    def write(self, fd: int, data: memoryview) -> int:
        if self.full_disk:
            self.fired += 1
            raise OSError(errno.ENOSPC, "full")
        return super().write(fd, data)

    def read_memory(self, path: Path, max_bytes: int) -> memoryview:
        raw = super().read_memory(path, max_bytes)
        if path.name == self.flip_in and path.parent.name == "c2-s2":
            self.fired += 1
            raw[-1] ^= 1
        return raw


def payload(step: int, rank: int, **extra: torch.Tensor) -> Payload:
    generator = torch.Generator().manual_seed(step)
    tensors = {f"t{i}": torch.randn(10 + i, generator=generator) for i in range(5)} | extra
    own = {"rng": torch.full((4,), rank, dtype=torch.int64)}
    return Payload(step=step, tensors=tensors, meta={"step": step}, local_tensors=own, local_meta={"rank": rank})


class Rank:
    """One rank's way through the scenes; the same calls in the same order on both."""

    def __init__(self, rank: int, scratch: Path, training: Peers, background: Peers) -> None:
        self.rank = rank
        self.scratch = scratch
        self.root = scratch / "ckpt"
        self.training = training
        self.background = background
        self.fs = Tricky()
        self.seen: dict[str, Any] = {}
        self.writer = CheckpointWriter(self.root, run_id="r", generation="g", peers=background, fs=self.fs, keep=3)

    def save(self, scene: str, what: Payload) -> None:
        self.writer.save(what)
        assert self.writer.wait(DEADLINE_S)
        (outcome,) = self.writer.poll()
        self.seen[scene] = {"error": outcome.error, "seq": outcome.seq, "path": str(outcome.path)}

    def load(self, scene: str) -> None:
        reports: list[str] = []
        loaded = load_newest(self.root, self.training, self.fs, report=lambda _, info: reports.append(info["reason"]))
        assert loaded is not None and loaded.local_tensors is not None
        expected = payload(loaded.step, self.rank).tensors
        self.seen[scene] = {
            "step": loaded.step,
            "equal": all(torch.equal(loaded.tensors[n], t) for n, t in expected.items()),
            "own": [loaded.local_tensors["rng"].tolist(), loaded.local_meta],
            "reports": reports,
        }

    def open_run(self, scene: str, **options: Any) -> None:
        try:
            run = open_run(
                RunConfig(root=str(self.scratch / "runs"), **options), self.training, generation=f"g-{scene}",
                agent="agent", now=datetime.fromisoformat(NOW), fs=self.fs,
            )  # fmt: skip
        except RunDirError as error:
            self.seen[scene] = {"error": type(error).__name__, "text": str(error)}
            return
        self.seen[scene] = {"path": str(run.path), "run_id": run.run_id, "resume": repr(run.resume)}
        self.training.barrier()
        run.close()

    def work(self) -> None:
        self.save("first", payload(1, self.rank))
        self.load("load first")
        self.save("values differ", payload(2, self.rank, odd=torch.tensor([1.0, 2.0, float(self.rank)])))
        self.save("names differ", payload(2, self.rank, **{f"only-{self.rank}": torch.ones(1 + self.rank)}))
        self.fs.full_disk = self.rank == 1
        self.save("disk of rank 1 full", payload(2, self.rank))
        self.fs.full_disk = False
        self.training.barrier()
        self.seen["left"] = sorted(os.listdir(self.root))
        self.training.barrier()
        self.save("second", payload(2, self.rank))
        self.fs.flip_in = "shard-00000.safetensors" if self.rank == 1 else ""
        try:
            load_path(self.root / "c2-s2", self.training, self.fs)
        except CheckpointError as error:
            self.seen["load path"] = str(error)
        self.load("load with damage seen by rank 1")
        self.seen["fired"] = self.fs.fired
        self.open_run("open")
        self.open_run("open nonsense", resume=str(self.scratch / "nowhere"))
        self.save("third", payload(3, self.rank))
        self.load_incomplete()
        self.lose_log()
        if self.rank == 0:
            self.lose_peer()

    def load_incomplete(self) -> None:
        """A shard of one rank is missing, and one is of another checkpoint."""
        missing, swapped = self.scratch / "missing", self.scratch / "swapped"
        if self.rank == 0:
            for place in (missing, swapped):
                shutil.copytree(self.root / "c0-s1", place)
            (missing / "shard-00001.safetensors").unlink()
            (third,) = self.root.glob("c*-s3")
            shutil.copy(third / "shard-00001.safetensors", swapped)
        self.training.barrier()
        for place in (missing, swapped):
            try:
                load_path(place, self.training, self.fs)
            except CheckpointError as error:
                self.seen[place.name] = str(error)

    def lose_log(self) -> None:
        """Rank 0 cannot log the second checkpoint."""
        wal = None
        if self.rank == 0:
            wal, _ = Wal.open(
                self.scratch / "wal", run_id="r", generation="g", facts={}, fs=self.fs, check_owner=lambda: None
            )
        logged = CheckpointWriter(
            self.scratch / "logged", run_id="r", generation="g", peers=self.background, fs=self.fs, keep=3, wal=wal
        )
        for last in (False, True):
            self.fs.fail_sync = last
            logged.save(payload(1, self.rank))
            assert logged.wait(DEADLINE_S)
            try:
                self.seen["logged"] = [outcome.error for outcome in logged.poll()]
            except WalError as error:
                self.seen["log lost"] = str(error)
        self.fs.fail_sync = False
        logged.close()
        if wal is not None:
            wal.close()

    def lose_peer(self) -> None:
        """The other rank leaves while this one saves."""
        self.writer.save(payload(4, 0))
        assert self.writer.wait(DEADLINE_S)
        try:
            self.writer.poll()
        except PeerLost:
            self.seen["peer lost"] = True


def main(rank: int, scratch: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store = dist.FileStore(str(scratch / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    background = dist.new_group(backend="gloo", timeout=timeout)
    program = Rank(rank, scratch, Peers(dist.group.WORLD, rank, 2), Peers(background, rank, 2))
    program.work()
    (scratch / f"seen-{rank}.json").write_text(json.dumps(program.seen))
    # No orderly farewell: rank 1 leaves while rank 0 waits for it.
    sys.stdout.flush()
    os._exit(0)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=DEADLINE_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return path


@pytest.fixture(scope="module")
def seen(scratch: Path) -> list[dict[str, Any]]:
    return [json.loads((scratch / f"seen-{rank}.json").read_text()) for rank in range(2)]


def test_both_ranks_commit_one_checkpoint_and_get_their_own_part_back(seen: list[dict[str, Any]]) -> None:
    for rank, view in enumerate(seen):
        assert view["first"]["error"] is None and view["first"]["seq"] == 0
        assert view["load first"]["step"] == 1 and view["load first"]["equal"]
        assert view["load first"]["own"] == [[rank] * 4, {"rank": rank}]
    assert seen[0]["first"]["path"] == seen[1]["first"]["path"]


def test_both_ranks_wrote_a_share(scratch: Path, seen: list[dict[str, Any]]) -> None:
    files = {file.name: file.stat().st_size for file in Path(seen[0]["first"]["path"]).iterdir()}
    assert sorted(files) == [
        "MANIFEST.json", "shard-00000.safetensors", "shard-00001.safetensors", "state-00000.json", "state-00001.json",
    ]  # fmt: skip
    sizes = [files[f"shard-0000{rank}.safetensors"] for rank in range(2)]
    assert max(sizes) < 1.5 * min(sizes)


def test_ranks_that_differ_save_nothing_and_name_what_differs(seen: list[dict[str, Any]]) -> None:
    for view in seen:
        assert "replica mismatch" in view["values differ"]["error"] and "odd" in view["values differ"]["error"]
        assert "replica mismatch: names" in view["names differ"]["error"]


def test_a_full_disk_on_one_rank_is_known_to_both_and_leaves_the_old_one(seen: list[dict[str, Any]]) -> None:
    for view in seen:
        assert "rank 1" in view["disk of rank 1 full"]["error"] and "ENOSPC" in view["disk of rank 1 full"]["error"]
        assert view["left"] == ["c0-s1"]
        assert view["second"]["error"] is None
    assert seen[1]["fired"] >= 2, "the disk was full, and the damage was read"


def test_damage_that_one_rank_sees_sends_both_to_the_older_one(scratch: Path, seen: list[dict[str, Any]]) -> None:
    for view in seen:
        assert "c2-s2" in view["load path"]
        older = view["load with damage seen by rank 1"]
        assert older["step"] == 1 and older["equal"] and len(older["reports"]) == 1
    assert "refused by rank 1" in seen[0]["load path"] and "sha256" in seen[1]["load path"]
    assert (scratch / "ckpt").joinpath(*[p for p in os.listdir(scratch / "ckpt") if p.endswith(".bad")]).is_dir()


def test_another_number_of_ranks_loads_the_tensors_and_nobodys_own_part(
    scratch: Path, seen: list[dict[str, Any]]
) -> None:
    loaded = load_newest(scratch / "ckpt", Peers(None, 0, 1), FileOps(), report=lambda kind, info: None)
    assert loaded is not None and (loaded.step, loaded.world_size) == (3, 2)
    expected = payload(3, 0).tensors
    assert loaded.tensors.keys() == expected.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in expected.items())
    assert loaded.local_tensors is None and loaded.local_meta is None


def test_a_shard_that_is_missing_or_of_another_checkpoint_is_refused_by_both(seen: list[dict[str, Any]]) -> None:
    for view in seen:
        assert "shard-00001" in view["missing"] and "No such file" in view["missing"]
        assert "shard-00001" in view["swapped"] and "sha256" in view["swapped"]


def test_a_checkpoint_that_rank_0_cannot_log_stops_both(scratch: Path, seen: list[dict[str, Any]]) -> None:
    for view in seen:
        assert view["logged"] == [None]
    assert "nothing more may take effect" in seen[0]["log lost"]
    assert "rank 0 cannot write its log" in seen[1]["log lost"]
    assert len(os.listdir(scratch / "logged")) == 2, "it is whole on the disk, and the next start may use it"


def test_a_rank_that_leaves_during_a_save_is_an_error_of_its_own_kind(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["peer lost"] is True


def test_rank_0_opens_the_run_for_both_and_its_refusal_is_that_of_both(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["open"] == seen[1]["open"] and seen[0]["open"]["path"].endswith("20250102T030405Z-run")
    assert seen[0]["open nonsense"] == seen[1]["open nonsense"]
    assert seen[0]["open nonsense"]["error"] == "RunDirError" and "nowhere" in seen[0]["open nonsense"]["text"]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
