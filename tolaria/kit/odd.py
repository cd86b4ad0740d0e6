"""States that a trainer may send and that are seldom seen: extremes, gaps, and everything at once. All are valid."""

from collections.abc import Mapping
from dataclasses import replace

from tolaria.leyline.limits import (
    MAX_FIELD_REPORTS,
    MAX_MEASUREMENT,
    MAX_SEEDS,
    MAX_TRAINING_METRICS,
    MAX_UINT32,
    MAX_UINT64,
)
from tolaria.leyline.types import (
    FieldOutcome,
    FieldReport,
    HardwareContext,
    PolicyRequest,
    SeedStage,
    SeedState,
    SystemState,
)

_STRANGE = "Z9_.:/@+-"
"""Every kind of character that a name may have."""


def odd_questions() -> dict[str, PolicyRequest]:
    """Name -> question, always the same ones."""
    usual = _usual()
    bare = tuple(replace(seed, metrics={}) for seed in usual.seeds)
    named: dict[str, SystemState] = {
        "no slots": replace(usual, seeds=()),
        "no metrics at all": replace(usual, training_metrics={}, seeds=bare),
        "no metrics and no slots": replace(usual, training_metrics={}, seeds=()),
        "64 slots in all stages": replace(usual, seeds=_slots(64)),
        f"{MAX_SEEDS} slots": replace(usual, seeds=_slots(MAX_SEEDS)),
        "64 free slots without candidates": replace(usual, seeds=_slots(64, SeedStage.DORMANT, {})),
        "every gate shut": replace(usual, seeds=_slots(11, metrics={"gate_ok": 0.0, "boundaries_in_stage": 99.0})),
        "losses that are no numbers": _with_losses(usual, MAX_MEASUREMENT),
        "losses far below zero": _with_losses(usual, -MAX_MEASUREMENT),
        "losses of zero": _with_losses(usual, 0.0),
        "every number the largest": _all_numbers(usual, MAX_MEASUREMENT),
        "every number the most negative": _all_numbers(usual, -MAX_MEASUREMENT),
        "every number zero": _all_numbers(usual, 0.0),
        "the very first boundary": replace(usual, current_epoch=0, global_step=0, training_metrics={}),
        "counters at their ends": replace(usual, current_epoch=MAX_UINT32, global_step=MAX_UINT64),
        "gaps in the history of losses": replace(
            usual, training_metrics={"loss_history/1": 0.5, "loss_history/3": 0.4, "loss_history/16": 0.1}
        ),
        "metrics of no known name": replace(
            usual, training_metrics={f"{_STRANGE}{i}": float(i) for i in range(MAX_TRAINING_METRICS)}
        ),
        "slots with strange names": replace(usual, seeds=tuple(replace(s, seed_id=f"{_STRANGE}{s.seed_id}")
                                                                for s in usual.seeds)),
        "conservative mode with everything growing": replace(
            usual, training_metrics={**usual.training_metrics, "conservative": 1.0}, seeds=_slots(11)
        ),
        "two slots of one name": replace(usual, seeds=(usual.seeds[0], usual.seeds[0])),
    }  # fmt: skip
    questions = {name: PolicyRequest(state=state) for name, state in named.items()}
    questions["as many field reports as fit"] = PolicyRequest(state=usual, field_reports=_reports())
    return questions


def _usual() -> SystemState:
    metrics = {
        "learning_rate": 0.01, "conservative": 0.0, "boundaries_left": 20.0, "budget_parameters": 1e6,
        "flops_per_sample": 1e5, "validation_noise": 0.01, **{f"loss_history/{back}": 0.5 for back in range(1, 17)},
    }  # fmt: skip
    return SystemState(
        packet_id="odd:20", current_epoch=20, global_step=400, validation_accuracy=0.8, validation_loss=0.5,
        training_loss=0.4, timestamp_ns=1, training_run_id="odd", experiment_name="policy test",
        hardware=HardwareContext(device_type="cpu"), seeds=_slots(3), training_metrics=metrics,
    )  # fmt: skip


def _slots(
    number: int, stage: SeedStage | None = None, metrics: Mapping[str, float] | None = None
) -> tuple[SeedState, ...]:
    """Slots in this stage, or in all stages in turn."""
    stages = list(SeedStage)
    sent = {"boundaries_in_stage": 3.0, "gate_ok": 1.0, "alpha": 1.0, "parameters": 100.0, "signal/low_rank": 0.3,
            "cost/low_rank": 100.0} if metrics is None else metrics  # fmt: skip
    return tuple(
        SeedState(seed_id=f"slot{i}", stage=stage or stages[i % len(stages)], layer_depth=i, metrics=sent, age_epochs=i)
        for i in range(number)
    )


def _with_losses(state: SystemState, loss: float) -> SystemState:
    history = {name: loss for name in state.training_metrics if name.startswith("loss_history/")}
    return replace(
        state, validation_loss=loss, training_loss=loss, training_metrics={**state.training_metrics, **history}
    )


def _all_numbers(state: SystemState, value: float) -> SystemState:
    seeds = tuple(
        replace(
            seed, gradient_norm=value, learning_rate=value, risk_score=value,
            metrics=dict.fromkeys(seed.metrics, value),
        )
        for seed in state.seeds
    )  # fmt: skip
    return replace(
        _with_losses(state, value), validation_accuracy=value, seeds=seeds,
        training_metrics=dict.fromkeys(state.training_metrics, value),
    )  # fmt: skip


def _reports() -> tuple[FieldReport, ...]:
    outcomes = list(FieldOutcome)
    return tuple(
        FieldReport(
            report_id=f"r{i % 200}", command_id=f"unheard-of-{i}", training_run_id="odd",
            outcome=outcomes[i % len(outcomes)], notes="x" * 128,
        )
        for i in range(MAX_FIELD_REPORTS)
    )  # fmt: skip
