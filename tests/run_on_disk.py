"""A run as the disk sees it, without training: log, checkpoints, a return, deletions, and how a start takes it up.

Every checkpoint holds a number of its own, so that a state put together from two would show.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tolaria.dist import Peers
from tolaria.leyline.types import Decision
from tolaria.recovery.checkpoint import CheckpointWriter, Loaded, Payload, SaveOutcome, load_newest
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.journal import Journal
from tolaria.recovery.timeline import Return, Timeline, on_timeline
from tolaria.recovery.wal import Wal, WalKind, WalRecord

ALONE = Peers(None, 0, 1)
RUN_ID = "run"


class Unsynced(FileOps):
    """Skips what only a power cut could tell from the real thing, and the log's 16 MiB reserve."""

    def fsync(self, fd: int) -> None:
        pass

    def datasync(self, fd: int) -> None:
        pass

    def free_bytes(self, path: Path) -> int:
        return 2**25


def payload(number: int, step: int, branch: int) -> Payload:
    tensors = {"w": torch.full((64,), float(number)), "v": torch.full((3,), number, dtype=torch.int64)}
    return Payload(
        step=step, tensors=tensors, meta={"n": number}, local_tensors={}, local_meta={"n": number}, branch=branch
    )


def require_whole(loaded: Loaded) -> None:
    """All parts of one and the same checkpoint."""
    expected = payload(loaded.meta["n"], loaded.step, loaded.branch)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert loaded.tensors.keys() == expected.tensors.keys()
    assert (loaded.meta, loaded.local_meta) == (expected.meta, expected.local_meta)


@dataclass(frozen=True)
class Found:
    """What a start took up."""

    records: list[WalRecord]
    loaded: Loaded | None

    @property
    def said(self) -> list[bytes]:
        """What was logged, without the records that only say that a segment begins or a commit was found unlogged."""
        return [r.body for r in self.records if r.kind not in (WalKind.OPEN, WalKind.CHECKPOINT)]


def open_log(root: Path, fs: FileOps) -> tuple[Wal, list[WalRecord], Journal]:
    wal, records = Wal.open(root / "wal", run_id=RUN_ID, generation="g", facts={}, fs=fs, check_owner=lambda: None)
    return wal, records, Journal(Timeline.of(records), wal=wal, good_after=1)


def load(root: Path, journal: Journal, fs: FileOps) -> Loaded | None:
    """As a start does."""
    loaded = load_newest(
        root / "ckpt", ALONE, fs, report=lambda kind, info: None, accept=journal.accepts,
        known=journal.known_manifests, last_lsn=journal.last_lsn,
    )  # fmt: skip
    if loaded is not None:
        journal.adopt(loaded.seq, loaded.step, loaded.branch, loaded.manifest_sha256)
    return loaded


def take_up(root: Path, fs: FileOps | None = None) -> Found:
    """What a start finds."""
    disk = fs or Unsynced()
    wal, records, journal = open_log(root, disk)
    try:
        return Found(records, load(root, journal, disk))
    finally:
        wal.close()


@dataclass
class Script:
    """What was promised so far. ``promised`` is called after each promise with what it was."""

    root: Path
    fs: FileOps
    promised: Callable[[str, Any], None] = lambda kind, what: None
    num_said: int = 0
    number: int = 0

    def begin(self) -> None:
        self.wal, records, self.journal = open_log(self.root, self.fs)
        self.num_said = len(Found(records, None).said)
        loaded = load(self.root, self.journal, self.fs)
        self.number = loaded.meta["n"] + 1 if loaded is not None else 0
        self.writer = CheckpointWriter(
            self.root / "ckpt", run_id=RUN_ID, generation="g", peers=ALONE, fs=self.fs, keep=2, wal=self.wal,
            retention=self.journal.retention,
        )  # fmt: skip

    def decide(self, boundary: int) -> None:
        self.journal.decided(
            Decision(
                boundary=boundary,
                step_effective=boundary,
                source="policy",
                reason="accepted",
                conservative=False,
                commands=(b"bytes",),
            )
        )
        self._said()

    def save(self, step: int, branch: int) -> SaveOutcome:
        self.writer.save(payload(self.number, step, branch))
        assert self.writer.wait(30)
        (outcome,) = self.writer.poll()
        self.number += 1
        if outcome.seq is not None and outcome.error is None:
            self.journal.committed(outcome.seq, step, branch)
            self.promised("saved", (outcome.seq, step, branch))
        return outcome

    def healthy(self) -> None:
        for _ in self.journal.healthy_boundary():
            self._said()

    def go_back(self, step: int, branch: int, from_step: int) -> Loaded | None:
        self.journal.went_back(
            Return(
                branch=branch, to_step=step, to_boundary=step, from_step=from_step, at_boundary=from_step, level=3,
                cause="loss", reason="test",
            )
        )  # fmt: skip
        self._said()
        return load_newest(
            self.root / "ckpt", ALONE, self.fs, report=lambda kind, info: None, accept=self.journal.accepts
        )

    def end(self) -> None:
        self.journal.ended()
        self._said()
        self.writer.close()
        self.wal.close()

    def kill(self) -> None:
        """Let go of threads and files, nothing else."""
        self.writer.close()
        self.wal.close()

    def _said(self) -> None:
        self.num_said += 1
        self.promised("said", self.num_said)


def first_start(root: Path, fs: FileOps | None = None) -> None:
    """Two checkpoints and two decisions, then killed."""
    script = Script(root, fs or Unsynced())
    script.begin()
    for step in (0, 1):
        script.decide(step)
        script.save(step, 0)
    script.kill()


def second_start(script: Script) -> None:
    """Recovery, two checkpoints, a return that makes one of them void, another course, the end."""
    script.begin()
    script.decide(2)
    script.save(2, 0)
    script.healthy()
    script.decide(3)
    script.save(3, 0)
    loaded = script.go_back(2, 1, 3)
    assert loaded is not None and loaded.step <= 2
    script.decide(3)
    script.save(3, 1)
    script.save(4, 1)
    script.end()


def newest_promised(saved: list[tuple[int, int, int]], found: Found) -> int:
    """The oldest checkpoint that a start may take after these were promised, given what the log says."""
    returns = Timeline.of(found.records).returns
    return max((seq for seq, step, branch in saved if on_timeline(returns, branch, step)), default=-1)


def broken_promises(found: Found, said: list[bytes], num_said: int, saved: list[tuple[int, int, int]]) -> list[str]:
    """What a start after a crash lost, doubled or mixed up."""
    wrong = []
    if found.said != said[: len(found.said)] or len(found.said) < num_said:
        wrong.append(f"{len(found.said)} records of at least {num_said}")
    if found.loaded is None:
        return [*wrong, "no checkpoint"]
    require_whole(found.loaded)
    if found.loaded.seq < newest_promised(saved, found):
        wrong.append(f"c{found.loaded.seq} of at least c{newest_promised(saved, found)}")
    if not on_timeline(Timeline.of(found.records).returns, found.loaded.branch, found.loaded.step):
        wrong.append("a void checkpoint")
    return wrong
