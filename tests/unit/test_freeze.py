"""A frozen group is not updated at all: parameters and optimizer state keep every bit, and the others go on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rig import Rig, same_bits, tiny_config
from tolaria.config import OptimConfig, PrecisionConfig
from tolaria.leyline.types import Command, SeedStage
from tolaria.objective import Batch
from tolaria.tamiyo import policy as do

SLOT = "early"


def build(folder: Path, *, amp: Any = "off", optimizer: str = "adamw", **kasmina: Any) -> Rig:
    config = replace(tiny_config(blend_steps=50, **kasmina), optim=OptimConfig(name=optimizer, lr=0.02))
    return Rig.build(folder, config=replace(config, precision=PrecisionConfig(amp=amp)))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A seed that is blended in, which takes long."""
    with build(tmp_path) as built:
        built.grow(SLOT, SeedStage.BLENDING)
        yield built


def command(rig: Rig, *commands: Command) -> None:
    outcomes = rig.boundary(*commands).outcomes
    assert all(outcome.applied for outcome in outcomes), outcomes


def copies(rig: Rig) -> dict[str, Tensor]:
    """Every parameter and every tensor of the optimizer's state, as it is now."""
    return {name: tensor.clone() for name, tensor in rig.state.tensors().items()}


def changed(rig: Rig, before: dict[str, Tensor]) -> set[str]:
    """What has another bit than before: host, seed, or the optimizer's state of either."""
    found = set()
    for name, tensor in rig.state.tensors().items():
        if not same_bits(tensor, before[name]):
            part = "optim/" if name.startswith("optim/") else ""
            found.add(part + ("seed" if "seed/" in name else "host"))
    return found


EVERYTHING = {"host", "seed", "optim/host", "optim/seed"}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
def test_freezing_keeps_every_bit_of_the_group_and_thawing_goes_on(optimizer: str, tmp_path: Path) -> None:
    with build(tmp_path, optimizer=optimizer) as rig:
        rig.grow(SLOT, SeedStage.BLENDING)
        before = copies(rig)
        rig.train(2)
        assert changed(rig, before) == EVERYTHING
        for group, rest in (("seed/*", {"host", "optim/host"}), ("host", {"seed", "optim/seed"})):
            command(rig, do.freeze(group))
            before = copies(rig)
            rig.train(3)
            assert changed(rig, before) == rest
            command(rig, do.thaw(group))
            before = copies(rig)
            rig.train(1)
            assert changed(rig, before) == EVERYTHING


def test_a_thawed_group_goes_on_as_one_whose_steps_were_never_counted(tmp_path: Path) -> None:
    """The first update after a thaw is the one that would have come when it was frozen, on the same batch."""
    ends = []
    for frozen_steps in (0, 3):
        folder = tmp_path / str(frozen_steps)
        folder.mkdir()
        with build(folder) as rig:
            rig.train(2)
            batches = rig.batches()
            if frozen_steps:
                command(rig, do.freeze("host"))
                rig.train(frozen_steps)
                command(rig, do.thaw("host"))
            rig.take_step(batches)
            ends.append(copies(rig))
    assert ends[0].keys() == ends[1].keys()
    assert all(same_bits(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_with_everything_frozen_the_run_goes_on_and_nothing_changes(amp: str, tmp_path: Path) -> None:
    with build(tmp_path, amp=amp) as rig:
        rig.grow(SLOT, SeedStage.BLENDING)
        command(rig, do.freeze("*"))
        before, step, scale = copies(rig), rig.state.step, rig.state.scaler.get_scale()
        rig.train(4)
        assert changed(rig, before) == set()
        assert (rig.state.step, rig.state.skipped_steps, rig.state.scaler.get_scale()) == (step + 4, 0, scale)
        command(rig, do.thaw("*"))
        rig.train(2)
        assert changed(rig, before) == EVERYTHING


def test_with_gradient_scaling_the_seeds_learn_while_the_host_is_frozen(tmp_path: Path) -> None:
    with build(tmp_path, amp="fp16") as rig:
        rig.grow(SLOT, SeedStage.BLENDING)
        assert rig.state.scaler.is_enabled()
        command(rig, do.freeze("host"))
        before = copies(rig)
        rig.train(3)
        assert changed(rig, before) == {"seed", "optim/seed"}
        (batch,) = rig.batches()
        scale, before = rig.state.scaler.get_scale(), copies(rig)
        rig.take_step([poisoned(batch)])
        assert changed(rig, before) == set()
        assert rig.state.scaler.get_scale() < scale  # the seeds' gradients are what the scale has to fit


def poisoned(batch: Batch) -> Batch:
    """The batch with one number that is none."""
    inputs = batch.inputs.clone()
    inputs[0, 0] = float("nan")
    return Batch(inputs, batch.targets, batch.weights)


def test_a_step_without_any_sound_gradient_is_skipped_also_beside_a_frozen_host(rig: Rig) -> None:
    command(rig, do.freeze("host"))
    before = copies(rig)
    (batch,) = rig.batches()
    assert not rig.take_step([poisoned(batch)]).taken  # the seed's is none either
    assert changed(rig, before) == set()
    assert rig.take_step([batch]).taken
    assert changed(rig, before) == {"seed", "optim/seed"}


def test_a_gradient_that_is_none_of_a_frozen_host_alone_skips_no_step(rig: Rig) -> None:
    command(rig, do.freeze("host"))
    before = copies(rig)
    weight = rig.state.host_parameters["inlet.weight"]
    hook = weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    assert rig.take_step(rig.batches()).taken
    hook.remove()
    assert changed(rig, before) == {"seed", "optim/seed"}


@pytest.mark.parametrize("frozen", ["host", "*"])
def test_a_skipped_step_leaves_running_statistics_also_those_of_what_is_frozen(frozen: str, tmp_path: Path) -> None:
    with Rig.build(tmp_path, batch_norm=True) as rig:
        rig.grow(SLOT, SeedStage.BLENDING)
        command(rig, do.freeze(frozen))
        (batch,) = rig.batches()
        rig.replica.warm_up(rig.sample)
        before = {name: buffer.clone() for name, buffer in rig.state.host_buffers.items()}
        assert not rig.take_step([poisoned(batch)]).taken
        assert all(same_bits(rig.state.host_buffers[name], buffer) for name, buffer in before.items())
        rig.take_step([batch])
        assert not same_bits(rig.state.host_buffers["norm.running_mean"], before["norm.running_mean"])


def test_a_seed_can_be_grown_beside_a_frozen_host(tmp_path: Path) -> None:
    with build(tmp_path) as rig:
        command(rig, do.freeze("host"))
        host = copies(rig)
        rig.grow(SLOT, SeedStage.BLENDING)
        before = copies(rig)
        rig.train(2)
        assert changed(rig, before) == {"seed", "optim/seed"}
        assert all(same_bits(rig.state.tensors()[name], tensor) for name, tensor in host.items())


def test_a_group_whose_policy_is_frozen_is_as_frozen_as_by_command(tmp_path: Path) -> None:
    config = tiny_config(blend_steps=50)
    lr = replace(config.lr, group_policies={"seed/early": "frozen"})
    with Rig.build(tmp_path, config=replace(config, lr=lr)) as rig:
        rig.grow(SLOT, SeedStage.BLENDING)
        before = copies(rig)
        rig.train(2)
        assert changed(rig, before) == {"host", "optim/host"}


def test_freeze_is_part_of_what_is_saved_loaded_and_taken_back(rig: Rig) -> None:
    command(rig, do.freeze("seed/*"), do.set_optimizer("host", clip_norm=0.5))
    meta, tensors = rig.state.meta(), copies(rig)
    memento = rig.state.memento()
    command(rig, do.thaw("*"), do.set_optimizer("host", clip_norm=0.7))
    rig.state.restore(memento)
    assert rig.state.lr.frozen == {"seed/early"}
    assert rig.state.optimizer.param_groups[0]["clip_norm"] == 0.5
    command(rig, do.undo())  # of the memento's time: the set is the newest
    assert rig.state.optimizer.param_groups[0]["clip_norm"] == 1.0
    rig.state.load(tensors, meta)
    assert rig.state.lr.frozen == {"seed/early"}
    assert rig.state.meta() == meta
    before = copies(rig)
    rig.train(2)
    assert changed(rig, before) == {"host", "optim/host"}


def test_each_group_is_clipped_at_its_own_bound_and_a_new_one_at_the_configured(rig: Rig) -> None:
    command(rig, do.set_optimizer("host", clip_norm=0.2))
    rig.grow("late", SeedStage.GERMINATED)
    bounds = {group["name"]: group["clip_norm"] for group in rig.state.optimizer.param_groups}
    assert bounds == {"host": 0.2, "seed/early": 1.0, "seed/late": 1.0}
    norms = []

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        host = optimizer.param_groups[0]["params"]
        norms.append(float(sum(p.grad.square().sum() for p in host) ** 0.5))

    rig.state.optimizer.register_step_pre_hook(note)
    command(rig, do.set_optimizer("host", clip_norm=0.02))
    rig.train(3)
    assert norms == pytest.approx([0.02] * 3, rel=1e-3)
