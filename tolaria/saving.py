"""When checkpoints are written: every so many boundaries if none is in flight, and one at the end."""

from collections.abc import Callable

import torch

from tolaria.config import Config
from tolaria.dist import World
from tolaria.errors import CheckpointError
from tolaria.record import RunRecord
from tolaria.recovery.checkpoint import CheckpointWriter, Payload
from tolaria.recovery.journal import Journal
from tolaria.recovery.no_page import AnyPage
from tolaria.recovery.page import Phase
from tolaria.replica import Replica
from tolaria.state import TrainState


class Saver:
    """Starts saves, notes how they ended. Collective: all ranks call it at the same steps."""

    def __init__(
        self,
        config: Config,
        world: World,
        state: TrainState,
        replica: Replica,
        record: RunRecord,
        *,
        writer: CheckpointWriter,
        journal: Journal,
        page: AnyPage,
    ) -> None:
        self.config = config
        self.world = world
        self.state = state
        self.replica = replica
        self.record = record
        self.writer = writer
        self.journal = journal
        self.page = page
        self._position = 0, 0
        self.changed = False
        """Whether an act has changed the state since the newest save; set alike on all ranks."""

    def save_if_due(self, payload: Callable[[], Payload]) -> None:
        """After a boundary: start a save if one is due and none is in flight. Blocks for the copy to host memory."""
        every = self.config.checkpoint.every
        if not every or self.state.boundary % every:
            return
        busy = torch.tensor([int(self.writer.in_flight)])
        # Ranks may see the end of a save at different moments; the skip must be everybody's.
        if self.world.peers.max(busy).item():
            self.record.counters["checkpoints_skipped"] += 1
            self.record.events.emit("checkpoint_skipped", "warning", reason="the one before is still being written")
            return
        self.collect()
        self._save(payload())

    def save_last(self, payload: Callable[[], Payload]) -> None:
        """Write one more checkpoint unless the newest is of this step; blocks until it is committed.

        Raises CheckpointError when it could not be written.
        """
        self.page.enter(Phase.SAVE, self.state.step)
        if self.finish() is None and self._is_saved():
            return
        self.replica.synchronise_buffers()
        self.save_now(payload())

    def save_now(self, payload: Payload) -> None:
        """Write this checkpoint; blocks until it is committed. Raises CheckpointError when it could not be written."""
        self._save(payload)
        failed = self.finish()
        if failed is not None:
            raise CheckpointError(f"the last checkpoint was not written: {failed}")

    def save_asked(self, payload: Callable[[], Payload]) -> str | None:
        """Write a checkpoint now; blocks until it is committed. Why it could not be written, None if it was."""
        self.page.enter(Phase.SAVE, self.state.step)
        self.finish()
        if self._is_saved():
            return None
        self.replica.synchronise_buffers()
        self._save(payload())
        return self.finish()

    def finish(self) -> str | None:
        """Wait for the save in flight; its error, None when it was committed or there was none."""
        limit_s = self.config.dist.timeout_s
        with self.replica.ledger.phases("checkpoint"):
            over = self.writer.wait(limit_s)
        if not over:
            raise CheckpointError(f"a checkpoint was still being written after {limit_s:g} s (dist.timeout_s)")
        return self.collect()

    def collect(self) -> str | None:
        """Record finished saves; the newest one's error, None when it was committed or there is none. Local."""
        error = None
        for outcome in self.writer.poll():
            self.record.saved(outcome, is_coordinator=self.world.is_coordinator)
            if outcome.seq is not None and outcome.error is None:
                self.journal.committed(outcome.seq, outcome.step, *self._position)
            error = outcome.error
        return error

    def _is_saved(self) -> bool:
        return self.record.checkpoint_step == self.state.step and not self.changed

    def _save(self, payload: Payload) -> None:
        self._position, self.changed = (payload.branch, payload.acts), False
        with self.replica.ledger.phases("checkpoint"):
            self.writer.save(payload)
