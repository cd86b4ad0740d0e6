"""The job for test_surgery.py: a run that is operated on again and again, and its copy, loaded in the middle."""

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.dist.jobs_growth import digests, joined
from tests.optimizers import failing_at
from tests.rig import CLASSES, FEATURES, WIDTH, Rig, make_task, same_bits, tiny_config
from tolaria.config import OptimConfig
from tolaria.coordinator import apply
from tolaria.kasmina.slot import Slot
from tolaria.leyline.types import Command, SeedStage
from tolaria.optim.persist import state_scalars, state_tensors
from tolaria.tamiyo import policy as do
from tolaria.task import Task

SLOTS = ("a", "b", "c", "d")
BLUEPRINTS = ("low_rank", "residual_mlp")
FAMILY = ("adamw", "adam", "nadam")
FORWARD = {
    SeedStage.GERMINATED: do.start_training,
    SeedStage.TRAINING: do.start_grafting,
    SeedStage.BLENDING: do.stabilize,
    SeedStage.SHADOWING: do.evaluate,
    SeedStage.PROBATIONARY: do.fossilize,
}


class FourSlots(nn.Module):
    """Layers with a slot after each."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(FEATURES, WIDTH)
        self.slots = nn.ModuleDict({name: Slot(name) for name in SLOTS})
        self.layers = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in SLOTS})
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, FEATURES) -> logits (batch, CLASSES)."""
        h = torch.tanh(self.inlet(x))
        for name in SLOTS:
            h = self.slots[name](torch.tanh(self.layers[name](h)))
        logits: Tensor = self.head(h)
        return logits


def four_slots() -> Task:
    """The tests' task with four slots."""
    return replace(make_task(), model=FourSlots(), slots={})


def many_operations(optimizer: str, operations: int, seed: int) -> dict[str, Any]:
    """Random operations with steps between; after half of them a second run takes over what is saved, and goes along.

    Told: how many operations of each kind; state that changed without being operated on, by operation; operations
    after which ranks, or the two runs, were not equal.
    """
    draw = random.Random(seed)
    config = replace(tiny_config(embargo_boundaries=1), optim=OptimConfig(name=optimizer, lr=0.01))
    told: dict[str, Any] = {"kinds": {}, "kept": 0, "touched": [], "unequal_ranks": [], "unequal_runs": []}
    with joined(config, make=four_slots) as rig, _another(rig) as copy:
        runs = [rig]
        rig.train(3)
        for number in range(operations):
            if number == operations // 2:
                _take_over(rig, copy)
                runs.append(copy)
            for each in runs:
                each.boundary()
            kind, slot, command = _choose(draw, rig)
            told["kinds"][kind] = told["kinds"].get(kind, 0) + 1
            for each in runs:
                before = _state(each)
                assert each.apply(command).outcomes[0].applied
                kept = {key: value for key, value in before.items() if not key.startswith(f"seed/{slot}/")}
                told["kept"] += len(kept)
                told["touched"] += [f"{number} {kind}: {key}" for key in _changed(kept, _state(each), kind)]
                each.train(4)
            seen = [digests(each) for each in runs]
            told["unequal_ranks"] += [f"{number} {kind}" for found in seen if len(set(found)) != 1]
            told["unequal_runs"] += [f"{number} {kind}"] if seen[0] != seen[-1] else []
        told["classes"] = [type(each.state.optimizer).__name__ for each in runs]
    return told


@contextmanager
def _another(rig: Rig) -> Iterator[Rig]:
    """A run of the same task on the same ranks, at its start."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Rig.build(Path(folder), world=rig.world, config=rig.config, make=four_slots) as other,
    ):
        yield other


def _take_over(rig: Rig, copy: Rig) -> None:
    tensors = {name: tensor.clone() for name, tensor in rig.state.tensors().items()}
    copy.state.load(tensors, json.loads(json.dumps(rig.state.meta(), allow_nan=False)))
    copy.replica.rebuild(first=True)
    copy.commands = rig.commands


def _choose(draw: random.Random, rig: Rig) -> tuple[str, str, Command]:
    """(kind, slot, command): one that is legal now, the same on every rank."""
    seeds = rig.state.kasmina.seeds
    ready = [s for s in SLOTS if seeds[s].stage in (*FORWARD, SeedStage.DORMANT)]
    name = rig.state.optim.name
    if name in FAMILY and (not ready or draw.random() < 0.15):
        other = draw.choice([each for each in FAMILY if each != name])
        return "class", "", do.change_optimizer(other, weight_decay=draw.choice((0.0, 0.01)))
    if not ready:
        return "rate", "", do.scale_lr("host", 1.0)
    slot = draw.choice(ready)
    stage = seeds[slot].stage
    if stage == SeedStage.DORMANT:
        return "germinate", slot, do.germinate(slot, draw.choice(BLUEPRINTS))
    # A fossil is for good: were they many, there would be nothing left to operate on.
    if stage == SeedStage.PROBATIONARY and draw.random() < 0.7 or draw.random() < 0.2:
        return "cull", slot, do.cull(slot)
    return "advance", slot, FORWARD[stage](slot)


def _state(rig: Rig) -> dict[str, Any]:
    tensors = {name: tensor.clone() for name, tensor in state_tensors(rig.state.optimizer).items()}
    return {**tensors, **state_scalars(rig.state.optimizer)}


def _changed(before: dict[str, Any], after: dict[str, Any], kind: str) -> list[str]:
    """What is not the same any more; a change of class may leave out what the new class has no use for."""
    unused = "/mu_product" if kind == "class" else "/"
    return [
        key for key, value in before.items()
        if not (_same(value, after[key]) if key in after else key.endswith(unused))
    ]  # fmt: skip


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    return type(one) is type(other) and bool(one == other)


def fault_on_one_rank(ats: list[int]) -> list[dict[str, Any]]:
    """A change of class, a cull and a growth in one decision; on the last rank an operation on a tensor fails."""
    told = []
    with joined(replace(tiny_config(), optim=OptimConfig(lr=0.01)), make=four_slots) as rig:
        rig.grow("a", SeedStage.BLENDING)
        rig.boundary()
        failing = rig.world.global_rank == rig.world.world_size - 1
        change = apply._change
        for at in ats:
            before = digests(rig)

            def broken(*arguments: Any, at: int = at, **keywords: Any) -> None:
                with failing_at(at):
                    change(*arguments, **keywords)

            with patch.object(apply, "_change", broken if failing else change):
                outcomes = rig.apply(*_decision()).outcomes
            codes = sorted({outcome.code for outcome in outcomes})
            told.append({"codes": codes, "same": digests(rig) == before, "ranks": len(set(before))})
        outcomes = rig.apply(*_decision()).outcomes
        rig.train(3)
        codes = sorted({outcome.code for outcome in outcomes})
        told.append({"codes": codes, "same": rig.state.optim.name == "nadam", "ranks": len(set(digests(rig)))})
    return told


def _decision() -> tuple[Command, ...]:
    return do.cull("a"), do.germinate("b", "low_rank"), do.change_optimizer("nadam", lr=0.1)
