"""The composition root: the only file that knows every class. From a Config to a finished run."""

import os
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import UTC, datetime

import torch

from tolaria.alarm import Alarm
from tolaria.comeback import Comeback
from tolaria.compiled_code import compiled_code
from tolaria.config import Config
from tolaria.coordinator.coordinator import Coordinator
from tolaria.coordinator.packet import RunFacts
from tolaria.data import Loader, dataset_size
from tolaria.dist import World, init_world, lost_peers
from tolaria.errors import ConfigError, RunHalted, TolariaError, TrainingUnstable
from tolaria.finish import HALTED, UNSTABLE, conclude, start_info
from tolaria.guard import Guard
from tolaria.hardware import Hardware
from tolaria.loop import Trainer
from tolaria.measure import Evaluator
from tolaria.objective import Batch
from tolaria.outfit import make_clock, make_desk, make_ring, make_writer, write_config
from tolaria.outlets import open_outlets
from tolaria.parts import Parts
from tolaria.process import StopFlag, agent_id, keep_freed_memory, settled
from tolaria.profiling import make_profiler
from tolaria.record import RunRecord
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.journal import Journal
from tolaria.recovery.page import Phase
from tolaria.recovery.sentinel import Sentinel
from tolaria.recovery.snapshots import SnapshotRing
from tolaria.replica import Replica
from tolaria.restore import Saved, facts_of, open_journal, take_up
from tolaria.rollback import Rollback
from tolaria.rundir import RunDir, open_run
from tolaria.saving import Saver
from tolaria.setup import boundaries_left, build_state
from tolaria.state import TrainState
from tolaria.status import RunStatus
from tolaria.step import TrainStep
from tolaria.steplog import StepLog
from tolaria.streams import load_rng_tensors, rng_tensors, seed_rank
from tolaria.tamiyo.line import PolicyLine, open_line
from tolaria.task import Task, load_task
from tolaria.telemetry.board import Clock
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.progress import Progress
from tolaria.telemetry.summary import RunSummary, versions
from tolaria.watch import watch_ranks


def train(
    config: Config, *, task: Callable[..., Task] | None = None, until: int = 0, began: float | None = None
) -> RunSummary:
    """Train as configured and return the summary, the same that ends up in summary.json.

    Every rank calls it: under torchrun in each process, without it in the one process there is. ``task`` replaces
    ``config.task.factory`` by a function of the calling script. ``until``: stop after this step as if asked to, with
    everything planned as it was; 0: go on to the end. ``began``: since when the time of the run counts, on
    `time.perf_counter`; None: now. Raises TolariaError; the run directory then tells how far the run came.
    """
    began = time.perf_counter() if began is None else began
    with ExitStack() as cleanup:
        stop = cleanup.enter_context(StopFlag())
        world = _join(config, cleanup)
        progress = Progress(config.log.progress if world.is_coordinator else "off", detail=config.log.detail)
        cleanup.callback(progress.close)
        run = cleanup.enter_context(
            open_run(
                config.run, world.peers, generation=world.generation, agent=agent_id(), now=datetime.now(UTC),
                fs=FileOps(),
            )
        )  # fmt: skip
        events = EventLog(run.path / "events.jsonl", world.global_rank, run_id=run.run_id)
        cleanup.callback(events.close)
        clock = make_clock(config, world, run, began, cleanup)
        try:
            with lost_peers():
                trainer = _assemble(config, task, world, run, events, progress, stop, clock, cleanup)
                trainer.until = until
                return _run(trainer, world, run)
        except TolariaError as error:
            trace = "".join(traceback.format_exception(error))[-8000:]
            events.emit("run_failed", "critical", error=type(error).__name__, reason=str(error), trace=trace)
            raise


def _run(trainer: Trainer, world: World, run: RunDir) -> RunSummary:
    """Train; the summary is written also when the run gives up. Only a run that ends well leaves no snapshot behind."""
    try:
        with settled():
            outcome = trainer.run()
    except TrainingUnstable:
        conclude(UNSTABLE, trainer, world, run)
        raise
    except RunHalted:
        conclude(HALTED, trainer, world, run)
        raise
    summary = conclude(outcome, trainer, world, run)
    trainer.parts.guard.ring.close(remove=True)
    trainer.parts.guard.journal.ended()
    return summary


def _join(config: Config, cleanup: ExitStack) -> World:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.dist.threads or max(1, (os.cpu_count() or 1) // local_ranks))
    torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
    world = init_world(
        device=config.dist.device, timeout_s=config.dist.timeout_s, control_timeout_s=config.dist.control_timeout_s
    )
    cleanup.callback(world.close)
    if world.device.type == "cpu":
        keep_freed_memory()
    if config.train.debug and world.world_size > 1:
        raise ConfigError(f"train.debug=True: runs one process, not {world.world_size}; leave torchrun out")
    return world


def _assemble(
    config: Config,
    make_task: Callable[..., Task] | None,
    world: World,
    run: RunDir,
    events: EventLog,
    progress: Progress,
    stop: StopFlag,
    clock: Clock,
    cleanup: ExitStack,
) -> Trainer:
    metrics = open_outlets(config, world, run, events, cleanup, {"goodput_seconds": clock.ledger.seconds})
    task = load_task(make_task or config.task.factory, config.task.args, config.run.seed)
    loader = Loader(task, config.data, world.device, events.emit)
    state, optim = build_state(config, task, world, loader)
    code = cleanup.enter_context(compiled_code(config, run.path, run.run_id, world, events))
    replica = Replica(state, world, config, events, code, clock.ledger)
    cleanup.callback(replica.close)
    record = RunRecord(state, events, progress, straggler_ratio=config.log.straggler_ratio)
    facts = facts_of(config, make_task, world)
    _announce(config, state, optim.name, world, run, events, progress)
    page = watch_ranks(config, world, run, events, cleanup)
    ring = make_ring(config, world, run, cleanup)
    journal = open_journal(config, world, run, facts)
    cleanup.callback(journal.close)
    saved = take_up(config, world, run, journal, state, events, progress, facts)
    replica.rebuild(first=True)
    evaluator = Evaluator(task, state, replica, loader, world, config.data.validation_batch_size)
    # Before the random streams are set: a user's data may draw from any of them.
    evaluator.rehearse()
    _set_streams(config, state, world, saved)
    sample = _sampling(loader)
    coordinator = _coordinator(config, state, replica, world, run, events, journal, cleanup, sample)
    progress.status("compiling" if replica.compiled else "checking the model")
    page.enter(Phase.COMPILE, state.step)
    replica.warm_up(sample)
    branch = saved.branch if saved is not None else 0
    guard, comeback = _keepers(config, state, replica, world, run, events, ring, journal, sample, branch)
    steplog = StepLog(state, events, metrics, interval_steps=config.log.interval_steps) if metrics is not None else None
    alarm = Alarm(page, world, events, journal, stop, halt_wait_s=config.recovery.halt_wait_s,
                  signals=coordinator.signals)  # fmt: skip
    profiler = cleanup.enter_context(closing(make_profiler(config.profile, events, run.path, world)))
    phases = clock.ledger.beside(profiler.phases)
    trainer = Trainer(
        Parts(
            config=config, world=world, task=task, state=state, loader=loader,
            step=TrainStep(state, replica, events, debug=config.train.debug, phases=phases),
            evaluator=evaluator, coordinator=coordinator, guard=guard, comeback=comeback,
            saver=Saver(config, world, state, replica, record, journal=journal, page=page,
                        writer=make_writer(config, world, run, journal, cleanup)),
            status=RunStatus(config, world, state, clock, coordinator=coordinator, journal=journal, alarm=alarm,
                             record=record, steplog=steplog, progress=progress),
            alarm=alarm, record=record, events=events, progress=progress,
            profiler=profiler, stop=stop, facts=facts, desk=make_desk(state, world, run, journal, cleanup),
        )
    )  # fmt: skip
    if saved is not None:
        trainer.load_local_meta(saved.local_meta, saved.first_meta)
    record.counters["restarts"] += run.restarted
    return trainer


def _announce(
    config: Config, state: TrainState, optimizer: str, world: World, run: RunDir, events: EventLog, progress: Progress
) -> None:
    """What is about to run: to the person, to the run directory, to the events."""
    if world.is_coordinator:
        write_config(config, run)
        progress.start(start_info(config, state, world, run))
    events.emit("run_started", world_size=world.world_size, device=str(world.device), restarted=run.restarted,
                parameters=state.parameter_count, versions=versions(), optimizer=optimizer)  # fmt: skip


def _keepers(
    config: Config,
    state: TrainState,
    replica: Replica,
    world: World,
    run: RunDir,
    events: EventLog,
    ring: SnapshotRing,
    journal: Journal,
    sample: Callable[[int], Batch],
    branch: int,
) -> tuple[Guard, Comeback]:
    """Who says that the run is not to go on from where it is, and who brings it back."""
    rollback = Rollback(
        state, replica, world, config.recovery, events, ring=ring, journal=journal, checkpoints=run.checkpoints,
        sample=sample,
    )  # fmt: skip
    guard = Guard(
        config.recovery, state, world, events, ring=ring, journal=journal,
        sentinel=Sentinel(state, world.peers, slice_bytes=config.recovery.drift_mb * 2**20),
        synchronise=replica.synchronise_buffers, phases=replica.ledger.phases,
    )  # fmt: skip
    comeback = Comeback(
        config.recovery, state, world, events, guard=guard, rollback=rollback, ring=ring, journal=journal, branch=branch
    )
    return guard, comeback


def _set_streams(config: Config, state: TrainState, world: World, saved: Saved | None) -> None:
    """This rank's random generators, as they were or as they are to begin."""
    if saved is None or saved.local_tensors is None:
        seed_rank(config.run.seed, state.step, world.global_rank)
    else:
        load_rng_tensors(saved.local_tensors, world.device)


def _sampling(loader: Loader) -> Callable[[int], Batch]:
    """What gives a batch of so many samples to try a structure with."""

    def sample(batch_size: int) -> Batch:
        size = dataset_size(loader.task.train, "training")
        indices = [i % size for i in range(batch_size)]
        # Data may be read with random changes; a trial batch must not move the streams that training draws from.
        streams = rng_tensors(loader.device)
        batch = next(iter(loader.batches(loader.task.train, [(indices, [1.0 / len(indices)] * len(indices))])))
        load_rng_tensors(streams, loader.device)
        return batch

    return sample


def _coordinator(
    config: Config,
    state: TrainState,
    replica: Replica,
    world: World,
    run: RunDir,
    events: EventLog,
    journal: Journal,
    cleanup: ExitStack,
    sample: Callable[[int], Batch],
) -> Coordinator:
    line = PolicyLine()
    if world.is_coordinator:
        line = open_line(
            config.tamiyo, run.path, events, cleanup, run_id=run.run_id, generation=world.generation,
            signal_mark=journal.last_signal_mark,
        )  # fmt: skip
    facts = RunFacts(
        run_id=run.run_id,
        experiment=config.run.name,
        hardware=Hardware(world.device).now,
        boundaries_left=lambda: boundaries_left(config.train, state),
    )
    coordinator = Coordinator(
        state, replica, world, config.tamiyo, events, facts=facts, journal=journal, client=line.client,
        revive=line.revive, sample=sample, rest_boundaries=config.recovery.command_boundaries,
    )  # fmt: skip
    coordinator.shadow = line.shadow
    return coordinator
