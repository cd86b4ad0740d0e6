"""What takes an operator's command back, and what nothing but the weights can."""

from dataclasses import dataclass
from typing import Any

import pytest

from tolaria.coordinator.ledger import describe
from tolaria.errors import CommandRefused
from tolaria.leyline.codec import encode_command
from tolaria.leyline.types import (
    BreakerCommand,
    CircuitState,
    Command,
    OptimizerCommand,
    SeedCommand,
    SeedOp,
    SeedStage,
)
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity
from tolaria.undo import Done, inverse


@dataclass
class Grown:
    stage: SeedStage
    command_id: str = "mine"


def done(command: Command, *, conservative: bool = False) -> Done:
    named = with_identity(command, "mine", issued_by="me", issued_at_ns=1)
    made = Done.of(3, 20, named, describe(named), conservative=conservative)
    assert Done.from_json(made.to_json()) == made
    return made


def taken_back(act: Done, *, newest: str | None = "mine", grown: Grown | None = None) -> Any:
    command = inverse(act, newest=lambda pattern: newest, seed=lambda slot: grown or Grown(SeedStage.DORMANT, ""))
    encode_command(with_identity(command, "undo", issued_by="me", issued_at_ns=1))  # it can be sent
    return command


def test_an_optimizer_command_is_undone_by_the_tuner() -> None:
    command = taken_back(done(do.scale_lr("host*", 0.5)))
    assert isinstance(command.payload, OptimizerCommand)
    assert (command.payload.optimizer_id, dict(command.payload.hyperparameters)) == ("host*", {"undo": 1.0})


@pytest.mark.parametrize(("newest", "says"), [("b7", "command b7 has"), (None, "another class of optimizer")])
def test_what_somebody_else_has_changed_since_is_not_undone(newest: str | None, says: str) -> None:
    with pytest.raises(CommandRefused, match=says) as error:
        taken_back(done(do.scale_lr("*", 0.5)), newest=newest)
    assert error.value.code == "changed_since" and "--weights" in str(error.value)


def test_the_longest_pattern_can_be_undone() -> None:
    taken_back(done(do.scale_lr("h" * 128, 0.5)))


@pytest.mark.parametrize("was", [False, True])
@pytest.mark.parametrize("now", [False, True])
def test_the_mode_is_what_it_was_before(was: bool, now: bool) -> None:
    command = taken_back(done(do.conservative(now), conservative=was))
    assert isinstance(command.payload, BreakerCommand)
    assert command.payload.desired_state == (CircuitState.OPEN if was else CircuitState.CLOSED)


@pytest.mark.parametrize(("stage", "operation"), [
    (SeedStage.GERMINATED, SeedOp.CANCEL), (SeedStage.TRAINING, SeedOp.CANCEL), (SeedStage.BLENDING, SeedOp.CULL),
    (SeedStage.SHADOWING, SeedOp.CULL), (SeedStage.PROBATIONARY, SeedOp.CULL),
])  # fmt: skip
def test_a_seed_just_grown_is_taken_out(stage: SeedStage, operation: SeedOp) -> None:
    command = taken_back(done(do.germinate("late", "low_rank")), grown=Grown(stage))
    assert isinstance(command.payload, SeedCommand)
    assert (command.target_seed_id, command.payload.operation) == ("late", operation)


@pytest.mark.parametrize("stage", [SeedStage.GERMINATED, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED])
def test_the_seed_that_somebody_else_has_grown_there_since_is_left_alone(stage: SeedStage) -> None:
    with pytest.raises(CommandRefused, match="is gone from late") as error:
        taken_back(done(do.germinate("late", "low_rank")), grown=Grown(stage, "the policy's"))
    assert error.value.code == "changed_since"


@pytest.mark.parametrize(("command", "grown"), [
    (do.germinate("late", "low_rank"), Grown(SeedStage.FOSSILIZED)),
    (do.cull("late"), None), (do.start_training("late"), Grown(SeedStage.TRAINING)), (do.rollback(), None),
    (do.change_optimizer("sgd", lr=0.1), None),
])  # fmt: skip
def test_what_training_has_used_since_needs_the_weights(command: Command, grown: Grown | None) -> None:
    with pytest.raises(CommandRefused, match="only --weights") as error:
        taken_back(done(command), grown=grown)
    assert error.value.code == "needs_weights"
