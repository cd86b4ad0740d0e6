"""What a start goes on from: the newest point of the run's course that all ranks can read.

the log            which returns there were, which decisions stand; a broken log refuses the start
a snapshot         left in memory by ranks that died on this machine, if all ranks hold the same one
a checkpoint       the newest whose every hash verifies
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tolaria import __version__
from tolaria.config import Config
from tolaria.dist import World
from tolaria.errors import CheckpointError, CheckpointMismatch, CrashLoop, RunHalted, RunLocked, WalError
from tolaria.process import agent_id
from tolaria.recovery.checkpoint import Loaded, accept_all, load_newest, load_path
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.journal import Journal
from tolaria.recovery.leftovers import Found, find, read
from tolaria.recovery.timeline import LoggedAct, Return, Timeline, on_timeline
from tolaria.recovery.wal import Wal
from tolaria.rundir import RunDir
from tolaria.state import HAND, TrainState
from tolaria.task import Task, import_object
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.progress import Progress

MAX_FOUND = 8
MAX_STARTS = 3
"""Starts from one and the same point, by one torchrun, after which the next one refuses."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A state to go on from. ``local_tensors`` and ``local_meta`` are None when they are of a run of another size."""

    step: int
    branch: int
    source: str
    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, Any]
    local_tensors: Mapping[str, torch.Tensor] | None
    local_meta: dict[str, Any] | None
    first_meta: dict[str, Any]


def open_journal(config: Config, world: World, run: RunDir, facts: Mapping[str, Any]) -> Journal:
    """Open the log on rank 0 and tell the other ranks of the returns in it. Collective.

    Raises WalError on all ranks when the log is damaged, RunLocked when another start owns it.
    """
    good_after = config.checkpoint.good_after
    if not world.is_coordinator:
        told = json.loads(world.peers.broadcast(None))
        if "error" in told:
            raise (RunLocked if told["locked"] else WalError)(told["error"])
        acts = {n: LoggedAct(number=n, step=step) for n, step in told["acts"]}
        timeline = Timeline(returns=[Return.from_json(body) for body in told["returns"]], acts=acts)
        return Journal(timeline, wal=None, good_after=good_after)
    try:
        wal, records = Wal.open(
            run.path / "wal", run_id=run.run_id, generation=world.generation, facts=facts, fs=FileOps(),
            check_owner=run.check_owner,
        )  # fmt: skip
        timeline = Timeline.of(records)
    except (WalError, RunLocked) as error:
        told = {"error": str(error), "locked": isinstance(error, RunLocked)}
        world.peers.broadcast(json.dumps(told).encode())
        raise
    numbers = [[act.number, act.step] for act in timeline.acts.values()]
    world.peers.broadcast(json.dumps({"returns": [r.to_json() for r in timeline.returns], "acts": numbers}).encode())
    return Journal(timeline, wal=wal, good_after=good_after)


def take_up(
    config: Config,
    world: World,
    run: RunDir,
    journal: Journal,
    state: TrainState,
    events: EventLog,
    progress: Progress,
    facts: Mapping[str, Any],
) -> Saved | None:
    """Load the newest state to go on from into ``state``, and log the start; None for a run that begins. Collective.

    Raises what `find_state`, `check_facts` and `check_start` raise.
    """
    saved = find_state(config, world, run, journal, events, progress)
    if saved is not None:
        check_facts(saved.first_meta["facts"], facts, accept=config.run.accept_changes, events=events)
        state.load(saved.tensors, saved.meta)
    branch = saved.branch if saved is not None else 0
    if run.resume is None or run.resume.path == run.checkpoints:
        journal.seen(state.hand.acts, state.boundary)
    check_start(journal, world, step=state.step, branch=branch, agent=agent_id(), restarted=run.restarted)
    return saved


def find_state(
    config: Config, world: World, run: RunDir, journal: Journal, events: EventLog, progress: Progress
) -> Saved | None:
    """The newest state to go on from, on all ranks the same; None for a run that begins. Collective.

    Raises CheckpointError when there are checkpoints but none is sound, or the log's end is missing.
    """
    own = run.resume is None or run.resume.path == run.checkpoints
    found = _common_snapshot(Path(config.recovery.snapshot_dir), world, run, journal) if own else None
    at_step = max((rung.step for rung in journal.ladder.rungs.values()), default=-1)
    newer = world.peers.gather([int(found is not None and found.info.step >= at_step)])[0][0]
    if newer and found is not None:
        saved = _read_snapshot(found, world)
        if saved is not None:
            events.emit("resumed", path=str(found.path), saved_step=saved.step, branch=saved.branch,
                        source="snapshot", local_state=True)  # fmt: skip
            progress.note(f"{saved.source}, left by the start before", label="resumed")
            return saved
        events.emit("snapshot_bad", "warning", path=str(found.path))
    return _load_checkpoint(config, world, run, journal, events, progress)


def _common_snapshot(folder: Path, world: World, run: RunDir, journal: Journal) -> Found | None:
    """The newest snapshot of this run, on its course, that every rank has. Collective."""
    mine = [f for f in find(run.run_id, world.global_rank, folder)
            if on_timeline(journal.returns, f.info.branch, f.info.step, f.info.acts)]  # fmt: skip
    mine = sorted(mine, key=lambda f: (f.info.step, f.info.branch, f.info.acts))[-MAX_FOUND:]
    keys = [(f.info.step, f.info.branch, f.info.acts, int.from_bytes(f.info.digest[:7], "big")) for f in mine]
    row = [number for key in keys for number in key] + [-1] * (4 * (MAX_FOUND - len(keys)))
    rows = world.peers.gather(row)
    sets = [{tuple(r[at : at + 4]) for at in range(0, len(r), 4) if r[at] >= 0} for r in rows]
    common = set.intersection(*sets)
    return mine[keys.index(max(common))] if common else None  # type: ignore[arg-type]


def _read_snapshot(found: Found, world: World) -> Saved | None:
    snapshot = None
    with suppress(CheckpointError, OSError):  # the vote below speaks for it
        snapshot = read(found)
    if not world.peers.agree(snapshot is not None) or snapshot is None:
        return None
    return Saved(
        step=snapshot.info.step, branch=snapshot.info.branch, source=f"snapshot of step {snapshot.info.step}",
        tensors=snapshot.tensors, meta=snapshot.meta, local_tensors=snapshot.local_tensors,
        local_meta=snapshot.local_meta, first_meta=snapshot.local_meta,
    )  # fmt: skip


def _load_checkpoint(
    config: Config, world: World, run: RunDir, journal: Journal, events: EventLog, progress: Progress
) -> Saved | None:
    if run.resume is None:
        return None

    def report(kind: str, details: dict[str, Any]) -> None:
        events.emit(kind, "error", **details)
        progress.note(f"{details['path']} is damaged ({details['reason']}); trying the one before", label="ckpt",
                      level="error")  # fmt: skip

    if run.resume.is_checkpoint:
        loaded: Loaded | None = load_path(run.resume.path, world.peers, FileOps())
    else:
        own = run.resume.path == run.checkpoints
        loaded = load_newest(
            run.resume.path, world.peers, FileOps(), report=report, quarantine=own,
            allow_fresh=config.run.allow_fresh, known=journal.known_manifests if own else {},
            accept=journal.accepts if own else accept_all, last_lsn=journal.last_lsn if own else None,
        )  # fmt: skip
    if loaded is None:
        return None
    if run.resume.path == run.checkpoints:
        acts = int(loaded.meta.get(HAND, {}).get("acts", 0))
        journal.adopt(loaded.seq, loaded.step, loaded.branch, loaded.manifest_sha256, acts)
    events.emit("resumed", path=str(loaded.path), seq=loaded.seq, saved_step=loaded.step, branch=loaded.branch,
                source="checkpoint", saved_world_size=loaded.world_size,
                local_state=loaded.local_meta is not None)  # fmt: skip
    progress.note(f"{loaded.path.name} of {loaded.path.parent.parent}", label="resumed")
    return Saved(
        step=loaded.step, branch=loaded.branch if run.resume.path == run.checkpoints else 0,
        source=f"checkpoint {loaded.path.name}", tensors=loaded.tensors,
        meta=loaded.meta, local_tensors=loaded.local_tensors, local_meta=loaded.local_meta,
        first_meta=loaded.first_meta,
    )  # fmt: skip


def check_start(journal: Journal, world: World, *, step: int, branch: int, agent: str | None, restarted: bool) -> None:
    """Refuse a start that would only fail again, then log it. Collective.

    Raises on all ranks: CrashLoop when this torchrun has begun from this very point `MAX_STARTS` times already,
    RunHalted when an emergency halted the run and torchrun alone restarts it.
    """
    code, journal.restarted = 0, restarted
    if world.is_coordinator:
        if restarted and journal.halted_reason is not None:
            code = 1
        elif journal.fruitless_starts(step, branch, agent) >= MAX_STARTS:
            code = 2
        else:
            journal.started(step, branch, agent)
    code = world.peers.gather([code])[0][0]
    if code == 1:
        raise RunHalted("an emergency halted this run; find the cause, then start it again with --resume")
    if code == 2:
        raise CrashLoop(
            f"{MAX_STARTS} starts in a row began at step {step} and died before the next snapshot; the cause is most "
            "likely in the data or the code of the steps after it. See run_failed and rank_stuck in events.jsonl"
        )


def facts_of(config: Config, task: Callable[..., Task] | None, world: World) -> dict[str, Any]:
    """What a saved state depends on: kept beside it, compared when a run goes on from it."""
    return {
        "task.factory": config.task.factory if task is None else _name(task),
        "task.args": dict(config.task.args),
        "task.code": _code_digest(config, task),
        "run.seed": config.run.seed,
        "train.batch_size": config.train.batch_size,
        "train.accumulation": config.train.accumulation,
        "optim.name": config.optim.name,
        "precision.amp": config.precision.amp,
        "kasmina.slots": dict(config.kasmina.slots),
        "kasmina.blend": config.kasmina.blend,
        "aggregate.mode": config.aggregate.mode,
        "aggregate.attribution": config.aggregate.attribution,
        "ranks": world.world_size,
        "torch": str(torch.__version__),
        "tolaria": __version__,
    }


def check_facts(saved: Mapping[str, Any], now: Mapping[str, Any], *, accept: bool, events: EventLog) -> None:
    """Compare the facts of a saved state with this start's. Raises CheckpointMismatch unless equal or accepted."""
    changed = [f"{key} {saved.get(key)!r} -> {value!r}" for key, value in now.items() if saved.get(key) != value]
    if not changed:
        return
    if not accept:
        raise CheckpointMismatch(
            f"this start differs from the saved run in {'; '.join(changed)}. The run would go on, but not as it would "
            "have; to do so anyway: --run.accept_changes true"
        )
    events.emit("changes_accepted", "warning", changed=changed)


def _name(task: Callable[..., Task]) -> str:
    """``module:name`` of a function, of what a partial calls, or of a callable object's class."""
    while isinstance(task, partial):
        task = task.func
    return f"{task.__module__}:{getattr(task, '__qualname__', type(task).__qualname__)}"


def _code_digest(config: Config, task: Callable[..., Task] | None) -> str:
    """Digest of the file that the task comes from; empty where it has none (typed in, or frozen)."""
    factory: Any = task if task is not None else import_object(config.task.factory, "task.factory")
    while isinstance(factory, partial):
        factory = factory.func
    try:
        source = inspect.getsourcefile(inspect.unwrap(factory))
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] if source else ""
    except (TypeError, OSError):
        return ""
