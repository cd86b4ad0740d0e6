"""Saves checkpoints beside the training loop: the loop waits for the copy to host memory, a thread does the rest."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tolaria.dist import Peers
from tolaria.errors import PeerLost, RunLocked, TolariaError, WalError
from tolaria.recovery.commit import Abandoned, Committer
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.retain import Retention
from tolaria.recovery.staging import HostBuffers, Payload, Staged
from tolaria.recovery.wal import Wal


@dataclass(frozen=True, kw_only=True)
class SaveOutcome:
    """How one save ended. Exactly one of ``path`` and ``error`` is set; the error is equal on every rank.

    size: bytes of all files. seconds: from the call to the durable commit. blocked_seconds: of these, how long
    `save` kept its caller. cleanup_error (rank 0): an old checkpoint could not be deleted; the new one is valid.
    """

    seq: int | None
    step: int
    path: Path | None
    size: int
    seconds: float
    blocked_seconds: float
    error: str | None
    cleanup_error: str | None


class _Save:
    """One save in flight. ``outcome`` or ``failure`` is set when it ends in a way that was foreseen."""

    def __init__(
        self, committer: Committer, staged: Staged, retention: Retention, started_s: float, clock: Callable[[], float]
    ) -> None:
        self.outcome: SaveOutcome | None = None
        self.failure: TolariaError | None = None
        self._committer = committer
        self._staged = staged
        self._retention = retention
        self._started_s = started_s
        self._blocked_s = clock() - started_s
        self._clock = clock
        # A daemon: a thread that waits for a dead rank must not keep this process from exiting.
        self._thread = threading.Thread(target=self._run, name="tolaria-checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            committed = self._committer.commit(self._staged, self._retention)
        except Abandoned as reason:
            if reason.taken_over:
                self.failure = RunLocked(str(reason))
            else:
                self.outcome = self._outcome(error=str(reason))
        except (PeerLost, WalError) as error:
            self.failure = error
        else:
            self.outcome = self._outcome(
                seq=committed.seq, path=committed.path, size=committed.size, cleanup_error=committed.cleanup_error
            )

    def _outcome(
        self, *, seq: int | None = None, path: Path | None = None, size: int = 0, error: str | None = None,
        cleanup_error: str | None = None,
    ) -> SaveOutcome:  # fmt: skip
        return SaveOutcome(
            seq=seq, step=self._staged.step, path=path, size=size, seconds=self._clock() - self._started_s,
            blocked_seconds=self._blocked_s, error=error, cleanup_error=cleanup_error,
        )  # fmt: skip


class CheckpointWriter:
    """Writes checkpoints of one run under ``root``, one at a time, and keeps the newest ``keep``.

    peers: collectives for the writer's thread alone; no other thread may use them while a save is in flight.
    check_owner: called on rank 0 before a save touches the disk and right before its commit; raises RunLocked
    when another start has taken the run over, RunDirError when that cannot be told.
    wal: rank 0's log; a checkpoint counts when it is in there. retention: asked at the start of each save.
    Before the first save rank 0 holds the run's lock: what unfinished saves left under ``root`` is deleted.
    """

    def __init__(
        self, root: Path, *, run_id: str, generation: str, peers: Peers, fs: FileOps, keep: int,
        check_owner: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic,
        wal: Wal | None = None, retention: Callable[[], Retention] = Retention,
    ) -> None:  # fmt: skip
        if keep < 1:
            raise ValueError(f"keep={keep}: expected 1 or more")
        self._committer = Committer(
            root, run_id=run_id, generation=generation, peers=peers, fs=fs, keep=keep, check_owner=check_owner,
            wal=wal,
        )  # fmt: skip
        self._retention = retention
        self._buffers = HostBuffers()
        self._clock = clock
        self._save: _Save | None = None
        self._outcomes: list[SaveOutcome] = []
        self._closed = False

    @property
    def in_flight(self) -> bool:
        """True while a save is being written. Local: ranks may see the end of one save at different moments, so
        whether to start the next one is for all ranks to agree."""
        return self._save is not None and self._save.running

    def save(self, payload: Payload) -> None:
        """Start a save. Collective: every rank calls it at the same step.

        Blocks for the copy into host memory; what the caller changes afterwards is not in the checkpoint. Raises
        RuntimeError while a save is in flight, ValueError or TypeError for content that cannot be stored, and
        what `poll` raises for the save before.
        """
        if self._closed or self.in_flight:
            raise RuntimeError("save: the writer is closed or the previous save is still in flight")
        self._collect()
        started = self._clock()
        staged = self._buffers.stage(payload)
        self._save = _Save(self._committer, staged, self._retention(), started, self._clock)

    def poll(self) -> list[SaveOutcome]:
        """The saves that ended since the last call. Local, does not block.

        Raises PeerLost when a rank was lost during a save, RunLocked when another start owns the run now, WalError when
        a checkpoint could not be logged.
        """
        self._collect()
        finished, self._outcomes = self._outcomes, []
        return finished

    def wait(self, timeout_s: float) -> bool:
        """Wait for the save in flight, if any. Local. False when it is still running after ``timeout_s``."""
        if self._save is not None:
            self._save.join(timeout_s)
        return not self.in_flight

    def close(self) -> None:
        """Accept no further save and give the host memory back. Local, does not wait: call `wait` before."""
        self._closed = True
        self._buffers.release()

    def _collect(self) -> None:
        if self._save is None or self._save.running:
            return
        ended, self._save = self._save, None
        if ended.failure is not None:
            raise ended.failure
        if ended.outcome is None:
            raise RuntimeError("the checkpoint thread died of an unforeseen error; its traceback is on stderr")
        self._outcomes.append(ended.outcome)
