"""The first and the last thing a person sees of a run, and the summary that stays."""

import os
from dataclasses import replace

from tolaria.config import Config
from tolaria.dist import World
from tolaria.errors import ReplicaMismatch
from tolaria.hardware import device_text
from tolaria.loop import Trainer
from tolaria.profiling import join_pages
from tolaria.rundir import RunDir
from tolaria.state import TrainState
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
    summary = _summary(outcome, trainer, world, run, digests)
    if world.is_coordinator:
        # The ranks' digests are here, so their pages are written.
        pages = join_pages(run.path)
        summary = replace(summary, profile=str(pages) if pages is not None else "")
        write_summary(run.path / "summary.json", summary)
        parts.progress.summary(summary)
    parts.events.emit("run_ended", outcome=outcome, steps=state.step, digest=digests[world.global_rank].hex())
    state.kasmina.terminate()
    if len(set(digests)) > 1:
        seen = ", ".join(f"rank {r}: {d.hex()[:12]}" for r, d in enumerate(digests))
        raise ReplicaMismatch(f"the ranks ended with different states ({seen})")
    return summary


def _summary(outcome: str, trainer: Trainer, world: World, run: RunDir, digests: list[bytes]) -> RunSummary:
    parts, state, record = trainer.parts, trainer.state, trainer.parts.record
    counters = {**record.counters, "skipped_steps": state.skipped_steps, "events_lost": parts.events.lost}
    return RunSummary(
        outcome=outcome,
        name=parts.config.run.name,
        run_id=run.run_id,
        run_dir=str(run.path),
        seed=parts.config.run.seed,
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
        versions=versions(),
    )


def _resume_command(world: World, run_dir: str) -> str:
    start = "python -m tolaria.launch"
    if world.world_size > 1:
        local_ranks = os.environ.get("LOCAL_WORLD_SIZE", world.world_size)
        start = f"torchrun --nproc_per_node={local_ranks} -m tolaria.launch"
    return f"{start} --config {run_dir}/config.toml --resume {run_dir}"
