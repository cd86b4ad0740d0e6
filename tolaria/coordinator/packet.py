"""The packet that tells the policy how the run is at a boundary: from report and state, values within bounds."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from tolaria.leyline.limits import clip_measurement
from tolaria.leyline.types import HardwareContext, SeedState, SystemState
from tolaria.measure import Report
from tolaria.state import HOST_GROUP, TrainState


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a packet tells beside the state: names, what rank 0 runs on now, boundaries until the planned end."""

    run_id: str
    experiment: str
    hardware: Callable[[], HardwareContext]
    boundaries_left: Callable[[], int]


def build_packet(
    report: Report, state: TrainState, facts: RunFacts, losses: Iterable[float], wall_ns: int
) -> SystemState:
    """The state packet of a boundary. Local. ``losses``: of earlier validations, the newest first."""
    metrics = {
        "learning_rate": state.lr.lr_at(HOST_GROUP, state.step),
        "conservative": float(state.mode.conservative),
        "parameters": float(state.parameter_count),
        "skipped_steps": float(state.skipped_steps),
        "boundaries_left": float(facts.boundaries_left()),
        "validation_noise": report.val_noise,
        **state.kasmina.budget.left(state.kasmina.grown_parameters),
        "flops_per_sample": math.nan if report.flops is None else float(report.flops),
        # A policy that was started again has only what the packet tells.
        **{f"loss_history/{back}": loss for back, loss in enumerate(losses, 1)},
        **{f"slot_rank/{name}": float(len(seed.shape)) for name, seed in state.kasmina.seeds.items()},
        **{f"metric/{name}": value for name, value in report.metrics.items()},
    }
    return SystemState(
        packet_id=f"{facts.run_id}:{state.boundary}",
        current_epoch=state.sampler.epoch,
        global_step=state.step,
        validation_accuracy=clip_measurement(report.val_accuracy),
        validation_loss=clip_measurement(report.val_loss),
        training_loss=clip_measurement(report.train_loss),
        timestamp_ns=wall_ns,
        training_run_id=facts.run_id,
        experiment_name=facts.experiment,
        hardware=facts.hardware(),
        seeds=tuple(
            _sendable(seed, {**report.signals.get(seed.seed_id, {}), **report.owners.get(seed.seed_id, {})})
            for seed in state.kasmina.seed_states(lambda group: state.lr.lr_at(group, state.step))
        ),
        training_metrics={n: clip_measurement(value) for n, value in metrics.items() if math.isfinite(value)},
    )


def _sendable(seed: SeedState, further: Mapping[str, float]) -> SeedState:
    metrics = {name: clip_measurement(value) for name, value in {**seed.metrics, **further}.items()}
    return replace(seed, gradient_norm=clip_measurement(seed.gradient_norm), metrics=metrics)
