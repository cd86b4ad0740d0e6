"""Commands to the optimizer: what each is refused for, what it changes, and that undo takes it back bit for bit."""

import copy
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Muon, NAdam, Optimizer, RMSprop

from tolaria.config_tuning import LRConfig, TuningConfig
from tolaria.errors import CheckpointMismatch, CommandRefused
from tolaria.leyline.codec import decode_command, encode_command
from tolaria.leyline.types import OptimizerCommand
from tolaria.optim.lr import LRController
from tolaria.optim.tuning import Change, Tuner, Tuning
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

BASE_LR = 0.1
LOOSE = TuningConfig(
    lr_factor=1e6, weight_decay_factor=1e6, clip_norm_factor=1e6, beta_change=1, momentum_change=1,
    max_weight_decay=0.9, max_momentum=0.99,
)  # fmt: skip


@dataclass
class Bench:
    """What commands work on: an optimizer of three groups, its rates, the tuner."""

    optimizer: Optimizer
    lr: LRController
    tuner: Tuner
    step: int = 0
    commands: int = 0

    def plan(self, group: str, *, conservative: bool = False, **values: float) -> Tuning:
        """What the command would change, after its way over the wire."""
        self.commands += 1
        sent = with_identity(do.set_optimizer(group, **values), f"c{self.commands}", issued_by="", issued_at_ns=1)
        command = decode_command(encode_command(sent))
        assert isinstance(command.payload, OptimizerCommand)
        return self.tuner.plan(
            command.command_id, command.payload, self.optimizer, self.lr, step=self.step, conservative=conservative
        )

    def tune(self, group: str, *, conservative: bool = False, **values: float) -> Tuning:
        """Plan and commit."""
        tuning = self.plan(group, conservative=conservative, **values)
        self.tuner.commit(tuning, self.optimizer, self.lr, self.step)
        return tuning

    def refused(self, group: str, *, conservative: bool = False, **values: float) -> CommandRefused:
        """The refusal of a command, which changed nothing."""
        before = self.whole()
        with pytest.raises(CommandRefused) as caught:
            self.tune(group, conservative=conservative, **values)
        assert self.whole() == before
        return caught.value

    def options(self) -> list[dict[str, Any]]:
        """Every option of every group."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]

    def rates(self) -> dict[str, tuple[float, bool]]:
        """Scale and freeze of every group."""
        return {name: (self.lr.scale_of(name), self.lr.is_frozen(name)) for name in self.lr.groups}

    def whole(self) -> Any:
        """All that a command can change."""
        return copy.deepcopy((self.options(), self.lr.state_dict(), self.tuner.state_dict()))

    def option(self, key: str, group: int = 0) -> Any:
        return self.optimizer.param_groups[group][key]


GROUPS = ("host", "seed/a", "seed/b")


def bench(
    cls: type[Optimizer] = AdamW, config: TuningConfig | None = None, lr: LRConfig | None = None, **kw: Any
) -> Bench:
    entries = [{"params": [nn.Parameter(torch.zeros(2, 2))], "name": name} for name in GROUPS]
    optimizer = cls(entries, lr=BASE_LR, **kw)
    for group in optimizer.param_groups:
        group["clip_norm"] = 1.0
    lr = lr or LRConfig(policy="constant", seed_warmup_steps=0)
    controller = LRController(lr, BASE_LR, 100)
    for name in GROUPS:
        controller.add_group(name, "host" if name == "host" else "seed")
    return Bench(optimizer, controller, Tuner(config or TuningConfig(), lr))


# Names


@pytest.mark.parametrize(
    ("cls", "has"),
    [
        (AdamW, {"beta1": 0.85, "beta2": 0.99, "weight_decay": 0.02, "clip_norm": 0.5}),
        (NAdam, {"beta1": 0.85, "beta2": 0.99, "weight_decay": 0.02, "clip_norm": 0.5}),
        (SGD, {"momentum": 0.85, "weight_decay": 0.02, "clip_norm": 0.5}),
        (RMSprop, {"beta2": 0.95, "momentum": 0.85, "weight_decay": 0.02, "clip_norm": 0.5}),
        (Muon, {"momentum": 0.9, "weight_decay": 0.02, "clip_norm": 0.5}),
        (Adagrad, {"weight_decay": 0.02, "clip_norm": 0.5}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_class_takes_what_it_has_and_a_refusal_lists_it(cls: type[Optimizer], has: dict[str, float]) -> None:
    extra = {"weight_decay": 0.01} | ({"momentum": 0.9} if cls in (SGD, RMSprop) else {})
    on = bench(cls, **extra)
    on.tune("host", **has)
    for key, value in has.items():
        if key in ("beta1", "beta2") and "betas" in on.optimizer.param_groups[0]:
            assert on.option("betas")[key == "beta2"] == value
        else:
            assert on.option("alpha" if key == "beta2" else key) == value
    for key in {"beta1", "beta2", "momentum"} - set(has):
        refusal = on.refused("host", **{key: 0.9})
        assert refusal.code == "unknown_parameter"
        listed = ", ".join(["lr", "lr_scale", "freeze", *in_order(has)])
        assert str(refusal) == f"this optimizer has no {key}; it has {listed}"


def in_order(has: dict[str, float]) -> list[str]:
    return [key for key in ("weight_decay", "beta1", "beta2", "momentum", "clip_norm") if key in has]


def test_a_pattern_reaches_every_group_that_it_matches_and_an_empty_one_all() -> None:
    on = bench()
    assert [c.group for c in on.tune("seed/*", weight_decay=0.05).changes] == ["seed/a", "seed/b"]
    assert [on.option("weight_decay", n) for n in range(3)] == [0.01, 0.05, 0.05]
    everything = OptimizerCommand(optimizer_id="", hyperparameters={"freeze": 1.0})
    plan = on.tuner.plan("c", everything, on.optimizer, on.lr, step=0, conservative=False)
    assert [c.group for c in plan.changes] == list(GROUPS)
    assert on.refused("seed/c", freeze=1).code == "unknown_group"


def test_numbers_are_those_that_were_written_not_their_32_bit_form() -> None:
    on = bench()
    on.tune("*", lr=0.3, weight_decay=0.1, beta1=0.85)
    assert on.lr.scale_of("host") == 0.3 / 0.1
    assert on.option("weight_decay") == 0.1
    assert on.option("betas") == (0.85, 0.999)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"undo": 1, "lr": 0.1}, "bad_parameter"),
        ({"undo": 0}, "bad_parameter"),
        ({"undo": 2}, "bad_parameter"),
        ({"lr": 0.1, "lr_scale": 1}, "bad_parameter"),
        ({"freeze": 0.5}, "bad_parameter"),
        ({"lr": 0}, "invalid_factor"),
        ({"lr_scale": -1}, "invalid_factor"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, float], code: str) -> None:
    on = bench()
    on.tune("host", lr=0.2)
    assert on.refused("host", **values).code == code


@pytest.mark.parametrize("values", [{}, {"colour": 1.0}, {"lr": math.nan}])
def test_what_no_policy_of_ours_would_send_is_refused_too(values: dict[str, float]) -> None:
    on = bench()
    payload = OptimizerCommand(optimizer_id="host", hyperparameters=values)
    with pytest.raises(CommandRefused, match=r"hyperparameter|finite"):
        on.tuner.plan("c", payload, on.optimizer, on.lr, step=0, conservative=False)


# Bounds


@pytest.mark.parametrize(
    ("values", "code", "message"),
    [
        ({"weight_decay": 0.6}, "out_of_bounds",
         "weight_decay of 'host' 0.01 -> 0.6: allowed at most 0.5 (tuning.max_weight_decay)"),
        ({"weight_decay": -0.1}, "out_of_bounds",
         "weight_decay of 'host' 0.01 -> -0.1: allowed at least 0 (tuning.min_weight_decay)"),
        ({"weight_decay": 0.2}, "rate_limited",
         "weight_decay of 'host' 0.01 -> 0.2: one boundary allows 0.001 to 0.1 (tuning.weight_decay_factor)"),
        ({"clip_norm": 0.0}, "out_of_bounds",
         "clip_norm of 'host' 1 -> 0: allowed at least 0.01 (tuning.min_clip_norm)"),
        ({"clip_norm": 20}, "rate_limited",
         "clip_norm of 'host' 1 -> 20: one boundary allows 0.1 to 10 (tuning.clip_norm_factor)"),
        ({"beta1": 0.995}, "out_of_bounds", "beta1 of 'host' 0.9 -> 0.995: allowed at most 0.99 (tuning.max_beta1)"),
        ({"beta2": 0.8}, "rate_limited",
         "beta2 of 'host' 0.999 -> 0.8: one boundary allows 0.899 to 1.099 (tuning.beta_change)"),
        ({"lr": 101}, "out_of_bounds", "lr of 'host' 0.1 -> 101: allowed at most 100 (tuning.max_lr)"),
        ({"lr": 2}, "lr_out_of_bounds", "lr of 'host' 0.1 -> 2: allowed at most 1 (lr.max_scale)"),
        ({"lr": 0.005}, "rate_limited",
         "lr of 'host' 0.1 -> 0.005: one boundary allows 0.01 to 1 (tuning.lr_factor)"),
        ({"lr_scale": 0.001}, "lr_out_of_bounds",
         "total factor of the lr of 'host' 1 -> 0.001: allowed at least 0.01 (lr.min_scale)"),
        ({"lr_scale": 0.05}, "rate_limited",
         "total factor of the lr of 'host' 1 -> 0.05: one boundary allows 0.1 to 10 (tuning.lr_factor)"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_wanted_what_is_allowed_and_which_key_says_so(
    values: dict[str, float], code: str, message: str
) -> None:
    refusal = bench().refused("host", **values)
    assert (refusal.code, str(refusal)) == (code, message)
    assert len(message) <= 128  # what a field report carries


def test_a_bound_itself_is_allowed_also_when_it_is_reached_in_rounded_steps() -> None:
    on = bench()
    on.tune("host", weight_decay=0.1, clip_norm=10, beta1=0.8)
    on.tune("host", weight_decay=0.5, clip_norm=100, beta1=0.9)
    on.tune("host", clip_norm=1000, beta1=0.99)
    for _ in range(3):
        on.tune("host", lr_scale=10.0 ** (1 / 3))
    assert on.lr.scale_of("host") == pytest.approx(10.0)
    for _ in range(3):
        on.tune("host", lr_scale=0.1)
    assert on.lr.scale_of("host") == pytest.approx(0.01)
    assert on.refused("host", lr_scale=0.9).code == "lr_out_of_bounds"


def test_all_groups_or_none() -> None:
    on = bench()
    on.tune("seed/b", lr=0.9)
    assert on.refused("*", lr_scale=2).code == "lr_out_of_bounds"  # fits two of the three
    assert on.refused("*", freeze=1, weight_decay=0.9).code == "out_of_bounds"


def test_off_is_no_matter_of_factors_but_momentum_does_not_come_from_nothing() -> None:
    on = bench(SGD, TuningConfig(min_clip_norm=0.0), weight_decay=0.0, momentum=0.0)
    on.tune("host", weight_decay=0.3, clip_norm=0.0)
    on.tune("host", weight_decay=0.0, clip_norm=50.0)
    assert on.refused("host", momentum=0.05).code == "out_of_bounds"
    moving = bench(SGD, momentum=0.05)
    assert moving.refused("host", momentum=0.0).code == "out_of_bounds"
    moving.tune("host", momentum=0.1)


# The learning rate


def test_a_rate_that_was_set_goes_on_in_proportion_to_the_schedule() -> None:
    on = bench(lr=LRConfig(policy="linear", final_ratio=0.0, seed_warmup_steps=0, seed_ratio=0.5))
    on.step = 33  # of 99: two thirds of the way are left
    on.tune("*", lr=0.02)
    for name in GROUPS:
        assert on.lr.lr_at(name, 33) == pytest.approx(0.02, rel=1e-12)
        assert on.lr.lr_at(name, 66) == pytest.approx(0.01, rel=1e-12)
        assert on.lr.lr_at(name, 99) == 0.0
    change = on.lr.history[-1]
    assert (change.step, change.group, change.cause) == (33, "seed/b", "command")
    assert change.new_lr == pytest.approx(0.02)


def test_a_rate_can_not_be_set_where_the_schedule_is_at_zero() -> None:
    on = bench(lr=LRConfig(policy="constant", seed_policy="frozen"))
    assert on.refused("seed/a", lr=0.1).code == "frozen_by_policy"
    ended = bench(lr=LRConfig(policy="linear", final_ratio=0.0))
    ended.step = 99
    refusal = ended.refused("host", lr=0.1)
    assert refusal.code == "bad_parameter"
    assert "schedule is at 0" in str(refusal)
    ended.tune("host", lr_scale=0.5)


BRAKES = LRConfig(policy="linear", final_ratio=0.0, warmup_steps=20, seed_warmup_steps=40, conservative_factor=0.25)


@pytest.mark.parametrize("seed_policy", ["seed_warmup", "morpho_adaptive"])
@pytest.mark.parametrize("step", [0, 5, 30, 60])
@pytest.mark.parametrize("conservative", [False, True])
def test_a_rate_that_was_set_under_a_brake_is_never_exceeded_when_the_brake_is_off(
    seed_policy: Any, step: int, conservative: bool
) -> None:
    on, free = (bench(lr=replace(BRAKES, seed_policy=seed_policy)) for _ in range(2))
    on.step = free.step = step
    on.lr.rewarm(step, 10)
    on.lr.set_conservative(conservative)
    before = {name: on.lr.lr_at(name, step) for name in GROUPS}
    on.tune("*", lr=0.02)
    scales = on.rates()
    for name in GROUPS:  # the brakes go on as if nothing had been set
        assert on.lr.lr_at(name, step) == pytest.approx(before[name] * scales[name][0], rel=1e-12)
        on.lr.set_progress(name, 1.0)
    on.lr.set_conservative(False)
    for name in GROUPS:
        assert max(on.lr.lr_at(name, later) for later in range(step, 100)) <= 0.02 * (1 + 1e-12)
    free.tune("*", lr=0.02)
    assert free.rates() == scales


def test_the_rate_without_brakes_is_the_one_that_was_set() -> None:
    on = bench(lr=replace(BRAKES, final_ratio=1.0))
    on.lr.rewarm(0, 10)
    on.tune("*", lr=0.02)
    assert [on.lr.lr_at(name, 50) for name in GROUPS] == pytest.approx([0.02] * 3, rel=1e-12)


def test_a_factor_keeps_the_bounds_of_the_rate_too() -> None:
    on = bench(config=TuningConfig(min_lr=0.04, max_lr=0.15))
    refusal = on.refused("host", lr_scale=2)
    assert (refusal.code, str(refusal)) == (
        "out_of_bounds", "lr of 'host' 0.1 -> 0.2: allowed at most 0.15 (tuning.max_lr)",
    )  # fmt: skip
    assert "tuning.min_lr" in str(on.refused("host", lr_scale=0.3))
    on.tune("host", lr_scale=1.5)
    assert on.refused("host", lr_scale=1.1).code == "out_of_bounds"


def test_the_bound_holds_for_the_rate_without_its_brakes_whichever_way_it_is_set() -> None:
    on = bench(config=TuningConfig(max_lr=0.15), lr=LRConfig(policy="constant", conservative_factor=0.1))
    on.lr.rewarm(0, 10)
    on.lr.set_conservative(True)
    assert on.refused("*", lr_scale=2).code == on.refused("*", lr=0.2).code == "out_of_bounds"


def test_a_factor_may_bring_a_rate_nearer_to_bounds_that_the_start_did_not_keep() -> None:
    high, low = bench(config=TuningConfig(max_lr=0.01)), bench(config=TuningConfig(min_lr=0.5))
    high.tune("host", lr_scale=0.5)
    low.tune("host", lr_scale=2)
    assert high.refused("host", lr_scale=1.1).code == low.refused("host", lr_scale=0.9).code == "out_of_bounds"


@pytest.mark.parametrize("values", [{"lr": 0.1}, {"lr_scale": 0.5}, {"freeze": 0}])
@pytest.mark.parametrize(
    ("config", "key"),
    [
        (LRConfig(seed_policy="frozen"), "lr.seed_policy"),
        (LRConfig(group_policies={"seed/a": "frozen"}), "lr.group_policies.seed/a"),
        (LRConfig(group_policies={"seed/*": "frozen", "seed/a": "constant"}), "lr.group_policies.seed/*"),
    ],
)
def test_what_does_nothing_to_a_group_that_its_policy_freezes_is_refused_and_the_key_named(
    values: dict[str, float], config: LRConfig, key: str
) -> None:
    on = bench(lr=config)
    refusal = on.refused("seed/a", **values)
    assert refusal.code == "frozen_by_policy"
    assert f"its policy is frozen ({key})" in str(refusal)
    assert on.refused("seed/a", weight_decay=0.02, **values).code == "frozen_by_policy"
    others = {name for name in GROUPS if not on.lr.frozen_by(name)}
    changed = on.tune("*", weight_decay=0.02, **values).changes
    assert {change.group for change in changed if change.key != "weight_decay"} == others
    assert {change.group for change in changed if change.key == "weight_decay"} == set(GROUPS)
    on.tune("seed/a", freeze=1)


def test_what_is_set_while_a_group_is_frozen_counts_after_it() -> None:
    on = bench()
    on.tune("host", freeze=1)
    on.tune("host", lr=0.2)
    assert on.lr.lr_at("host", 0) == 0.0
    on.tune("host", freeze=0)
    assert on.lr.lr_at("host", 0) == pytest.approx(0.2)


# Conservative mode


def test_conservative_mode_refuses_faster_learning_in_every_form() -> None:
    on = bench()
    on.tune("host", lr_scale=0.5)
    on.tune("seed/a", freeze=1)
    assert on.refused("host", lr_scale=1.1, conservative=True).code == "lr_increase_conservative"
    assert on.refused("host", lr=0.06, conservative=True).code == "lr_increase_conservative"
    assert on.refused("host", undo=1, conservative=True).code == "lr_increase_conservative"
    assert on.refused("seed/a", freeze=0, conservative=True).code == "thaw_conservative"
    assert on.refused("seed/a", undo=1, conservative=True).code == "thaw_conservative"
    on.tune("host", lr=0.04, weight_decay=0.02, conservative=True)
    on.tune("seed/b", freeze=1, conservative=True)


FASTER = [
    (SGD, "momentum", 0.9, 0.95), (AdamW, "beta1", 0.9, 0.95), (AdamW, "beta2", 0.999, 0.95),
    (AdamW, "clip_norm", 1.0, 2.0), (AdamW, "clip_norm", 1.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "key", "slow", "fast"), FASTER)
def test_conservative_mode_refuses_larger_steps_by_other_means_and_takes_the_way_back(
    cls: type[Optimizer], key: str, slow: float, fast: float
) -> None:
    on = bench(cls, replace(LOOSE, min_clip_norm=0.0), **({"momentum": 0.9} if cls is SGD else {}))
    refusal = on.refused("host", conservative=True, **{key: fast})
    assert refusal.code == "faster_conservative"
    assert str(refusal).startswith(f"{key} of 'host' {slow:g} -> {fast:g}: ")
    on.tune("host", **{key: fast})
    on.tune("host", conservative=True, **{key: slow})
    assert on.refused("host", undo=1, conservative=True).code == "faster_conservative"


def first_step_after(**betas: float) -> float:
    """How far AdamW, which met ten gradients of 1, goes on the eleventh with these betas."""
    on = bench(weight_decay=0.0)
    weight = on.optimizer.param_groups[0]["params"][0]
    for step in range(11):
        if step == 10:
            before = float(weight.detach()[0, 0])
            on.tune("host", **betas)
        weight.grad = torch.ones_like(weight)
        on.optimizer.step()
    return before - float(weight.detach()[0, 0])


def test_the_betas_that_conservative_mode_refuses_are_those_that_make_steps_larger() -> None:
    plain = first_step_after(beta1=0.9)
    assert first_step_after(beta1=0.95) > 1.5 * plain
    assert first_step_after(beta2=0.95) > 1.5 * plain
    assert first_step_after(beta1=0.85) < plain
    assert first_step_after(beta2=0.9999) < plain


# Undo


def test_undo_takes_back_the_newest_command_that_touched_these_groups() -> None:
    on = bench()
    start = on.rates()
    on.tune("*", lr_scale=0.5)
    on.tune("host", freeze=1)
    on.tune("seed/a", weight_decay=0.02)
    assert on.tune("seed/b", undo=1).undoes == "c1"
    assert on.rates()["seed/b"] == (1.0, False)
    assert on.rates()["seed/a"] == (0.5, False)
    assert on.tune("*", undo=1).undoes == "c3"
    assert on.tune("*", undo=1).undoes == "c2"
    assert on.tune("*", undo=1).undoes == "c1"
    assert on.rates() == start
    assert on.refused("*", undo=1).code == "nothing_to_undo"
    assert [c.cause for c in on.lr.history][-2:] == ["undo", "undo"]


def test_what_changed_nothing_is_nothing_to_undo() -> None:
    on = bench()
    assert on.tune("host", freeze=0, lr_scale=1).touched == {"freeze of host", "lr of host"}
    assert on.refused("host", undo=1).code == "nothing_to_undo"


def test_the_newest_commands_can_be_undone_no_more_than_configured() -> None:
    on = bench(config=TuningConfig(undo_depth=2))
    for _ in range(4):
        on.tune("host", lr_scale=0.9)
    on.tune("host", undo=1)
    on.tune("host", undo=1)
    assert on.refused("host", undo=1).code == "nothing_to_undo"
    assert on.lr.scale_of("host") == pytest.approx(0.81)


def test_undo_is_not_bound_by_bounds_that_the_start_did_not_keep() -> None:
    on = bench(weight_decay=0.9)
    start = on.options()
    on.tune("host", weight_decay=0.5)
    on.tune("host", undo=1)
    assert on.options() == start


def test_a_group_that_is_gone_is_not_gone_back_to() -> None:
    on = bench()
    on.tune("*", freeze=1)
    on.tuner.forget("seed/a")
    assert on.plan("*", undo=1).changes == (Change("host", "freeze", 1.0, 0.0), Change("seed/b", "freeze", 1.0, 0.0))


def test_a_change_of_class_ends_what_can_be_undone() -> None:
    on = bench()
    on.tune("*", weight_decay=0.02, freeze=1, lr_scale=0.5)
    on.tuner.class_changed()
    assert on.refused("*", undo=1).code == "nothing_to_undo"


def test_what_can_be_undone_is_saved_and_damage_is_refused() -> None:
    on = bench()
    on.tune("*", lr_scale=1 / 3, beta1=0.83)
    saved = json.loads(json.dumps(on.tuner.state_dict()))
    other = bench()
    other.tuner.load_state_dict(saved)
    assert other.tuner.state_dict() == on.tuner.state_dict()
    for damage in ({}, {"done": [["c1", [["host", "lr_scale"]]]]}, {"done": [1]}):
        with pytest.raises(CheckpointMismatch):
            other.tuner.load_state_dict(damage)
    assert other.tuner.state_dict() == on.tuner.state_dict()


# Any course of commands

VALUES = {
    "lr": st.sampled_from([0.01, 0.07, 0.3, 5.0]),
    "lr_scale": st.sampled_from([0.3, 0.9, 1.7, 30.0]),
    "freeze": st.sampled_from([0.0, 1.0]),
    "weight_decay": st.sampled_from([0.0, 0.003, 0.02, 0.7]),
    "beta1": st.sampled_from([0.7, 0.85, 0.9, 0.95]),
    "beta2": st.sampled_from([0.9, 0.99, 0.9995]),
    "clip_norm": st.sampled_from([0.001, 0.5, 3.0, 40.0]),
    "momentum": st.just(0.9),  # AdamW has none
}
COMMANDS = st.tuples(
    st.sampled_from(["host", "seed/a", "seed/*", "*", "nobody"]),
    st.booleans(),
    st.one_of(
        st.just({"undo": 1.0}),
        st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3, unique=True).flatmap(
            lambda names: st.fixed_dictionaries({name: VALUES[name] for name in names})
        ),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(COMMANDS, max_size=14))
def test_the_state_is_that_of_the_accepted_commands_and_undoing_all_of_them_is_the_start(commands: Any) -> None:
    on = bench()
    start = on.options(), on.rates()
    accepted: list[Tuning] = []
    for group, conservative, values in commands:
        before = on.whole()
        try:
            tuning = on.plan(group, conservative=conservative, **values)
        except CommandRefused:
            assert on.whole() == before
            continue
        assert on.whole() == before
        on.tuner.commit(tuning, on.optimizer, on.lr, on.step)
        accepted.append(tuning)
        for change in tuning.changes:
            assert within(on, change) or tuning.undoes

    replayed = bench()
    for tuning in accepted:
        replayed.tuner.commit(tuning, replayed.optimizer, replayed.lr, replayed.step)
    assert replayed.whole() == on.whole()

    saved = json.loads(json.dumps(on.tuner.state_dict()))
    on.tuner.load_state_dict(saved)
    while saved["done"]:
        on.tune("*", undo=1)
        saved = on.tuner.state_dict()
    assert (on.options(), on.rates()) == start


def within(on: Bench, change: Change) -> bool:
    """Whether a change that was accepted keeps the bounds, written out."""
    match change.key:
        case "lr_scale":
            return 0.01 <= change.new <= 10 and 0.0999 <= change.new / change.old <= 10.001
        case "weight_decay":
            return 0 <= change.new <= 0.5
        case "clip_norm":
            return 0.01 <= change.new <= 1000 and 0.0999 <= change.new / change.old <= 10.001
        case "beta1" | "beta2":
            return abs(change.new - change.old) <= 0.1001 and change.new < 1
        case _:
            return change.key == "freeze"


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"lr_factor": 0.5}, "tuning.lr_factor"),
        ({"min_lr": 0.0}, "tuning.min_lr"),
        ({"max_weight_decay": 1.0}, "tuning.max_weight_decay"),
        ({"min_beta1": 0.5, "max_beta1": 0.4}, "tuning.max_beta1"),
        ({"beta_change": 2.0}, "tuning.beta_change"),
        ({"undo_depth": 0}, "tuning.undo_depth"),
        ({"min_clip_norm": -1.0}, "tuning.min_clip_norm"),
    ],
)
def test_impossible_bounds(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        replace(LOOSE, **values)
