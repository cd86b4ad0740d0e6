"""What a run is fitted out with beside what it trains: memory for snapshots, writers of files, the operator's desk."""

import os
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from tolaria.config import Config
from tolaria.dist import World
from tolaria.errors import ConfigError, RunDirError
from tolaria.options import to_toml
from tolaria.orders.desk import OrderDesk, open_desk
from tolaria.recovery.checkpoint import CheckpointWriter
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.journal import Journal
from tolaria.recovery.snapshots import SnapshotRing
from tolaria.rundir import RunDir
from tolaria.state import TrainState
from tolaria.telemetry.board import NAME, Board, Clock, Former, read_former
from tolaria.telemetry.goodput import Ledger
from tolaria.telemetry.lines import warn


def make_clock(config: Config, world: World, run: RunDir, began: float, cleanup: ExitStack) -> Clock:
    """This rank's clock, which goes since ``began`` (of `time.perf_counter`), and the board on rank 0.

    Rank 0's clock goes on from what the start before has left on the board.
    """
    if not world.is_coordinator:
        return Clock(Ledger(began=began), None)
    path = run.path / NAME
    now_ns, since_s = time.time_ns(), time.perf_counter() - began
    former = read_former(path, run.run_id) if config.log.status_s else None
    known = former or Former(started_ns=now_ns - round(since_s * 1e9))
    ledger = Ledger(
        began=began, former=former.goodput if former else None, furthest=known.furthest,
        gap_s=former.gap_s(now_ns - round(since_s * 1e9)) if former else 0.0,
    )  # fmt: skip
    facts = {"run_id": run.run_id, "name": config.run.name, "started_ns": known.started_ns,
             "world_size": world.world_size, "device": str(world.device)}  # fmt: skip
    board = Board(path, interval_s=config.log.status_s, ledger=ledger, facts=facts, check_owner=run.check_owner)
    return Clock(ledger, cleanup.enter_context(board))


def make_ring(config: Config, world: World, run: RunDir, cleanup: ExitStack) -> SnapshotRing:
    """This rank's memory for snapshots."""
    recovery = config.recovery
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    limit = recovery.snapshot_memory_mb * 2**20 or psutil.virtual_memory().available // 2 // local_ranks
    ring = SnapshotRing(
        run_id=run.run_id, generation=world.generation, rank=world.global_rank, run_dir=run.path,
        slots=recovery.snapshots, limit_bytes=limit, directory=Path(recovery.snapshot_dir),
        pinned=world.device.type == "cuda",
    )  # fmt: skip
    cleanup.callback(ring.close, remove=False)
    return ring


def make_writer(config: Config, world: World, run: RunDir, journal: Journal, cleanup: ExitStack) -> CheckpointWriter:
    """What writes checkpoints in the background."""
    writer = CheckpointWriter(
        run.checkpoints, run_id=run.run_id, generation=world.generation, peers=world.background, fs=FileOps(),
        keep=config.checkpoint.keep, check_owner=run.check_owner, wal=journal.wal, retention=journal.retention,
    )  # fmt: skip
    cleanup.callback(writer.close)
    return writer


def make_desk(state: TrainState, world: World, run: RunDir, journal: Journal, cleanup: ExitStack) -> OrderDesk | None:
    """Where operators' orders come in, on rank 0. None where it cannot be opened: then the run takes no orders."""
    if not world.is_coordinator:
        return None
    try:
        desk = open_desk(
            run.path, run.run_id, world.generation, done_before=journal.orders,
            hello=lambda: {"step": state.step, "boundary": state.boundary, "mode": state.mode.name,
                           "paused": state.hand.paused, "acts": state.hand.acts},
        )  # fmt: skip
    except (RunDirError, ConfigError) as error:
        # A start at night, by itself, is not to fail of a key file that somebody has touched.
        warn(f"tolaria: the run takes no orders ({error}); training goes on")
        return None
    cleanup.callback(desk.close)
    return desk


def write_config(config: Config, run: RunDir) -> None:
    """The configuration in force, into the run directory. Raises RunDirError."""
    try:
        FileOps().replace_file(run.path / "config.toml", to_toml(config).encode())
    except OSError as error:
        raise RunDirError(f"{run.path / 'config.toml'}: cannot be written ({error.strerror})") from error
