"""The command that changes the optimizer's class: what it is refused for, what it does, and the way back."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optimizers import OWN, failing_at
from tests.rig import CLASSES, FEATURES, WIDTH, Rig, host_momentum, make_task, tiny_config
from tolaria.config import LRConfig, OptimConfig, TuningConfig
from tolaria.coordinator import apply
from tolaria.errors import ConfigError
from tolaria.kasmina.blueprints import register_blueprint
from tolaria.kasmina.slot import Slot
from tolaria.leyline.types import Command, CommandType, OptimizerCommand, SeedStage
from tolaria.mode import Mode
from tolaria.optim.lr import LRController
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policies.script import load_script
from tolaria.task import Task


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig.build(tmp_path) as built:
        built.train(3)
        yield built


def bare(name: str, **values: float) -> Command:
    payload = OptimizerCommand(optimizer_id=f"class/{name}", hyperparameters=values)
    return Command(command_id="", command_type=CommandType.OPTIMIZER, payload=payload)


def codes(rig: Rig, *commands: Command) -> list[str]:
    return [outcome.code for outcome in rig.apply(*commands).outcomes]


REFUSED: list[tuple[Command, str, str]] = [
    (do.change_optimizer("lion", lr=0.1), "unknown_optimizer", "adamw, adam, sgd"),
    (do.change_optimizer("tests.unit.no_such_module:Evil", lr=0.1), "unknown_optimizer", "there are"),
    (do.change_optimizer("adamw", lr=0.1), "same_optimizer", "adamw already"),
    (do.change_optimizer("sgd", momentum=0.5), "lr_missing", "give 'lr'"),
    (bare("sgd", lr=0.1, beta1=0.5), "unknown_parameter", "beta1"),
    (bare("sgd", lr=0.1, lr_scale=0.5), "unknown_parameter", "lr_scale"),
    (do.change_optimizer("sgd", lr=0.0), "out_of_bounds", "tuning.min_lr"),
    (do.change_optimizer("sgd", lr=101), "out_of_bounds", "at most 100 (tuning.max_lr)"),
    (do.change_optimizer("sgd", lr=0.1, weight_decay=0.75), "out_of_bounds", "tuning.max_weight_decay"),
    (do.change_optimizer("sgd", lr=0.1, momentum=0.9999), "out_of_bounds", "tuning.max_momentum"),
    (do.change_optimizer("adam", momentum=0.5), "optimizer_unfit", "no momentum"),
    (do.change_optimizer("muon", lr=0.1), "optimizer_unfit", "matrices only"),
]


@pytest.mark.parametrize(("command", "code", "said"), REFUSED, ids=[f"{code}-{said}" for _, code, said in REFUSED])
def test_what_can_not_be_done_is_refused_with_a_code_and_changes_nothing(
    rig: Rig, command: Command, code: str, said: str
) -> None:
    before = rig.state.digest()
    (outcome,) = rig.apply(command).outcomes
    assert (outcome.applied, outcome.code) == (False, code)
    assert said in outcome.reason
    assert rig.state.digest() == before


def test_no_other_optimizer_in_conservative_mode(rig: Rig) -> None:
    rig.state.mode = Mode(conservative=True, reason="policy: timeout", held=True)
    assert codes(rig, do.change_optimizer("sgd", lr=0.1)) == ["conservative"]


def bounded(tmp_path: Path, **bounds: float) -> Rig:
    return Rig.build(tmp_path, config=replace(tiny_config(), tuning=replace(TuningConfig(), **bounds)))


def test_a_new_class_keeps_the_bounds_of_every_setting(tmp_path: Path) -> None:
    with bounded(tmp_path, max_lr=0.05, max_momentum=0.8, min_weight_decay=0.001) as rig:
        for settings in ({"lr": 50.0}, {"momentum": 0.85}, {"weight_decay": 0.0}):
            assert codes(rig, do.change_optimizer("sgd", **{"lr": 0.05} | settings)) == ["out_of_bounds"]
        assert rig.state.optim.name == "adamw"
        assert codes(rig, do.change_optimizer("sgd", lr=0.05, momentum=0.8, weight_decay=0.001)) == ["applied"]


def test_a_new_rate_keeps_the_bound_of_each_group_with_what_commands_did_to_it(tmp_path: Path) -> None:
    with bounded(tmp_path, max_lr=0.1) as rig:
        assert codes(rig, do.scale_lr("host", 3.0)) == ["applied"]
        (outcome,) = rig.apply(do.change_optimizer("sgd", lr=0.09)).outcomes
        assert outcome.code == "out_of_bounds"
        assert "lr of 'host' 0.06 -> 0.27: allowed at most 0.1 (tuning.max_lr)" in outcome.reason
        assert codes(rig, do.change_optimizer("sgd", lr=0.03)) == ["applied"]


def test_settings_are_the_numbers_that_were_written_not_their_32_bit_form(rig: Rig) -> None:
    assert codes(rig, do.change_optimizer("sgd", lr=0.1, momentum=0.9, weight_decay=0.003)) == ["applied"]
    group = rig.state.optimizer.param_groups[0]
    assert (rig.state.optim.lr, group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.003)


def test_undo_does_not_reach_back_over_a_change_of_class(rig: Rig) -> None:
    assert codes(rig, do.scale_lr("host", 0.5)) == ["applied"]
    assert codes(rig, do.change_optimizer("sgd", lr=0.1)) == ["applied"]
    before = rig.state.digest()
    assert codes(rig, do.undo()) == ["nothing_to_undo"]
    assert rig.state.digest() == before


def test_the_class_changes_once_at_a_boundary(rig: Rig) -> None:
    both = codes(rig, do.change_optimizer("sgd", lr=0.1), do.change_optimizer("adam", lr=0.1))
    assert sorted(both) == ["applied", "one_per_boundary"]
    assert rig.state.optim.name == "sgd"


def test_the_new_class_trains_with_the_new_rate_and_seeds_to_come_have_its_settings(rig: Rig) -> None:
    rig.grow("early", SeedStage.TRAINING)
    assert codes(rig, do.scale_lr("host", 0.5)) == ["applied"]
    assert codes(rig, do.change_optimizer("sgd", lr=0.25, momentum=0.5, weight_decay=0.125)) == ["applied"]
    rig.train(1)
    host, seed = rig.state.optimizer.param_groups
    assert (host["name"], host["lr"], seed["name"]) == ("host", 0.125, "seed/early")
    rig.grow("late", SeedStage.TRAINING)
    assert {(g["momentum"], g["weight_decay"]) for g in rig.state.optimizer.param_groups} == {(0.5, 0.125)}
    assert [type(rig.state.optimizer), len(rig.state.optimizer.param_groups)] == [torch.optim.SGD, 3]
    moved = [n for n, p in rig.state.host_parameters.items() if "momentum_buffer" in rig.state.optimizer.state[p]]
    assert moved == list(rig.state.host_parameters)


def test_within_the_family_of_adam_the_moments_and_the_rate_stay(rig: Rig) -> None:
    before = host_momentum(rig.state)
    assert codes(rig, do.change_optimizer("nadam", weight_decay=0.0)) == ["applied"]
    after = host_momentum(rig.state)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert rig.state.lr.lr_at("host", 0) == tiny_config().optim.lr


def test_the_configured_class_of_the_users_own_can_be_left_and_come_back_to(tmp_path: Path) -> None:
    with Rig.build(tmp_path, config=replace(tiny_config(), optim=OptimConfig(name=OWN))) as rig:
        for name in ("adamw", OWN, "sgd"):
            assert codes(rig, do.change_optimizer(name, lr=0.01)) == ["applied"]
            rig.train(2)
            assert rig.state.optim.name == name


def test_a_failure_at_any_tensor_of_a_decision_takes_all_of_it_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.grow("late", SeedStage.TRAINING)
    decision = (do.germinate("early", "low_rank"), do.cull("late"), do.change_optimizer("nadam", lr=0.5))
    change, faults = apply._change, 0
    while True:
        before = rig.state.digest()
        with monkeypatch.context() as patch:

            def failing(*arguments: Any, at: int = faults, **keywords: Any) -> None:
                with failing_at(at):
                    change(*arguments, **keywords)

            patch.setattr(apply, "_change", failing)
            outcomes = rig.apply(*decision).outcomes
        if all(outcome.applied for outcome in outcomes):
            break
        faults += 1
        assert {outcome.code for outcome in outcomes} == {"apply_failed"}
        assert rig.state.digest() == before
        assert (rig.state.optim.name, type(rig.state.optimizer)) == ("adamw", torch.optim.AdamW)
    assert faults > 20
    assert rig.state.optim.name == "nadam"
    rig.train(2)


# Muon: matrices only


class Matrices(nn.Module):
    """A host without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.early = nn.Linear(FEATURES, WIDTH, bias=False), Slot("early")
        self.middle, self.head = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, FEATURES) -> logits (batch, CLASSES)."""
        logits: Tensor = self.head(torch.relu(self.middle(self.early(torch.tanh(self.inlet(x))))))
        return logits


def matrices_task() -> Task:
    return replace(make_task(), model=Matrices())


class Mixer(nn.Module):
    """A seed without a bias."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.mix = nn.Linear(shape[-1], shape[-1], bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        mixed: Tensor = self.mix(h)
        return mixed


def test_muon_refuses_a_seed_with_other_than_matrices_and_takes_one_without(tmp_path: Path) -> None:
    register_blueprint("mixer", Mixer)
    config = replace(tiny_config(), optim=OptimConfig(name="muon", lr=0.01))
    with Rig.build(tmp_path, config=config, make=matrices_task) as rig:
        rig.train(3)
        before = rig.state.digest()
        (outcome,) = rig.apply(do.germinate("early", "residual_mlp")).outcomes
        assert outcome.code == "optimizer_unfit"
        assert "'residual_mlp' with muon" in outcome.reason and "2D" in outcome.reason
        assert rig.state.digest() == before
        rig.grow("early", SeedStage.BLENDING, "mixer")
        assert type(rig.state.optimizer) is torch.optim.Muon
        assert codes(rig, do.change_optimizer("adamw", lr=0.01)) == ["applied"]
        assert codes(rig, do.germinate("late", "residual_mlp")) == ["applied"]


def test_a_host_with_biases_can_not_be_configured_with_muon(tmp_path: Path) -> None:
    config = replace(tiny_config(), optim=OptimConfig(name="muon"))
    with pytest.raises(ConfigError, match=r"muon.*matrices only.*inlet\.bias \(8,\)"):
        Rig.build(tmp_path, config=config)


# The script


def test_a_script_changes_the_optimizer(tmp_path: Path) -> None:
    file = tmp_path / "script.toml"
    file.write_text('[[command]]\nboundary = 2\nop = "change_optimizer"\noptimizer = "sgd"\nlr = 1\nmomentum = 0.5\n')
    _, commands, _ = load_script(file)
    (command,) = commands[2]
    assert command.payload == OptimizerCommand(optimizer_id="class/sgd", hyperparameters={"lr": 1.0, "momentum": 0.5})
    file.write_text('[[command]]\nboundary = 2\nop = "change_optimizer"\noptimizer = "sgd"\n')
    with pytest.raises(ConfigError, match="empty"):
        load_script(file)


# The base rate


def controller() -> LRController:
    made = LRController(LRConfig(policy="linear", final_ratio=0.0, seed_warmup_steps=0), 1.0, 101)
    made.add_group("host")
    made.add_group("seed/a", "seed")
    made.set_scale("host", 0.5, 0)
    return made


def test_a_new_base_rate_moves_every_group_and_keeps_schedule_and_factors() -> None:
    lr, before = controller(), controller()
    lr.set_base_rate(4.0)
    for name in ("host", "seed/a"):
        for step in (0, 30, 99):
            assert lr.lr_at(name, step) == 4.0 * before.lr_at(name, step)
    assert [(change.group, change.old_lr, change.new_lr) for change in lr.history[-2:]] == [
        ("host", 0.5, 2.0),
        ("seed/a", 1.0, 4.0),
    ]


def test_a_new_base_rate_is_saved_and_the_configured_one_is_not() -> None:
    changed, unchanged, other = controller(), controller(), LRController(LRConfig(), 9.0, 101)
    changed.set_base_rate(4.0)
    assert changed.state_dict() != unchanged.state_dict()
    other.load_state_dict(changed.state_dict())
    assert other.lr_at("host", 0) == 2.0
    assert other.state_dict() == changed.state_dict()
    other.load_state_dict(unchanged.state_dict())
    assert other.lr_at("host", 0) == 4.5


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_base_rate_that_is_none_changes_nothing(rate: float) -> None:
    lr = controller()
    before = lr.state_dict()
    with pytest.raises(ValueError, match="base_lr"):
        lr.set_base_rate(rate)
    assert lr.state_dict() == before
