"""Optimizers over named groups: build, regroup, save and load by name."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria.config import OptimConfig
from tolaria.errors import CheckpointMismatch
from tolaria.optim.rebuild import (
    Groups,
    OptimizerStateError,
    build_optimizer,
    group_options,
    load_group_options,
    load_state,
    named_parameters,
    regroup,
    state_tensors,
)

CPU = torch.device("cpu")
NAMES = ["adamw", "adam", "sgd", "rmsprop", "adagrad", "nadam"]
FUSED = ("adamw", "adam", "sgd")
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "host": [(3, 2), (3,), ()],
    "seed/a": [(2, 2), (2,)],
    "seed/b": [(4,)],
    "seed/c": [(1, 5), (5,)],
}


def make_groups(*names: str, salt: int = 0) -> dict[str, dict[str, nn.Parameter]]:
    """The same parameters for the same name and salt, whatever the other groups are."""
    groups = {}
    for name in names:
        generator = torch.Generator().manual_seed(salt + sum(map(ord, name)))
        groups[name] = {
            f"{name.replace('/', '.')}.p{i}": nn.Parameter(torch.randn(shape, generator=generator))
            for i, shape in enumerate(SHAPES[name])
        }
    return groups


def set_gradients(groups: Groups, step: int) -> None:
    """Gradients that depend on parameter name and step alone."""
    for members in groups.values():
        for name, parameter in members.items():
            generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(optimizer: Optimizer, groups: Groups, steps: range) -> None:
    for step in steps:
        set_gradients(groups, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Same names, bit-equal values."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def part(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(group.replace("/", "."))}


def parameter_names(groups: Groups, *chosen: str) -> list[str]:
    return [name for group in chosen for name in groups[group]]


@pytest.mark.parametrize("name", NAMES)
def test_build_names_groups_and_is_fused_where_torch_has_it(name: str) -> None:
    groups = make_groups("host", "seed/a")
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.5, weight_decay=0.03), groups, CPU)
    assert [group["name"] for group in optimizer.param_groups] == ["host", "seed/a"]
    assert [group["param_names"] for group in optimizer.param_groups] == [list(m) for m in groups.values()]
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.5, 0.03)
        assert bool(group.get("fused")) is (name in FUSED)
        assert bool(group["foreach"]) is (name not in FUSED)
    assert type(optimizer).__name__.lower() == name


def test_build_takes_every_setting_from_the_configuration() -> None:
    cfg = OptimConfig(name="adamw", beta1=0.8, beta2=0.95, eps=1e-6, momentum=0.7)
    groups = make_groups("host")
    assert build_optimizer(cfg, groups, CPU).param_groups[0]["betas"] == (0.8, 0.95)
    assert build_optimizer(cfg, groups, CPU).param_groups[0]["eps"] == 1e-6
    rmsprop = build_optimizer(OptimConfig(name="rmsprop", beta2=0.95, momentum=0.7), groups, CPU).param_groups[0]
    assert (rmsprop["alpha"], rmsprop["momentum"]) == (0.95, 0.7)
    assert build_optimizer(OptimConfig(name="sgd", momentum=0.7), groups, CPU).param_groups[0]["momentum"] == 0.7


def test_build_falls_back_to_foreach_for_parameters_that_fused_does_not_take() -> None:
    groups = {"host": {"z": nn.Parameter(torch.zeros(2, dtype=torch.complex64))}}
    group = build_optimizer(OptimConfig(), groups, CPU).param_groups[0]
    assert group["foreach"] is True
    assert not group["fused"]


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
def test_sgd_is_not_fused_for_numbers_that_torch_gets_wrong(dtype: torch.dtype, fused: bool) -> None:
    groups = {"host": {"w": nn.Parameter(torch.zeros(64, 64, dtype=dtype))}}
    assert bool(build_optimizer(OptimConfig(name="sgd"), groups, CPU).param_groups[0]["fused"]) is fused


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_group_steps(name: str) -> None:
    groups = {**make_groups("host"), "seed/a": {}}
    optimizer = build_optimizer(OptimConfig(name=name), groups, CPU)
    before = clones(named_parameters(optimizer))
    train(optimizer, groups, range(1))
    after = named_parameters(optimizer)
    assert not any(torch.equal(before[key], after[key]) for key in before)


def test_names_and_parameters_must_be_unique() -> None:
    shared = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="'w' is in the groups 'host' and 'seed/a'"):
        build_optimizer(OptimConfig(), {"host": {"w": shared}, "seed/a": {"w": nn.Parameter(torch.zeros(1))}}, CPU)
    with pytest.raises(ValueError, match="two names: 'w' and 'v'"):
        build_optimizer(OptimConfig(), {"host": {"w": shared}, "seed/a": {"v": shared}}, CPU)
    with pytest.raises(ValueError, match="at least one"):
        build_optimizer(OptimConfig(), {}, CPU)


@st.composite
def histories(draw: st.DrawFn) -> tuple[str, list[list[str]]]:
    """An optimizer name and a sequence of group lists; the host is in all of them, at any place."""
    seeds = ["seed/a", "seed/b", "seed/c"]
    layouts = []
    for _ in range(draw(st.integers(2, 5))):
        chosen = draw(st.lists(st.sampled_from(seeds), unique=True))
        layouts.append(draw(st.permutations(["host", *chosen])))
    return draw(st.sampled_from(NAMES)), layouts


@settings(max_examples=60, deadline=None)
@given(histories())
def test_the_host_never_notices_what_grows_and_dies_beside_it(history: tuple[str, list[list[str]]]) -> None:
    name, layouts = history
    everything = make_groups(*SHAPES)
    current = {group: everything[group] for group in layouts[0]}
    optimizer = build_optimizer(OptimConfig(name=name), current, CPU)
    alone = make_groups("host")
    control = build_optimizer(OptimConfig(name=name), alone, CPU)
    for number, layout in enumerate(layouts):
        following = {group: everything[group] for group in layout}
        gone = parameter_names(current, *(current.keys() - following.keys()))
        before = state_tensors(optimizer)
        snapshot = clones(before)
        rebuilt = regroup(optimizer, following, dropped=gone)
        kept = [key for group in current.keys() & following.keys() for key in part(before, group)]
        after = state_tensors(rebuilt)
        # Adagrad makes its state when it is built, the others with the first step.
        begun = following.keys() - current.keys() if name == "adagrad" else set()
        assert after.keys() == {*kept, *(key for group in begun for key in part(after, group))}
        assert all(part(after, group) for group in begun)
        assert all(after[key] is before[key] for key in kept)
        assert_same(state_tensors(optimizer), snapshot)
        assert [group["name"] for group in rebuilt.param_groups] == layout
        optimizer, current = rebuilt, following
        steps = range(3 * number, 3 * number + 3)
        train(optimizer, current, steps)
        train(control, alone, steps)
    assert_same(part(state_tensors(optimizer), "host"), state_tensors(control))
    assert_same(part(named_parameters(optimizer), "host"), named_parameters(control))


@pytest.mark.parametrize("name", NAMES)
def test_after_regroup_everything_continues_as_if_never_regrouped(name: str) -> None:
    groups, twin = make_groups("host", "seed/a"), make_groups("host", "seed/a")
    optimizer = build_optimizer(OptimConfig(name=name), groups, CPU)
    control = build_optimizer(OptimConfig(name=name), twin, CPU)
    for chunk in range(3):
        steps = range(2 * chunk, 2 * chunk + 2)
        train(optimizer, groups, steps)
        train(control, twin, steps)
        groups = dict(reversed(groups.items()))
        optimizer = regroup(optimizer, groups)
    assert_same(state_tensors(optimizer), state_tensors(control))
    assert_same(named_parameters(optimizer), named_parameters(control))


@pytest.mark.parametrize("name", NAMES)
def test_the_old_optimizer_is_usable_when_the_new_one_is_dropped(name: str) -> None:
    groups, twin = make_groups("host", "seed/a"), make_groups("host", "seed/a")
    optimizer = build_optimizer(OptimConfig(name=name), groups, CPU)
    control = build_optimizer(OptimConfig(name=name), twin, CPU)
    train(optimizer, groups, range(2))
    train(control, twin, range(2))
    regroup(optimizer, {"host": groups["host"]}, dropped=groups["seed/a"])
    train(optimizer, groups, range(2, 4))
    train(control, twin, range(2, 4))
    assert_same(state_tensors(optimizer), state_tensors(control))
    assert_same(named_parameters(optimizer), named_parameters(control))


def test_options_of_kept_groups_stay_and_new_ones_get_the_defaults() -> None:
    groups = make_groups("host", "seed/a")
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=0.1, weight_decay=0.2), {"host": groups["host"]}, CPU)
    optimizer.param_groups[0].update(lr=0.7, weight_decay=0.05, betas=(0.5, 0.6))
    plain = regroup(optimizer, groups)
    host, seed = plain.param_groups
    assert (host["lr"], host["weight_decay"], host["betas"]) == (0.7, 0.05, (0.5, 0.6))
    assert (seed["lr"], seed["weight_decay"], seed["betas"]) == (0.1, 0.2, (0.9, 0.999))
    assert seed["fused"] is True
    assert seed["decoupled_weight_decay"] is True
    other = regroup(optimizer, groups, defaults={"weight_decay": 0.0})
    assert [group["weight_decay"] for group in other.param_groups] == [0.05, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_keeps_its_state_when_it_changes_its_group(name: str) -> None:
    groups = make_groups("host", "seed/a")
    optimizer = build_optimizer(OptimConfig(name=name), groups, CPU)
    train(optimizer, groups, range(2))
    before = state_tensors(optimizer)
    merged = regroup(optimizer, {"host": {**groups["host"], **groups["seed/a"]}})
    after = state_tensors(merged)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_state_follows_the_name_to_another_parameter_object(name: str) -> None:
    groups = make_groups("host")
    optimizer = build_optimizer(OptimConfig(name=name), groups, CPU)
    train(optimizer, groups, range(2))
    before = clones(state_tensors(optimizer))
    copies = {"host": {key: nn.Parameter(p.detach().clone()) for key, p in groups["host"].items()}}
    moved = regroup(optimizer, copies)
    assert_same(state_tensors(moved), before)
    train(optimizer, groups, range(2, 4))
    control = clones(named_parameters(optimizer))
    load_state(moved, before, {})
    train(moved, copies, range(2, 4))
    assert_same(named_parameters(moved), control)


def test_looking_at_an_optimizer_that_never_stepped_leaves_no_trace() -> None:
    groups = make_groups("host")
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    assert state_tensors(optimizer) == {}
    regroup(optimizer, groups)
    assert len(optimizer.state) == 0


def test_losing_state_silently_is_refused() -> None:
    groups = make_groups("host", "seed/a")
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    host_only = {"host": groups["host"]}
    regroup(optimizer, host_only)  # nothing was trained yet, so nothing is lost
    train(optimizer, groups, range(1))
    with pytest.raises(OptimizerStateError, match=r"would be lost.*seed\.a\.p0, seed\.a\.p1"):
        regroup(optimizer, host_only)
    with pytest.raises(OptimizerStateError, match=r"would be lost.*seed\.a\.p1$"):
        regroup(optimizer, host_only, dropped=["seed.a.p0"])
    with pytest.raises(OptimizerStateError, match=r"both dropped and trained: seed\.a\.p0"):
        regroup(optimizer, groups, dropped=["seed.a.p0"])
    smaller = regroup(optimizer, host_only, dropped=["seed.a.p0", "seed.a.p1"])
    assert part(state_tensors(smaller), "seed/a") == {}


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3),
    fill=st.sampled_from([0.0, 0.25]),
)
def test_a_grown_shape_keeps_the_old_block(name: str, sizes: list[tuple[int, int]], fill: float) -> None:
    old_shape, new_shape = [size for size, _ in sizes], [size + more for size, more in sizes]
    small = {"host": {"w": nn.Parameter(torch.randn(old_shape))}}
    optimizer = build_optimizer(OptimConfig(name=name), small, CPU)
    train(optimizer, small, range(2))
    before = clones(state_tensors(optimizer))
    large = {"host": {"w": nn.Parameter(torch.randn(new_shape))}}
    rebuilt = regroup(optimizer, large, fill={"exp_avg_sq": fill, "square_avg": fill})
    for key, tensor in state_tensors(rebuilt).items():
        if tensor.ndim == 0:
            assert torch.equal(tensor, before[key])
            continue
        assert list(tensor.shape) == new_shape
        block = tuple(slice(size) for size in old_shape)
        assert torch.equal(tensor[block], before[key])
        rest = torch.ones(new_shape, dtype=torch.bool)
        rest[block] = False
        assert (tensor[rest] == (fill if key.endswith("_sq") or key == "w/square_avg" else 0.0)).all()
    assert_same(state_tensors(optimizer), before)
    train(rebuilt, large, range(2, 3))


@pytest.mark.parametrize("shape", [(2, 2), (3, 1), (3, 2, 1), (6,), ()])
def test_a_shape_that_did_not_grow_in_place_is_refused(shape: tuple[int, ...]) -> None:
    groups = {"host": {"w": nn.Parameter(torch.randn(3, 2))}}
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    train(optimizer, groups, range(1))
    with pytest.raises(OptimizerStateError, match="w/exp_avg of shape"):
        regroup(optimizer, {"host": {"w": nn.Parameter(torch.randn(shape))}})


def test_a_changed_dtype_is_refused() -> None:
    groups = {"host": {"w": nn.Parameter(torch.randn(3))}}
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    train(optimizer, groups, range(1))
    with pytest.raises(OptimizerStateError, match=r"float32 on cpu to torch\.float64"):
        regroup(optimizer, {"host": {"w": nn.Parameter(torch.randn(3, dtype=torch.float64))}})


def test_a_parameter_that_a_fused_optimizer_can_not_take_is_refused() -> None:
    groups = make_groups("host")
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    with pytest.raises(OptimizerStateError, match="'z'"):
        regroup(optimizer, {**groups, "seed/a": {"z": nn.Parameter(torch.zeros(2, dtype=torch.complex64))}})


def test_step_hooks_survive_and_can_be_removed() -> None:
    groups = make_groups("host")
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    calls: list[int] = []
    handle = optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    rebuilt = regroup(optimizer, groups)
    train(rebuilt, groups, range(1))
    assert calls == [1]
    handle.remove()
    train(rebuilt, groups, range(1))
    assert calls == [1]


class SignMomentum(Optimizer):
    """Somebody's own optimizer: state is tensors by parameter, and a plain number."""

    def __init__(self, params: Any, lr: float, decay: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                state["average"].mul_(group["decay"]).add_(parameter.grad)
                parameter.sub_(group["lr"] * state["average"].sign())


def test_an_optimizer_of_the_users_own_is_regrouped_and_loaded() -> None:
    groups = make_groups("host", "seed/a")
    entries = [{"name": g, "param_names": list(m), "params": list(m.values())} for g, m in groups.items()]
    optimizer = SignMomentum(entries, lr=0.1, decay=0.25)
    train(optimizer, groups, range(2))
    before = clones(state_tensors(optimizer))
    rebuilt = regroup(optimizer, dict(reversed(groups.items())))
    assert type(rebuilt) is SignMomentum
    assert rebuilt.param_groups[0]["decay"] == 0.25
    assert_same(state_tensors(rebuilt), before)
    fresh = SignMomentum(
        [{"name": "host", "param_names": list(groups["host"]), "params": list(groups["host"].values())}], lr=1.0
    )
    load_state(fresh, part(before, "host"), {})
    assert_same(state_tensors(fresh), part(before, "host"))


def test_state_that_is_no_tensor_by_parameter_is_refused() -> None:
    groups = {"host": {"w": nn.Parameter(torch.randn(2))}}
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    optimizer.state[groups["host"]["w"]] = {"past": [1, 2]}
    with pytest.raises(OptimizerStateError, match="w/past is a list"):
        regroup(optimizer, groups)
    with pytest.raises(OptimizerStateError, match="'past' of 'w' is a list"):
        state_tensors(optimizer)


def test_an_optimizer_without_names_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(OptimizerStateError, match="no 'name'"):
        regroup(torch.optim.SGD([parameter], lr=0.1), {"host": {"w": parameter}})
    with pytest.raises(OptimizerStateError, match="does not name its parameters"):
        state_tensors(torch.optim.SGD([{"params": [parameter], "name": "host"}], lr=0.1))


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_continues_as_uninterrupted(name: str) -> None:
    groups, twin = make_groups("host", "seed/a"), make_groups("host", "seed/a", salt=5)
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.01), groups, CPU)
    optimizer.param_groups[1]["lr"] = 0.003
    train(optimizer, {"host": groups["host"]}, range(2))  # the seed has no state yet
    saved = clones(state_tensors(optimizer))
    options = json.loads(json.dumps(group_options(optimizer)))
    with torch.no_grad():
        for key, parameter in named_parameters(optimizer).items():
            named = {n: p for members in twin.values() for n, p in members.items()}
            named[key].copy_(parameter)
    restored = build_optimizer(OptimConfig(name=name, lr=0.5), twin, CPU)
    load_group_options(restored, options)
    load_state(restored, saved, {})
    assert all(restored.state[p] for p in twin["host"].values())
    assert state_tensors(restored).keys() == saved.keys()
    train(optimizer, groups, range(2, 4))
    train(restored, twin, range(2, 4))
    assert_same(state_tensors(restored), state_tensors(optimizer))
    assert_same(named_parameters(restored), named_parameters(optimizer))
    assert group_options(restored) == group_options(optimizer)


def test_loading_copies_and_clears_what_was_there() -> None:
    groups = make_groups("host", "seed/a")
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    train(optimizer, groups, range(1))
    saved = clones(part(state_tensors(optimizer), "host"))
    load_state(optimizer, saved, {})
    assert part(state_tensors(optimizer), "seed/a") == {}
    assert all(tensor is not saved[key] for key, tensor in state_tensors(optimizer).items())


def broken(saved: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    match how:
        case "unknown name":
            saved["host.p9/exp_avg"] = torch.zeros(1)
        case "no key":
            saved["stray"] = torch.zeros(1)
        case "missing key":
            del saved["host.p0/exp_avg"]
        case "further key":
            saved["host.p0/momentum_buffer"] = torch.zeros(3, 2)
        case "shape":
            saved["host.p0/exp_avg"] = torch.zeros(2, 3)
        case "dtype":
            saved["host.p0/exp_avg"] = torch.zeros(3, 2, dtype=torch.float64)
    return saved


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown name", r"not trained here: host\.p9"),
        ("no key", "not trained here"),
        ("missing key", r"'host\.p0' holds \['exp_avg_sq', 'step'\]"),
        ("further key", r"'host\.p0' holds"),
        ("shape", r"float32 \(2, 3\); expected torch\.float32 \(3, 2\)"),
        ("dtype", r"torch\.float64"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(how: str, message: str) -> None:
    groups = make_groups("host")
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    train(optimizer, groups, range(2))
    before = clones(state_tensors(optimizer))
    with pytest.raises(CheckpointMismatch, match=message):
        load_state(optimizer, broken({key: torch.zeros_like(t) for key, t in before.items()}, how), {})
    assert_same(state_tensors(optimizer), before)


def test_options_that_do_not_fit_change_nothing() -> None:
    optimizer = build_optimizer(OptimConfig(), make_groups("host", "seed/a"), CPU)
    before = group_options(optimizer)
    other_names = group_options(build_optimizer(OptimConfig(), make_groups("host", "seed/b"), CPU))
    with pytest.raises(CheckpointMismatch, match="seed/b"):
        load_group_options(optimizer, other_names)
    with pytest.raises(CheckpointMismatch, match="only on one side"):
        load_group_options(optimizer, [{**before[0], "options": {"lr": 9.0}}, {**before[1], "param_names": ["x"]}])
    assert group_options(optimizer) == before


def test_options_that_the_class_does_not_know_go_along_and_are_gone_again_where_none_were_saved() -> None:
    groups = make_groups("host", "seed/a")
    optimizer = build_optimizer(OptimConfig(), groups, CPU)
    without = group_options(optimizer)
    optimizer.param_groups[1]["clip_norm"] = 0.25
    with_it = json.loads(json.dumps(group_options(optimizer)))
    assert with_it[1]["options"]["clip_norm"] == 0.25
    rebuilt = regroup(optimizer, {**make_groups("seed/b"), **groups})
    assert ["clip_norm" in group for group in rebuilt.param_groups] == [False, False, True]
    load_group_options(optimizer, without)
    assert group_options(optimizer) == without
    load_group_options(optimizer, with_it)
    assert optimizer.param_groups[1]["clip_norm"] == 0.25
    assert "clip_norm" not in optimizer.param_groups[0]


def test_saved_options_say_nothing_about_the_machine() -> None:
    for entry in group_options(build_optimizer(OptimConfig(), make_groups("host"), CPU)):
        assert not {"fused", "foreach", "capturable"} & entry["options"].keys()
        assert {"lr", "weight_decay", "betas"} <= entry["options"].keys()
