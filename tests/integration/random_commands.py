"""A policy that sends whatever comes to its mind, legal and illegal, and one that repeats what was accepted of it."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tolaria.leyline.codec import decode_command
from tolaria.leyline.types import Command, CommandType, FieldReport, SeedOp, SeedStage, SystemState
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import Policy, boundary_of

PER_BOUNDARY = 7
BLUEPRINTS = ("conv_residual", "low_rank", "identity", "residual_mlp", "no_such_blueprint")
CLASSES = ("sgd", "adamw", "nadam", "rmsprop", "no_such_class")
NEXT = {
    SeedStage.DORMANT: SeedOp.GERMINATE,
    SeedStage.GERMINATED: SeedOp.START_TRAINING,
    SeedStage.TRAINING: SeedOp.START_GRAFTING,
    SeedStage.BLENDING: SeedOp.STABILIZE,
    SeedStage.SHADOWING: SeedOp.EVALUATE,
    SeedStage.PROBATIONARY: SeedOp.FOSSILIZE,
}


class RandomCommands(Policy):
    """The same commands for the same boundary and state, whoever asks."""

    version = "random-1"

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        boundary = boundary_of(state)
        chance = random.Random(boundary)
        commands = [chance.choice(KINDS)(chance, state) for _ in range(PER_BOUNDARY)]
        named = [replace(command, command_id=f"b{boundary}-{at}") for at, command in enumerate(commands)]
        if boundary % 10 == 5:
            named[1] = replace(named[1], command_id=named[0].command_id)
        return named


def forward(chance: random.Random, state: SystemState) -> Command:
    """The usual next operation of a slot."""
    seed = chance.choice(state.seeds)
    operation = NEXT.get(seed.stage, SeedOp.GERMINATE)
    blueprint = chance.choice(BLUEPRINTS[:2]) if operation == SeedOp.GERMINATE else ""
    return do.seed_command(operation, seed.seed_id, blueprint=blueprint)


def any_operation(chance: random.Random, state: SystemState) -> Command:
    """Any operation on any slot, or on one that there is not."""
    operation = chance.choice(list(SeedOp))
    slot = chance.choice([*(seed.seed_id for seed in state.seeds), "nowhere"])
    parameters = chance.choice([{}, {}, {"blend_steps": 3.0}, {"blend_steps": 0.5}, {"colour": 1.0}])
    return do.seed_command(operation, slot, blueprint=chance.choice(BLUEPRINTS), parameters=parameters)


def optimizer(chance: random.Random, state: SystemState) -> Command:
    """Some hyperparameters of some groups, within the bounds or not."""
    group = chance.choice(["host", "*", "seed/*", "seed/early", "ghost"])
    values = {
        "lr": chance.choice([0.001, 0.01, 0.02, 5.0, -1.0]),
        "lr_scale": chance.choice([0.5, 0.9, 1.5, 100.0, 0.0]),
        "freeze": chance.choice([0.0, 0.0, 1.0, 2.0]),
        "weight_decay": chance.choice([0.0, 0.01, 0.02, 0.9]),
        "beta1": chance.choice([0.85, 0.9, 0.95, 1.5]),
        "beta2": chance.choice([0.99, 0.999, 0.1]),
        "momentum": chance.choice([0.85, 0.95, 2.0]),
        "clip_norm": chance.choice([0.5, 1.0, 2.0, 1e6]),
        "undo": 1.0,
    }
    names = chance.sample(list(values), chance.choice([1, 1, 1, 2]))
    return do.set_optimizer(group, **{name: values[name] for name in names})


def optimizer_class(chance: random.Random, state: SystemState) -> Command:
    """Another optimizer."""
    return do.change_optimizer(chance.choice(CLASSES), lr=chance.choice([0.01, 0.02, None]), weight_decay=0.01)


def mode(chance: random.Random, state: SystemState) -> Command:
    """Conservative for a while; out of it more often than into it."""
    return do.conservative(chance.random() < 0.3)


def impossible(chance: random.Random, state: SystemState) -> Command:
    """What is refused at any time."""
    pruning = Command(command_id="", command_type=CommandType.STRUCTURAL_PRUNING)
    return chance.choice([do.pause(), pruning, do.rollback(step=999_999), do.rollback(step=1)])


KINDS: list[Callable[[random.Random, SystemState], Command]] = [
    *[forward] * 6, *[any_operation] * 3, *[optimizer] * 5, optimizer_class, mode, impossible,
]  # fmt: skip


class Repeat(Policy):
    """What a file says was accepted at each boundary: {"boundary": ["serialized command in hex", ...]}."""

    version = "repeat-1"

    def __init__(self, *, file: str) -> None:
        self.accepted = json.loads(Path(file).read_text())

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        return [decode_command(bytes.fromhex(raw)) for raw in self.accepted.get(str(boundary_of(state)), [])]
