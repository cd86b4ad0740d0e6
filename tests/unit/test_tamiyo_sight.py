"""A policy's sight of a state: what is there by name and type, and nothing raised for what was left out."""

import math

import pytest

from tests.packets import operations, slot, state
from tolaria.kasmina import lifecycle
from tolaria.leyline.limits import MAX_MEASUREMENT
from tolaria.leyline.types import SeedStage
from tolaria.tamiyo.sight import GROWING, Candidate, Sight

FREE = slot(
    "late", SeedStage.DORMANT, signal__low_rank=0.5, cost__low_rank=176, flops__low_rank=16384,
    signal__odd=0.25, cost__odd=9, cost__unmeasured=16, boundaries_in_stage=4,
)  # fmt: skip
GROWN = slot(
    "early", SeedStage.PROBATIONARY, norm=0.75, age=7, gate_ok=1, alpha=1, boundaries_in_stage=2, parameters=1250,
    flops=36864, contribution=0.1, contribution_noise=0.02, fine_tuning=1,
)  # fmt: skip


def test_everything_that_a_packet_tells_has_a_name() -> None:
    sees = Sight(
        state(
            13, loss=0.5, seeds=(GROWN, FREE), history=[0.6, 0.8], conservative=1, boundaries_left=5,
            learning_rate=0.01, parameters=2000, flops_per_sample=4096, skipped_steps=2, validation_noise=0.03,
            budget_parameters=500, budget_mb=1.5, slot_rank__early=3, slot_rank__late=2, metric__f1=0.7,
        )
    )  # fmt: skip
    assert (sees.boundary, sees.boundaries_left, sees.conservative) == (13, 5, True)
    assert sees.losses == (0.5, 0.6, 0.8)
    assert (sees.learning_rate, sees.parameters, sees.flops_per_sample) == (0.01, 2000, 4096)
    assert (sees.skipped_steps, sees.validation_noise, sees.task_metrics) == (2, 0.03, {"f1": 0.7})
    assert (sees.budget_parameters, sees.budget_mb) == (500, 1.5)
    assert ([s.name for s in sees.free], [s.name for s in sees.growing]) == (["late"], ["early"])
    early, late = sees.slots
    assert sees.slot("early") is early
    assert (early.stage, early.ready, early.alpha, early.waited, early.age) == (SeedStage.PROBATIONARY, True, 1.0, 2, 7)
    assert (early.contribution, early.contribution_noise, early.fine_tuning) == (0.1, 0.02, True)
    assert (early.parameters, early.flops, early.gradient_norm, early.rank) == (1250, 36864, 0.75, 3)
    assert early.candidates == ()
    assert (late.rank, late.ready, late.waited) == (2, False, 4)
    assert set(late.candidates) == {
        Candidate("low_rank", 0.5, 176, 16384),
        Candidate("odd", 0.25, 9, None),
        Candidate("unmeasured", None, 16, None),
    }  # fmt: skip


def test_what_was_not_sent_is_none_or_empty() -> None:
    sees = Sight(state(3, seeds=(slot("a", SeedStage.TRAINING), slot("b", SeedStage.DORMANT))))
    assert (sees.boundary, sees.losses, sees.conservative) == (3, (1.0,), False)
    nothing = (sees.boundaries_left, sees.learning_rate, sees.parameters, sees.flops_per_sample, sees.validation_noise)
    assert nothing == (None,) * 5
    assert (sees.budget_parameters, sees.budget_mb) == (math.inf, math.inf)
    assert (sees.task_metrics, sees.skipped_steps, sees.slot("c")) == ({}, 0, None)
    training, free = sees.slots
    assert (training.ready, training.contribution, training.flops, training.rank) == (False, None, None, None)
    assert free.candidates == ()
    assert Sight(state(1)).slots == Sight(state(1)).free == ()


def test_a_gap_in_the_history_ends_it() -> None:
    assert Sight(state(1, loss=0.1, loss_history__1=0.2, loss_history__3=0.4)).losses == (0.1, 0.2)


@pytest.mark.parametrize(("loss", "healthy"), [(1.0, True), (MAX_MEASUREMENT, False), (-MAX_MEASUREMENT, False)])
def test_a_loss_that_was_no_number_shows(loss: float, healthy: bool) -> None:
    assert Sight(state(1, loss=loss)).healthy is healthy


def test_growing_are_the_stages_that_a_command_can_move_on_and_advance_is_that_command() -> None:
    seeds = tuple(slot(stage.name, stage) for stage in SeedStage)
    sees = Sight(state(1, seeds=seeds))
    forward = {s.stage: s.advance(reason="on") for s in sees.growing}
    assert forward.keys() == GROWING
    assert operations([*forward.values()]) == [(op, stage.name) for stage, op in lifecycle.FORWARD.items()]
    assert {command.reason for command in forward.values()} == {"on"}
    with pytest.raises(ValueError, match="slot 'DORMANT' is DORMANT"):
        sees.free[0].advance()
