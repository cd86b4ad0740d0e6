"""The composition root: the only file that knows every class. From a Config to a finished run."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tolaria.config import Config, OptimConfig
from tolaria.coordinator.coordinator import Coordinator
from tolaria.data import EpochSampler, Loader, dataset_size
from tolaria.dist import World, init_world
from tolaria.errors import ConfigError, ReplicaMismatch, RunDirError, TaskError
from tolaria.hardware import device_text, hardware_context
from tolaria.kasmina.host import Kasmina
from tolaria.kasmina.slot import Slot, attach, find_slots, probe_shapes
from tolaria.measure import Evaluator
from tolaria.objective import Batch, Objective
from tolaria.optim.lr import LRController
from tolaria.optim.rebuild import build_optimizer
from tolaria.options import to_toml
from tolaria.process import StopFlag, agent_id
from tolaria.record import RunRecord
from tolaria.recovery.checkpoint import CheckpointWriter, Loaded, load_newest, load_path
from tolaria.recovery.fsops import FileOps
from tolaria.replica import Replica, evaluating
from tolaria.rundir import RunDir, open_run
from tolaria.state import HOST_GROUP, TrainState, load_rng_tensors, seed_rank
from tolaria.step import TrainStep
from tolaria.task import Task, load_task
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.metrics import MetricsLog
from tolaria.telemetry.progress import Progress, StartInfo
from tolaria.telemetry.summary import RunSummary, latency_split, versions, write_summary
from tolaria.train import Parts, Trainer

NO_POLICY = "none"


def train(config: Config, *, task: Callable[..., Task] | None = None) -> RunSummary:
    """Train as configured and return the summary, the same that ends up in summary.json.

    Every rank calls it: under torchrun in each process, without it in the one process there is. ``task`` replaces
    ``config.task.factory`` by a function of the calling script. Raises TolariaError; the run directory then tells how
    far the run came.
    """
    with ExitStack() as cleanup:
        stop = cleanup.enter_context(StopFlag())
        world = _join(config, cleanup)
        progress = Progress(config.log.progress if world.is_coordinator else "off")
        cleanup.callback(progress.close)
        run = cleanup.enter_context(
            open_run(
                config.run, world.peers, generation=world.generation, agent=agent_id(), now=datetime.now(UTC),
                fs=FileOps(),
            )
        )  # fmt: skip
        events = EventLog(run.path / "events.jsonl", world.global_rank, run_id=run.run_id)
        cleanup.callback(events.close)
        trainer, replica = _assemble(config, task, world, run, events, progress, stop, cleanup)
        outcome = trainer.run()
        return _conclude(outcome, trainer, config, world, run, replica)


def _join(config: Config, cleanup: ExitStack) -> World:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.dist.threads or max(1, (os.cpu_count() or 1) // local_ranks))
    torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
    world = init_world(
        device=config.dist.device, timeout_s=config.dist.timeout_s, control_timeout_s=config.dist.control_timeout_s
    )
    cleanup.callback(world.close)
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
    cleanup: ExitStack,
) -> tuple[Trainer, Replica]:
    task = load_task(make_task or config.task.factory, config.task.args, config.run.seed)
    loader = Loader(task, config.data, world.device)
    state, optim = _build_state(config, task, world, loader)
    replica = Replica(state, world, config, events)
    cleanup.callback(replica.close)
    record = RunRecord(state, events, progress)
    if world.is_coordinator:
        _write_config(config, run)
        _announce(config, state, world, run, progress)
    events.emit("run_started", world_size=world.world_size, device=str(world.device), restarted=run.restarted,
                parameters=state.parameter_count, versions=versions(), optimizer=optim.name)  # fmt: skip
    loaded = _load(run, world, events, progress)
    if loaded is not None:
        state.load(loaded.tensors, loaded.meta)
    replica.rebuild(first=True)
    if loaded is None or loaded.local_tensors is None:
        seed_rank(config.run.seed, state.step, world.global_rank)
    else:
        load_rng_tensors(loaded.local_tensors, world.device)

    def sample() -> Batch:
        size = dataset_size(task.train, "training")
        indices = [i % size for i in range(config.train.batch_size)]
        return next(iter(loader.batches(task.train, [(indices, [1.0 / len(indices)] * len(indices))])))

    coordinator = _coordinator(config, state, replica, world, run, events, cleanup, sample)
    progress.status("compiling" if replica.compiled else "checking the model")
    replica.warm_up(sample())
    trainer = Trainer(
        Parts(
            config=config,
            world=world,
            task=task,
            state=state,
            loader=loader,
            step=TrainStep(state, replica, events, clip_norm=config.train.clip_norm, debug=config.train.debug),
            evaluator=Evaluator(task, state, replica, loader, world, config.data.validation_batch_size),
            coordinator=coordinator,
            writer=_writer(config, world, run, cleanup),
            record=record,
            events=events,
            metrics=_metrics(world, run, cleanup),
            progress=progress,
            stop=stop,
        )
    )
    if loaded is not None and loaded.local_meta is not None:
        trainer.load_local_meta(loaded.local_meta)
    record.counters["restarts"] += run.restarted
    return trainer, replica


def _build_state(config: Config, task: Task, world: World, loader: Loader) -> tuple[TrainState, OptimConfig]:
    model = task.model.to(world.device)
    slots = _slots(model, {**task.slots, **config.kasmina.slots})
    host_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    host_buffers = dict(model.named_buffers()) | {n: p for n, p in model.named_parameters() if not p.requires_grad}
    if not host_parameters:
        raise TaskError("the task's model has no parameter that requires a gradient")
    objective = Objective(task, slots)
    batch = next(iter(loader.batches(task.train, [([0, 0], [0.5, 0.5])])))
    with evaluating(objective):
        shapes = probe_shapes(slots, lambda: objective.model(batch.inputs))
    kasmina = Kasmina(slots, shapes, config.kasmina, config.run.seed, world.device)
    optim = _optimizer_settings(config.optim, task)
    sampler = EpochSampler(
        dataset_size(task.train, "training"), seed=config.run.seed, rank=world.global_rank,
        world_size=world.world_size, batch_size=config.train.batch_size, accumulation=config.train.accumulation,
    )  # fmt: skip
    total = config.train.epochs * sampler.steps_per_epoch
    lr = LRController(config.lr, optim.lr, min(total, config.train.max_steps) if config.train.max_steps else total)
    lr.add_group(HOST_GROUP, "host", 0)
    state = TrainState(
        objective=objective,
        host_parameters=host_parameters,
        host_buffers=host_buffers,
        kasmina=kasmina,
        optimizer=build_optimizer(optim, {HOST_GROUP: host_parameters}, world.device),
        lr=lr,
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.precision.amp == "fp16"),
        sampler=sampler,
    )
    return state, optim


def _slots(model: torch.nn.Module, paths: dict[str, str]) -> dict[str, Slot]:
    slots = find_slots(model)
    for name, path in paths.items():
        if name in slots:
            raise TaskError(f"two slots are named {name!r}: the model has one already, and {path!r} asks for another")
        slots[name], _ = attach(model, name, path)
    return slots


def _optimizer_settings(config: OptimConfig, task: Task) -> OptimConfig:
    known = {f.name for f in fields(OptimConfig)}
    unknown = sorted(set(task.optimizer) - known)
    if unknown:
        raise TaskError(f"the task's optimizer has unknown keys {unknown}; known: {', '.join(sorted(known))}")
    try:
        return replace(config, **task.optimizer)
    except ValueError as error:
        raise TaskError(f"the task's optimizer: {error}") from error


def _load(run: RunDir, world: World, events: EventLog, progress: Progress) -> Loaded | None:
    if run.resume is None:
        return None

    def report(kind: str, details: dict[str, Any]) -> None:
        events.emit(kind, "error", **details)
        progress.note(f"{details['path']} is damaged ({details['reason']}); trying the one before", label="ckpt",
                      level="error")  # fmt: skip

    fs = FileOps()
    if run.resume.is_checkpoint:
        loaded: Loaded | None = load_path(run.resume.path, world.peers, fs)
    else:
        own = run.resume.path == run.checkpoints
        loaded = load_newest(run.resume.path, world.peers, fs, report=report, quarantine=own)
    if loaded is not None:
        events.emit("resumed", path=str(loaded.path), seq=loaded.seq, saved_step=loaded.step,
                    saved_world_size=loaded.world_size, local_state=loaded.local_meta is not None)  # fmt: skip
        progress.note(f"{loaded.path.name} of {loaded.path.parent.parent}", label="resumed")
    return loaded


def _coordinator(
    config: Config,
    state: TrainState,
    replica: Replica,
    world: World,
    run: RunDir,
    events: EventLog,
    cleanup: ExitStack,
    sample: Callable[[], Batch],
) -> Coordinator:
    client = revive = None
    if world.is_coordinator and (config.tamiyo.endpoint or config.tamiyo.policy != NO_POLICY):
        # Only rank 0 talks to the policy; the others need no ZeroMQ.
        from tolaria.tamiyo.client import open_client
        from tolaria.tamiyo.embedded import EmbeddedPolicy

        where: dict[str, Any] = {}
        if not config.tamiyo.endpoint:
            embedded = cleanup.enter_context(
                EmbeddedPolicy(config.tamiyo.policy, config.tamiyo.args, log_path=run.path / "tamiyo.log")
            )
            embedded.wait_ready()
            revive = embedded.revive
            where = {"endpoint": embedded.endpoint, "key_file": embedded.key_file}
        client = open_client(config.tamiyo, run_id=run.run_id, generation=world.generation, **where)
        cleanup.callback(client.close)
    return Coordinator(
        state, replica, world, config.tamiyo, events, run_id=run.run_id, experiment=config.run.name, client=client,
        revive=revive, hardware=lambda: hardware_context(world.device), sample=sample,
    )  # fmt: skip


def _writer(config: Config, world: World, run: RunDir, cleanup: ExitStack) -> CheckpointWriter:
    writer = CheckpointWriter(
        run.checkpoints, run_id=run.run_id, generation=world.generation, peers=world.background, fs=FileOps(),
        keep=config.checkpoint.keep, check_owner=run.check_owner,
    )  # fmt: skip
    cleanup.callback(writer.close)
    return writer


def _metrics(world: World, run: RunDir, cleanup: ExitStack) -> MetricsLog | None:
    if not world.is_coordinator:
        return None
    metrics = MetricsLog(run.path / "metrics.jsonl")
    cleanup.callback(metrics.close)
    return metrics


def _write_config(config: Config, run: RunDir) -> None:
    try:
        FileOps().replace_file(run.path / "config.toml", to_toml(config).encode())
    except OSError as error:
        raise RunDirError(f"{run.path / 'config.toml'}: cannot be written ({error.strerror})") from error


def _announce(config: Config, state: TrainState, world: World, run: RunDir, progress: Progress) -> None:
    kind = "debug, eager" if config.train.debug else "compiled" if config.compile.enabled else "eager"
    policy = config.tamiyo.endpoint or config.tamiyo.policy
    progress.start(
        StartInfo(
            title=f"tolaria  {config.run.name}",
            lines=[
                ("where", f"{device_text(world.device, world.world_size)}, {kind}, amp {config.precision.amp}"),
                ("model", f"{state.parameter_count:,} parameters, slots: {', '.join(state.kasmina.slots) or 'none'}"),
                ("data", f"{state.sampler.num_samples:,} samples, {state.sampler.steps_per_epoch} steps an epoch"),
                ("policy", policy),
                ("run", _short(run.path)),
            ],
        )
    )


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _conclude(
    outcome: str, trainer: Trainer, config: Config, world: World, run: RunDir, replica: Replica
) -> RunSummary:
    parts, state, record = trainer.parts, trainer.state, trainer.parts.record
    digests = world.peers.gather_digests(state.digest())
    start = sys.executable.rsplit("/", 1)[-1] + " -m tolaria.launch"
    if world.world_size > 1:
        start = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', world.world_size)} -m tolaria.launch"
    summary = RunSummary(
        outcome=outcome,
        name=config.run.name,
        run_id=run.run_id,
        run_dir=str(run.path),
        seed=config.run.seed,
        epochs=state.sampler.epoch,
        steps=state.step,
        seconds=record.seconds,
        world_size=world.world_size,
        device=str(world.device),
        final=record.final,
        best=record.best,
        before_growth=record.before_growth,
        parameters_start=record.parameters_start,
        parameters_end=state.parameter_count,
        seeds=record.seeds(),
        commands=list(parts.coordinator.ledger.records.values()),
        boundaries=state.boundary,
        latency_ms=latency_split(record.latencies),
        mode=state.mode.name,
        checkpoint=_short(record.checkpoint) if record.checkpoint else "",
        resume=f"{start} --config {_short(run.path)}/config.toml --resume {_short(run.path)}",
        state_digest={rank: digest.hex() for rank, digest in enumerate(digests)},
        counters={**record.counters, "skipped_steps": state.skipped_steps, "events_lost": parts.events.lost},
        versions=versions(),
    )
    if world.is_coordinator:
        write_summary(run.path / "summary.json", summary)
        parts.progress.summary(summary)
    parts.events.emit("run_ended", outcome=outcome, steps=state.step, digest=digests[world.global_rank].hex())
    state.kasmina.terminate()
    replica.close()
    if len(set(digests)) > 1:
        seen = ", ".join(f"rank {r}: {d.hex()[:12]}" for r, d in enumerate(digests))
        raise ReplicaMismatch(f"the ranks ended with different states ({seen})")
    return summary
