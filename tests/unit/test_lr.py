"""The learning-rate controller: schedules, seeds, commands, integrity, resume."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Optimizer

from tolaria.config_tuning import LRConfig
from tolaria.errors import CheckpointMismatch
from tolaria.optim.integrity import LRViolation
from tolaria.optim.lr import HISTORY_LENGTH, VIOLATIONS_TO_OPEN, LRController

POLICIES = ["constant", "linear", "cosine", "step", "wsd"]


def make_optimizer(*names: str) -> Optimizer:
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "name": name, "lr": 123.0} for name in names])


def tensors(optimizer: Optimizer, dtype: torch.dtype = torch.float64) -> None:
    """Give every group its rate as a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=dtype)


def write(group: dict[str, Any], rate: float) -> None:
    """What somebody else does."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def host_only(base_lr: float = 1.0, total_steps: int = 101, **config: Any) -> LRController:
    controller = LRController(LRConfig(**config), base_lr, total_steps)
    controller.add_group("host")
    return controller


def with_seed(born_step: int = 0, **config: Any) -> LRController:
    controller = host_only(**{"policy": "constant", **config})
    controller.add_group("seed/a", "seed", born_step)
    return controller


def rates(controller: LRController, *steps: int, name: str = "host") -> list[float]:
    return [controller.lr_at(name, step) for step in steps]


def scale(controller: LRController, name: str, factor: float, step: int = 0) -> None:
    """What a command that was accepted does."""
    controller.set_scale(name, controller.scale_of(name) * factor, step)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"policy": "constant"}, {0: 1, 50: 1, 100: 1, 500: 1}),
        ({"policy": "linear", "final_ratio": 0.2}, {0: 1, 50: 0.6, 100: 0.2, 500: 0.2}),
        ({"policy": "linear", "final_ratio": 0, "decay_steps": 51}, {0: 1, 25: 0.5, 50: 0, 100: 0}),
        ({"policy": "cosine", "final_ratio": 0.1}, {0: 1, 50: 0.55, 100: 0.1, 500: 0.1}),
        ({"policy": "cosine", "final_ratio": 0}, {25: 0.5 + 0.5 * math.sqrt(0.5), 75: 0.5 - 0.5 * math.sqrt(0.5)}),
        ({"policy": "step", "step_every": 30, "step_factor": 0.5}, {0: 1, 29: 1, 30: 0.5, 60: 0.25, 500: 0.5**16}),
        ({"policy": "wsd", "final_ratio": 0.1, "wsd_decay_share": 0.2}, {0: 1, 80: 1, 90: 0.55, 100: 0.1, 500: 0.1}),
        ({"policy": "wsd", "wsd_decay_share": 0.0}, {0: 1, 100: 1, 500: 1}),
        ({"policy": "wsd", "wsd_decay_share": 1.0, "final_ratio": 0}, {0: 1, 50: 0.5, 100: 0}),
    ],
)
def test_schedules(config: dict[str, Any], expected: dict[int, float]) -> None:
    controller = host_only(base_lr=0.5, **config)
    assert rates(controller, *expected) == pytest.approx([0.5 * share for share in expected.values()], abs=1e-15)


def test_both_ends_are_met_exactly() -> None:
    for policy in ("linear", "cosine", "wsd"):
        assert rates(host_only(policy=policy, final_ratio=0.1), 0, 100, 101) == [1.0, 0.1, 0.1]


@pytest.mark.parametrize("policy", POLICIES)
def test_warm_up_rises_from_above_zero_to_the_peak(policy: str) -> None:
    controller = host_only(policy=policy, warmup_steps=4)
    assert rates(controller, *range(5)) == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_drops_of_the_step_schedule_count_from_the_end_of_the_warm_up() -> None:
    controller = host_only(policy="step", warmup_steps=10, step_every=5, step_factor=0.5)
    assert rates(controller, 10, 14, 15, 20) == [1.0, 1.0, 0.5, 0.25]


@settings(max_examples=200, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    warmup=st.integers(0, 30),
    decay=st.integers(0, 60),
    total=st.integers(1, 60),
    ratio=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_every_schedule_stays_between_its_ends_and_falls_after_the_warm_up(
    policy: Any, warmup: int, decay: int, total: int, ratio: float, share: float
) -> None:
    controller = host_only(
        total_steps=total, policy=policy, warmup_steps=warmup, decay_steps=decay, final_ratio=ratio,
        wsd_decay_share=share, step_every=7,
    )  # fmt: skip
    course = rates(controller, *range(100))
    assert all(0 < lr <= 1 for lr in course[: warmup + 1])
    assert course[: warmup + 1] == sorted(course[: warmup + 1])
    after = course[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
    if policy != "step":
        assert min(after) >= min(1.0, ratio) - 1e-12


def test_seed_warm_up_from_a_hundredth_of_its_rate() -> None:
    controller = with_seed(10, base_lr=2.0, seed_policy="seed_warmup", seed_ratio=0.5, seed_warmup_steps=20)
    assert rates(controller, 0, 10, name="seed/a") == [0.01, 0.01]
    assert rates(controller, 20, name="seed/a") == pytest.approx([0.505])
    assert rates(controller, 30, 1000, name="seed/a") == [1.0, 1.0]


def test_seed_without_warm_up_starts_at_its_rate() -> None:
    assert with_seed(seed_warmup_steps=0, seed_ratio=0.5).lr_at("seed/a", 0) == 0.5


def test_seeds_follow_the_hosts_schedule() -> None:
    controller = with_seed(policy="linear", final_ratio=0, seed_warmup_steps=0, seed_ratio=0.5)
    assert rates(controller, 0, 50, 100, name="seed/a") == [0.5, 0.25, 0.0]


def test_adaptive_seed_rises_with_its_progress() -> None:
    controller = with_seed(seed_policy="morpho_adaptive", seed_ratio=0.9)
    seen = []
    for fraction in (0.0, 0.5, 1.0):
        controller.set_progress("seed/a", fraction)
        seen.append(controller.lr_at("seed/a", 7))
    assert seen == pytest.approx([0.1, 0.5, 0.9])
    assert with_seed(seed_policy="morpho_adaptive", seed_ratio=0.05).lr_at("seed/a", 0) == 0.05
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="seed/a"):
            controller.set_progress("seed/a", fraction)


def test_frozen_seed_has_rate_zero_until_it_follows_the_host() -> None:
    controller = with_seed(seed_policy="frozen")
    assert controller.lr_at("seed/a", 1000) == 0.0
    controller.follow_host("seed/a")
    assert controller.lr_at("seed/a", 1000) == 1.0
    assert (controller.history[-1].cause, controller.history[-1].old_lr, controller.history[-1].new_lr) == (
        "follow_host", 0.0, 1.0,
    )  # fmt: skip


def test_apply_writes_every_group() -> None:
    controller = with_seed(policy="linear", final_ratio=0, seed_ratio=0.5, seed_warmup_steps=0)
    optimizer = make_optimizer("seed/a", "host")
    assert controller.apply(optimizer, 50) == []
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert controller.apply(optimizer, 100) == []
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_a_group_that_was_never_added_is_an_error_and_nothing_is_written() -> None:
    optimizer = make_optimizer("host", "seed/x")
    with pytest.raises(KeyError, match="seed/x"):
        host_only().apply(optimizer, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [123.0, 123.0]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", ["host", "seed/a"])
def test_a_foreign_change_to_any_group_is_found_corrected_and_counted_once(as_tensor: bool, name: str) -> None:
    controller, optimizer = with_seed(seed_warmup_steps=0), make_optimizer("host", "seed/a")
    group = next(group for group in optimizer.param_groups if group["name"] == name)
    if as_tensor:
        tensors(optimizer)
    assert controller.apply(optimizer, 0) == []  # 123.0 was there before the controller
    for step, foreign in enumerate([0.5, 1.0 + 2e-6], start=1):
        write(group, foreign)
        assert controller.apply(optimizer, step) == [LRViolation(step, name, 1.0, foreign)]
        assert float(group["lr"]) == 1.0
        assert (controller.take_found(), controller.take_found()) == (1, 0)
    write(group, math.nan)
    [violation] = controller.apply(optimizer, 3)
    assert math.isnan(violation.found)
    assert controller.apply(optimizer, 4) == []


def test_the_breaker_opens_at_the_third_counted_step_and_closes_by_reset() -> None:
    controller = host_only()
    assert [controller.count_violation() for _ in range(4)] == [False, False, True, False]
    assert VIOLATIONS_TO_OPEN == 3
    assert controller.tampered
    controller.reset_integrity()
    assert not controller.tampered
    assert not controller.count_violation()


def test_what_a_rank_finds_is_not_in_the_state_that_all_ranks_share() -> None:
    controller, optimizer = host_only(policy="constant"), make_optimizer("host")
    controller.apply(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.5
    untouched, other = host_only(policy="constant"), make_optimizer("host")
    for step in (0, 1):
        untouched.apply(other, step)
    assert len(controller.apply(optimizer, 1)) == 1
    assert controller.state_dict() == untouched.state_dict()


def test_rounding_is_no_foreign_change() -> None:
    controller, optimizer = host_only(policy="constant"), make_optimizer("host")
    controller.apply(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 1.0 + 0.9e-6
    assert controller.apply(optimizer, 1) == []
    frozen, optimizer = with_seed(seed_policy="frozen"), make_optimizer("seed/a")
    frozen.apply(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.9e-12
    assert frozen.apply(optimizer, 1) == []
    optimizer.param_groups[0]["lr"] = 1.1e-12
    assert len(frozen.apply(optimizer, 2)) == 1


def test_own_changes_are_no_violations() -> None:
    controller, optimizer = with_seed(policy="cosine"), make_optimizer("host", "seed/a")
    for step in range(5):
        assert controller.apply(optimizer, step) == []
        scale(controller, "host", 0.9, step + 1)
        scale(controller, "seed/a", 0.9, step + 1)
    controller.remove_group("seed/a")
    controller.add_group("seed/a", "seed", 5)
    rebuilt = make_optimizer("host", "seed/a")
    rebuilt.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    assert controller.apply(rebuilt, 5) == []


def test_groups_are_added_once_and_removed_wholly() -> None:
    controller = with_seed()
    scale(controller, "seed/a", 0.5)
    with pytest.raises(ValueError, match="'seed/a' exists"):
        controller.add_group("seed/a", "seed")
    controller.remove_group("seed/a")
    assert controller.groups == ("host",)
    for call in (controller.remove_group, controller.follow_host, lambda n: controller.lr_at(n, 0)):
        with pytest.raises(KeyError, match="seed/a"):
            call("seed/a")
    controller.add_group("seed/a", "seed", 0)
    assert controller.lr_at("seed/a", 1000) == 1.0
    assert [c.cause for c in controller.history] == ["added", "added", "command", "removed", "added"]
    with pytest.raises(ValueError, match="kind"):
        controller.add_group("x", "pilot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="born_step"):
        controller.add_group("x", "seed", -1)


def test_history_keeps_the_last_thousand() -> None:
    controller = host_only(policy="constant")
    for number in range(HISTORY_LENGTH + 5):
        scale(controller, "host", 2.0 if number % 2 else 0.5, number)
    assert HISTORY_LENGTH == len(controller.history) == 1000
    assert controller.history[-1].scale == 0.5
    assert all(change.cause == "command" for change in controller.history)


@pytest.mark.parametrize(("base_lr", "total_steps"), [(0.0, 1), (math.nan, 1), (math.inf, 1), (-1.0, 1), (1.0, 0)])
def test_impossible_arguments(base_lr: float, total_steps: int) -> None:
    with pytest.raises(ValueError, match=r"base_lr|total_steps"):
        LRController(LRConfig(), base_lr, total_steps)


Action = tuple[str, Any]
ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("scale"), st.sampled_from([0.5, 0.9, 1.5])),
    st.tuples(st.just("toggle"), st.sampled_from(["seed/a", "seed/b"])),
    st.tuples(st.just("progress"), st.floats(0, 1)),
    st.tuples(st.just("tamper"), st.floats(2, 3)),
    st.tuples(st.just("freeze"), st.none()),
    st.tuples(st.just("mode"), st.booleans()),
    st.tuples(st.just("rewarm"), st.integers(0, 4)),
)


def toggle(controller: LRController, optimizer: Optimizer, name: str, step: int) -> None:
    """Grow the group, or cull it when it is there."""
    if name in controller.groups:
        controller.remove_group(name)
        optimizer.param_groups = [group for group in optimizer.param_groups if group["name"] != name]
    else:
        controller.add_group(name, "seed", step)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "name": name, "lr": 5.0})


def change_all(controller: LRController, kind: str, value: Any, step: int) -> None:
    """What one action does to every group."""
    if kind == "mode":
        controller.set_conservative(value)
    if kind == "rewarm":
        controller.rewarm(step, value)
    for name in controller.groups:
        if kind == "scale":
            scale(controller, name, value, step)
        if kind == "freeze":
            controller.set_frozen(name, not controller.is_frozen(name), step)
        if kind == "progress" and name != "host":
            controller.set_progress(name, value)


def play(controller: LRController, optimizer: Optimizer, step: int, actions: list[Action]) -> list[list[float]]:
    """Drive controller and optimizer through the actions from ``step``; the rates of every step."""
    course = []
    for kind, value in actions:
        if kind == "step":
            for now in range(step, step + value):
                if controller.apply(optimizer, now):
                    controller.count_violation()
                course.append([float(group["lr"]) for group in optimizer.param_groups])
            step += value
        elif kind == "toggle":
            toggle(controller, optimizer, value, step)
        elif kind == "tamper":
            write(optimizer.param_groups[0], value)
        else:
            change_all(controller, kind, value, step)
    return course


def steps_in(actions: list[Action]) -> int:
    return sum(value for kind, value in actions if kind == "step")


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(POLICIES), st.sampled_from(["seed_warmup", "morpho_adaptive", "frozen"]),
    st.lists(ACTIONS, max_size=12), st.lists(ACTIONS, max_size=12),
)  # fmt: skip
def test_resume_is_bit_equal_to_an_uninterrupted_run(
    policy: Any, seed_policy: Any, first: list[Action], second: list[Action]
) -> None:
    first = [*first, ("step", 1)]  # a foreign change right before the cut is found only where it was made
    config = LRConfig(
        policy=policy, seed_policy=seed_policy, warmup_steps=3, step_every=4, seed_warmup_steps=5,
        conservative_factor=0.5,
    )  # fmt: skip
    controller, optimizer = LRController(config, 0.3, 30), make_optimizer("host")
    controller.add_group("host")
    play(controller, optimizer, 0, first)

    resumed = LRController(config, 0.3, 30)
    resumed.set_conservative(next((value for kind, value in reversed(first) if kind == "mode"), False))
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert resumed.state_dict() == controller.state_dict()
    fresh = make_optimizer(*[group["name"] for group in optimizer.param_groups])
    second = [("step", 1), *second, ("step", 1)]
    expected = play(controller, optimizer, steps_in(first), second)
    assert play(resumed, fresh, steps_in(first), second) == expected
    assert resumed.state_dict() == controller.state_dict()
    assert resumed.tampered == controller.tampered


def test_going_back_to_an_earlier_state_is_no_foreign_change() -> None:
    controller, optimizer = host_only(policy="linear", final_ratio=0), make_optimizer("host")
    controller.apply(optimizer, 0)
    earlier, earlier_lr = controller.state_dict(), optimizer.param_groups[0]["lr"]
    controller.apply(optimizer, 50)
    controller.load_state_dict(earlier)
    optimizer.param_groups[0]["lr"] = earlier_lr
    assert controller.apply(optimizer, 1) == []
    assert controller.state_dict()["violations"] == 0


def test_two_ranks_that_do_the_same_hold_the_same() -> None:
    actions: list[Action] = [
        ("step", 3),
        ("toggle", "seed/a"),
        ("scale", 0.9),
        ("step", 3),
        ("tamper", 2.5),
        ("step", 1),
    ]
    states = []
    for _ in range(2):
        controller, optimizer = host_only(policy="cosine"), make_optimizer("host")
        play(controller, optimizer, 0, actions)
        states.append(controller.state_dict())
    assert states[0] == states[1]
    assert len(states[0]["history"]) == 4
    assert states[0]["violations"] == 1


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "missing": lambda state: state.pop("groups"),
    "field": lambda state: state["groups"]["host"].update(colour=1),
    "type": lambda state: state["groups"]["host"].update(scale="big"),
    "nan": lambda state: state["groups"]["host"].update(scale=math.nan),
    "kind": lambda state: state["groups"]["host"].update(kind="pilot"),
    "born": lambda state: state["groups"]["host"].update(born_step=-1),
    "progress": lambda state: state["groups"]["host"].update(progress=2.0),
    "frozen": lambda state: state["groups"]["host"].update(frozen=1),
    "base": lambda state: state.update(base_lr=0.0),
    "history": lambda state: state["history"].append([1, 2]),
    "list": lambda state: state.update(groups=[]),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_state_is_refused_and_changes_nothing(how: str) -> None:
    controller = with_seed()
    before = controller.state_dict()
    damaged = host_only().state_dict()
    DAMAGE[how](damaged)
    with pytest.raises(CheckpointMismatch):
        controller.load_state_dict(damaged)
    assert controller.state_dict() == before
