"""The first and the last thing a person sees of a run, and the summary that stays."""

import os
from dataclasses import replace

import torch

from tolaria.config import Config
from tolaria.dist import World
from tolaria.errors import ReplicaMismatch
from tolaria.hardware import device_text
from tolaria.loop import Trainer
from tolaria.profiling import join_pages
from tolaria.rundir import RunDir
from tolaria.state import TrainState
from tolaria.telemetry.goodput import STEP_CATEGORIES, Ledger
from tolaria.telemetry.progress import StartInfo
from tolaria.telemetry.summary import RunSummary, latency_split, versions, write_summary
from tolaria.telemetry.words import short_path

UNSTABLE = "unstable"
HALTED = "halted"


def start_info(config: Config, state: TrainState, world: World, run: RunDir) -> StartInfo:
    """The head of the progress output."""
    kind = "debug, eager" if config.train.debug else "compiled" if config.compile.enabled else "eager"
    slots = ", ".join(state.kasmina.slots) or "none"
    sinks = [f"{name} {where}" for name, where in config.telemetry.sinks.items()]
    return StartInfo(
        title=f"tolaria  {config.run.name}",
        lines=[
            ("where", f"{device_text(world.device, world.world_size)}, {kind}, amp {config.precision.amp}"),
            ("model", f"{state.parameter_count:,} parameters, slots: {slots}"),
            ("data", f"{state.sampler.num_samples:,} samples, {state.sampler.steps_per_epoch} steps an epoch"),
            ("policy", config.tamiyo.endpoint or config.tamiyo.policy),
            ("run", short_path(str(run.path))),
            *([("telemetry", ", ".join(sinks))] if sinks else []),
        ],
    )


def conclude(outcome: str, trainer: Trainer, world: World, run: RunDir) -> RunSummary:
    """Compare the ranks' digests, write summary.json, show the summary, empty the slots. Collective.

    Raises ReplicaMismatch on every rank, after the summary was written, when the ranks ended with different states.
    """
    parts, state = trainer.parts, trainer.state
    # A run that gave up may have done so in the middle of a step.
    parts.saver.replica.synchronise_buffers()
    parts.profiler.close()
    digests = world.peers.gather_digests(state.digest())
    rank_times = _rank_times(parts.status.ledger, world)
    summary = _summary(outcome, trainer, world, run, digests, rank_times)
    if world.is_coordinator:
        # The ranks' digests are here, so their pages are written.
        pages = join_pages(run.path)
        summary = replace(summary, profile=str(pages) if pages is not None else "")
        write_summary(run.path / "summary.json", summary)
        parts.progress.summary(summary)
    parts.events.emit("run_ended", outcome=outcome, steps=state.step, digest=digests[world.global_rank].hex())
    parts.status.ended(outcome if len(set(digests)) == 1 else "failed")
    state.kasmina.terminate()
    if len(set(digests)) > 1:
        seen = ", ".join(f"rank {r}: {d.hex()[:12]}" for r, d in enumerate(digests))
        raise ReplicaMismatch(f"the ranks ended with different states ({seen})")
    return summary


def _rank_times(ledger: Ledger, world: World) -> list[dict[str, float]]:
    """What each rank's steps were spent on in this start, in seconds. Collective."""
    table = torch.zeros(world.world_size, len(STEP_CATEGORIES), dtype=torch.float64)
    table[world.global_rank] = torch.tensor([ledger.own(category) for category in STEP_CATEGORIES])
    rows = world.peers.sum(table).tolist()
    return [{name: round(s, 3) for name, s in zip(STEP_CATEGORIES, row, strict=True)} for row in rows]


def _summary(
    outcome: str, trainer: Trainer, world: World, run: RunDir, digests: list[bytes],
    rank_times: list[dict[str, float]],
) -> RunSummary:  # fmt: skip
    parts, state, record = trainer.parts, trainer.state, trainer.parts.record
    goodput = {category: round(seconds, 3) for category, seconds in parts.status.ledger.seconds().items()}
    counters = {**record.counters, "skipped_steps": state.skipped_steps, "events_lost": parts.events.lost}
    if parts.coordinator.shadow is not None:
        parts.coordinator.shadow.collect()
        counters |= {f"shadow_{name}": count for name, count in parts.coordinator.shadow.counts.items()}
    return RunSummary(
        outcome=outcome,
        name=parts.config.run.name,
        run_id=run.run_id,
        run_dir=str(run.path),
        seed=parts.config.run.seed,
        epochs=state.sampler.epoch,
        steps=state.step,
        # The clock of earlier starts is unknown where no status was kept (log.status_s=0).
        seconds=max(record.seconds, sum(goodput.values())),
        world_size=world.world_size,
        device=str(world.device),
        final=record.final,
        best=record.best,
        before_growth=record.before_growth,
        parameters_start=record.parameters_start,
        parameters_end=state.parameter_count,
        seeds=record.lives.records(),
        commands=list(parts.coordinator.ledger.records.values()),
        incidents=parts.comeback.incidents,
        boundaries=state.boundary,
        latency_ms=latency_split(record.latencies),
        mode=state.mode.name,
        checkpoint=str(record.checkpoint) if record.checkpoint else "",
        resume=_resume_command(world, short_path(str(run.path))),
        state_digest={rank: digest.hex() for rank, digest in enumerate(digests)},
        counters=counters,
        goodput=goodput,
        rank_times=rank_times,
        versions=versions(),
    )


def _resume_command(world: World, run_dir: str) -> str:
    start = "python -m tolaria.launch"
    if world.world_size > 1:
        local_ranks = os.environ.get("LOCAL_WORLD_SIZE", world.world_size)
        start = f"torchrun --nproc_per_node={local_ranks} -m tolaria.launch"
    return f"{start} --config {run_dir}/config.toml --resume {run_dir}"
