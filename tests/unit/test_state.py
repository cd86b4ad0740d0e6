"""The state of a run: its digest sees every part, what is loaded is what was saved, and another model's is refused."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.optimizers import OWN
from tests.rig import Rig, same_bits, tiny_config
from tolaria.config import OptimConfig
from tolaria.errors import CheckpointMismatch, ConfigError, TaskError
from tolaria.leyline.types import SeedStage
from tolaria.mode import Mode
from tolaria.optim.persist import state_tensors
from tolaria.state import TrainState
from tolaria.streams import load_rng_tensors, rng_tensors, seed_rank
from tolaria.tamiyo import policy as do

CPU = torch.device("cpu")
Change: TypeAlias = Callable[[TrainState], object]


Saved: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]


def grown(folder: Path) -> Rig:
    """A run with a fossil in one slot and a blending seed in the other."""
    rig = Rig.build(folder, batch_norm=True)
    rig.grow("early", SeedStage.FOSSILIZED)
    rig.grow("late", SeedStage.TRAINING)
    rig.boundary(do.start_grafting("late"))
    rig.train(2)
    return rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A grown run of the test's own."""
    with grown(tmp_path) as built:
        yield built


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """What a grown run saves."""
    with grown(tmp_path_factory.mktemp("grown")) as built:
        return saved(built.state)


def saved(state: TrainState) -> Saved:
    """Copies of the tensors, and the rest as a checkpoint's JSON gives it back."""
    tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
    return tensors, json.loads(json.dumps(state.meta(), allow_nan=False))


def flip(tensor: Tensor) -> None:
    """Change the last bit of a tensor's last element."""
    view = tensor.detach().reshape(-1).view(torch.uint8)
    assert view.data_ptr() == tensor.data_ptr()
    view[-1] ^= 1


def test_the_digest_sees_a_bit_of_every_tensor(rig: Rig) -> None:
    before = rig.state.digest()
    tensors = rig.state.tensors()
    parts = ("model/", "seed/early/", "seed/late/", "optim/inlet", "optim/seed/early/", "optim/seed/late/")
    for part in (*parts, "model/norm.running_mean", "model/norm.num_batches_tracked"):
        assert any(name.startswith(part) for name in tensors)
    for name, tensor in tensors.items():
        flip(tensor)
        assert rig.state.digest() != before, name
        flip(tensor)
        assert rig.state.digest() == before, name


def scale(state: TrainState) -> None:
    state.lr.set_scale("host", 0.5, state.step)


def decay(state: TrainState) -> None:
    state.optimizer.param_groups[0]["weight_decay"] = 0.123


def measure(state: TrainState) -> None:
    state.kasmina.seeds["late"].evidence.loss_now = 0.125


CHANGES: dict[str, Change] = {
    "step": lambda s: setattr(s, "step", s.step + 1),
    "boundary": lambda s: setattr(s, "boundary", s.boundary + 1),
    "skipped steps": lambda s: setattr(s, "skipped_steps", 1),
    "epoch": lambda s: setattr(s.sampler, "epoch", s.sampler.epoch + 1),
    "cursor": lambda s: setattr(s.sampler, "cursor", s.sampler.cursor + 1),
    "mode": lambda s: setattr(s, "mode", replace(s.mode, conservative=True)),
    "reason of the mode": lambda s: setattr(s, "mode", replace(s.mode, reason="because")),
    "learning rate": scale,
    "option of a group": decay,
    "freeze of a group": lambda s: s.lr.set_frozen("host", True, s.step),
    "count of foreign rates": lambda s: s.lr.count_violation(),
    "what can be undone": lambda s: s.tuner.load_state_dict({"done": [["c", [["host", "freeze", 0.0, 1.0]]]]}),
    "option that the optimizer's class does not know": lambda s: s.optimizer.param_groups[0].update(clip_norm=0.5),
    "base rate": lambda s: s.lr.set_base_rate(0.5),
    "class of the optimizer": lambda s: s.change_optimizer("adam", {}),
    "setting for groups to come": lambda s: setattr(s, "optim", replace(s.optim, beta1=0.5)),
    "place in the blend": lambda s: s.kasmina.seeds["late"].advance(),
    "stage": lambda s: setattr(s.kasmina.seeds["late"], "stage", SeedStage.SHADOWING),
    "evidence": measure,
    "gradient norms of a seed": lambda s: s.kasmina.seeds["late"].norms.add(1.0),
    "gradient norms of the host": lambda s: s.kasmina.host_norms.add(1.0),
    "fine-tuning": lambda s: setattr(s.kasmina.seeds["early"], "fine_tuning", True),
    "age": lambda s: setattr(s.kasmina.seeds["early"], "age_boundaries", 77),
}


def test_the_digest_sees_everything_else(rig: Rig) -> None:
    seen = {rig.state.digest()}
    assert {rig.state.digest()} == seen
    for name, change in CHANGES.items():
        change(rig.state)
        assert rig.state.digest() not in seen, name
        seen.add(rig.state.digest())


def test_the_structure_digest_sees_what_a_command_can_change(rig: Rig) -> None:
    state = rig.state
    before = state.structure_digest()
    flip(next(iter(state.host_parameters.values())))
    assert state.structure_digest() == before  # the host's weights are none of it
    flip(next(iter(state.kasmina.seeds["late"].named_parameters().values())))
    changed = state.structure_digest()
    assert changed != before
    state.lr.set_scale("host", 0.5, state.step)
    assert state.structure_digest() != changed


# Saving and loading


def fresh(folder: Path, **kasmina: Any) -> Rig:
    folder.mkdir()
    return Rig.build(folder, config=tiny_config(**kasmina), batch_norm=True)


def test_a_loaded_run_is_the_saved_one_and_goes_on_as_it_would(rig: Rig, tmp_path: Path) -> None:
    tensors, meta = saved(rig.state)
    streams = {name: tensor.clone() for name, tensor in rng_tensors(CPU).items()}
    digest = rig.state.digest()
    rig.train(7)  # past the end of the blend and of the epoch
    rig.boundary(do.stabilize("late"))
    rig.train(2)
    with fresh(tmp_path / "resumed") as other:
        other.train(3)  # what was there before must not shine through
        other.state.load(tensors, meta)
        other.replica.rebuild()
        load_rng_tensors(streams, CPU)
        assert other.state.digest() == digest
        other.train(7)
        other.commands = rig.commands - 1  # so that the command has the same id
        other.boundary(do.stabilize("late"))
        other.train(2)
        assert other.state.digest() == rig.state.digest()


def test_loading_copies(checkpoint: Saved, tmp_path: Path) -> None:
    tensors, meta = checkpoint
    with fresh(tmp_path / "resumed") as other:
        own = dict(other.state.host_parameters)
        other.state.load(tensors, meta)
        assert all(other.state.host_parameters[name] is parameter for name, parameter in own.items())
        held = {tensor.data_ptr() for tensor in tensors.values() if tensor.numel()}
        assert not held & {tensor.data_ptr() for tensor in other.state.tensors().values() if tensor.numel()}


def lose(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    del tensors["model/head.bias"]


def invent(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    tensors["model/tail.bias"] = torch.zeros(2)


def reshape(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    tensors["seed/late/up.bias"] = torch.zeros(99)


def retype(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    tensors["model/head.bias"] = tensors["model/head.bias"].double()


def lose_moment(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    del tensors["optim/head.bias/exp_avg"]


def invent_moment(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    tensors["optim/tail.bias/exp_avg"] = torch.zeros(2)


def rename_group(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["groups"][0]["name"] = "body"


def rename_slot(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["kasmina"]["seeds"]["middle"] = meta["kasmina"]["seeds"].pop("late")


def other_data(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["sampler"]["num_samples"] = 10


def broken_rate(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["lr"]["groups"]["host"]["scale"] = -1.0


def unknown_optimizer(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["optimizer"]["name"] = "tests.unit.no_such_module:Evil"


def unknown_setting(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["optimizer"]["changed"]["speed"] = 1.0


def no_optimizer(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    del meta["optimizer"]


def invent_number(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["optimizer"]["scalars"]["head.bias/count"] = 1


def broken_base_rate(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    meta["lr"]["base_lr"] = -0.5


FOREIGN = [
    lose,
    invent,
    reshape,
    retype,
    lose_moment,
    invent_moment,
    rename_group,
    rename_slot,
    other_data,
    broken_rate,
    broken_base_rate,
    unknown_optimizer,
    unknown_setting,
    no_optimizer,
    invent_number,
]


@pytest.mark.parametrize("damage", FOREIGN, ids=lambda damage: damage.__name__)
def test_another_models_state_is_refused_and_no_tensor_is_copied(
    checkpoint: Saved, tmp_path: Path, damage: Callable[[dict[str, Tensor], dict[str, Any]], None]
) -> None:
    tensors, meta = copy.deepcopy(checkpoint)
    damage(tensors, meta)
    with fresh(tmp_path / "resumed") as other:
        other.train(2)
        before = {name: tensor.clone() for name, tensor in other.state.tensors().items()}
        moments = {name: tensor.clone() for name, tensor in state_tensors(other.state.optimizer).items()}
        with pytest.raises((CheckpointMismatch, TaskError)):
            other.state.load(tensors, meta)
        now = other.state.tensors()
        assert [name for name in before if not same_bits(before[name], now[name])] == []
        own = state_tensors(other.state.optimizer)
        assert [name for name in moments if not same_bits(moments[name], own[name])] == []


# Another optimizer class


def optimizing(folder: Path, name: str, **optim: Any) -> Rig:
    folder.mkdir()
    config = replace(tiny_config(), optim=OptimConfig(name=name, lr=0.02, **optim))
    return Rig.build(folder, config=config, batch_norm=True)


CHANGES_OF_CLASS: list[tuple[str, dict[str, float]]] = [
    ("sgd", {"lr": 0.25, "momentum": 0.5}),
    ("adagrad", {"lr": 0.0625}),
    ("adam", {"lr": 0.03125}),
    ("nadam", {"lr": 0.015625, "weight_decay": 0.25}),
    ("rmsprop", {"lr": 0.001, "momentum": 0.0}),
]


def goes_on(rig: Rig) -> None:
    """Steps, a seed that grows, and steps: what the defaults of new groups are is seen too."""
    rig.train(2)
    rig.grow("late", SeedStage.TRAINING)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad", "nadam", OWN])
def test_a_run_whose_optimizer_was_changed_is_resumed_bit_equal(name: str, tmp_path: Path) -> None:
    with optimizing(tmp_path / "whole", name) as rig, optimizing(tmp_path / "resumed", name) as other:
        rig.grow("early", SeedStage.BLENDING)
        for to, settings in CHANGES_OF_CLASS:
            if to != rig.state.optim.name:
                rig.state.change_optimizer(to, settings)
            assert type(rig.state.optimizer).__name__.lower() == to
            rig.train(2)
            assert other.state.load(*saved(rig.state))
            other.replica.rebuild()
            assert other.state.digest() == rig.state.digest()
        other.commands = rig.commands
        goes_on(rig)
        goes_on(other)
        assert other.state.digest() == rig.state.digest()


@pytest.mark.parametrize("name", ["adamw", "adagrad", OWN])
def test_going_back_in_place_brings_back_numbers_as_well_as_tensors(name: str, tmp_path: Path) -> None:
    with optimizing(tmp_path / "one", name) as rig:
        rig.train(2)
        digest, kept = rig.state.digest(), saved(rig.state)
        rig.train(3)
        live = rig.state.tensors()
        assert not rig.state.load(*kept)
        assert rig.state.digest() == digest
        assert all(t.data_ptr() == live[n].data_ptr() for n, t in rig.state.tensors().items())


@pytest.mark.parametrize("name", ["adamw", "sgd", OWN])
def test_going_back_over_a_change_of_optimizer_is_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    with optimizing(tmp_path / "one", name) as rig, optimizing(tmp_path / "twin", name) as twin:
        for each in (rig, twin):
            each.grow("early", SeedStage.BLENDING)
        kept = saved(rig.state)
        rig.state.change_optimizer("rmsprop", {"lr": 0.5})
        rig.train(3)
        assert rig.state.lr.lr_at("host", 99) == 0.5
        rig.state.load(*kept)
        assert rig.state.lr.lr_at("host", 99) == twin.state.lr.lr_at("host", 99)
        assert rig.state.digest() == twin.state.digest()
        for each in (rig, twin):
            goes_on(each)
        assert rig.state.digest() == twin.state.digest()


def test_another_optimizer_than_the_saved_one_is_put_aside_for_it(checkpoint: Saved, tmp_path: Path) -> None:
    tensors, meta = checkpoint
    with optimizing(tmp_path / "resumed", "sgd") as other:
        other.state.load(tensors, meta)
        assert (other.state.optim.name, other.state.configured_optimizer) == ("adamw", "sgd")
        assert type(other.state.optimizer).__name__ == "AdamW"
        assert saved(other.state)[1]["optimizer"] == meta["optimizer"]


@pytest.mark.parametrize(
    ("to", "settings", "error"),
    [
        ("muon", {"lr": 0.1}, ConfigError),
        ("adam", {"momentum": 0.5}, ValueError),
        ("sgd", {"lr": -1.0}, ValueError),
        ("sgd", {"lr": 0.1, "weight_decay": 2.0}, ValueError),
        ("tests.nowhere:Adam", {"lr": 0.1}, TaskError),
        ("nonsense", {"lr": 0.1}, ValueError),
    ],
)
def test_a_class_that_can_not_be_had_changes_nothing(
    rig: Rig, to: str, settings: dict[str, float], error: type[Exception]
) -> None:
    before = rig.state.digest()
    with pytest.raises(error):
        rig.state.change_optimizer(to, settings)
    assert rig.state.digest() == before


# Memento


def test_going_back_to_before_a_seed_learned_says_that_the_structure_changed(tmp_path: Path) -> None:
    with Rig.build(tmp_path) as rig:
        rig.grow("late", SeedStage.GERMINATED)
        kept = saved(rig.state)
        assert not rig.state.load(*kept)
        rig.boundary(do.start_training("late"))
        rig.train(2)
        assert rig.state.load(*kept)  # so that nobody goes on training it in its shadow
        rig.replica.rebuild(afresh=True)
        rig.train(1)


def test_a_memento_takes_back_structure_rates_and_mode(rig: Rig) -> None:
    state = rig.state
    before, optimizer = state.digest(), state.optimizer
    kept = state.memento()
    state.kasmina.apply(state.kasmina.plan(rig.identified(do.cull("late"))))
    state.regroup()
    state.lr.set_scale("host", 0.25, state.step)
    state.change_optimizer("nadam", {"lr": 0.5})
    state.optimizer.param_groups[0].update(weight_decay=0.5, clip_norm=3.0)
    state.mode = Mode(conservative=True, reason="test")
    assert state.digest() != before
    state.restore(kept)
    assert state.digest() == before
    assert state.optimizer is optimizer
    state.optimizer.param_groups[0].update(weight_decay=0.5, clip_norm=3.0)  # also where no new optimizer was made
    assert state.digest() != before
    state.restore(kept)
    assert state.digest() == before


# Random streams


def draw() -> tuple[Any, ...]:
    """A number from every generator; gauss keeps a second number for the next call."""
    return (torch.rand(2).tolist(), np.random.rand(), np.random.standard_normal(), random.random(), random.gauss(0, 1))


@pytest.mark.parametrize("calls_before", [0, 1])
def test_random_streams_go_on_where_they_were(calls_before: int) -> None:
    seed_rank(5, 10, 1)
    for _ in range(calls_before):  # an odd number leaves a second gaussian number waiting
        random.gauss(0, 1)
        np.random.standard_normal()
    kept = {name: tensor.clone() for name, tensor in rng_tensors(CPU).items()}
    expected = [draw() for _ in range(3)]
    seed_rank(6, 0, 0)
    load_rng_tensors(kept, CPU)
    assert [draw() for _ in range(3)] == expected


def test_ranks_and_steps_have_streams_of_their_own() -> None:
    drawn = []
    for run_seed, step, rank in ((1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0), (1, 2, 0)):
        seed_rank(run_seed, step, rank)
        drawn.append(draw())
    assert drawn[0] == drawn[-1]
    for position in range(len(drawn[0])):
        assert len({str(numbers[position]) for numbers in drawn[:-1]}) == 4


def test_a_missing_stream_is_named_and_none_is_moved() -> None:
    kept = copy.deepcopy(rng_tensors(CPU))
    del kept["rng/python"]
    state = random.getstate()
    with pytest.raises(CheckpointMismatch, match="rng/python"):
        load_rng_tensors(kept, CPU)
    assert random.getstate() == state
