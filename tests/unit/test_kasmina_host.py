"""Kasmina: a plan changes nothing, apply does what was planned, restore takes it back, a cull leaves nothing."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from tests.rig import Rig, alone, same_bits, tiny_config, way
from tolaria.config import KasminaConfig, OptimConfig
from tolaria.errors import CheckpointMismatch, CommandRefused, TaskError
from tolaria.kasmina import blueprints
from tolaria.kasmina.blueprints import Blueprint
from tolaria.kasmina.gates import Evidence
from tolaria.kasmina.host import Kasmina
from tolaria.kasmina.lifecycle import HOLDS_SEED, MOVES
from tolaria.kasmina.slot import Active, Blend, Frozen, HostOnly, Slot, StraightThrough
from tolaria.leyline.types import Command, SeedCommand, SeedOp, SeedStage
from tolaria.optim import footprint
from tolaria.optim.footprint import Footprint, bytes_per_parameter
from tolaria.optim.rebuild import build_optimizer
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

S = SeedStage
SHAPE = (4,)
CONFIG = KasminaConfig(
    gradient_window=2, max_seed_parameters=25, max_grown_parameters=35, embargo_boundaries=2, blend_steps=4
)
PASSES = Evidence(
    gradient_norms=[1.0, 1.0], loss_before_graft=1.0, loss_now=1.0, loss_with=0.5, loss_without=1.0, output_ratio=1.0
)
PAIRS = list(itertools.product(SeedStage, SeedOp))


def kasmina(config: KasminaConfig = CONFIG) -> Kasmina:
    """Two empty slots whose host is healthy."""
    slots = {name: Slot(name) for name in ("a", "b")}
    built = Kasmina(slots, dict.fromkeys(slots, SHAPE), config, 7, alone().device, bytes_per_parameter=sixteen)
    built.host_norms.load([1.0, 1.0])
    return built


def sixteen() -> int:
    """Bytes of a parameter with AdamW."""
    return 16


def command(operation: SeedOp, slot: str = "a", **parameters: float) -> Command:
    blueprint = "low_rank" if operation == SeedOp.GERMINATE else ""
    bare = do.seed_command(operation, slot, blueprint=blueprint, parameters=parameters)
    return with_identity(bare, "c1", issued_by="test", issued_at_ns=1)


def carry_out(host: Kasmina, operation: SeedOp, slot: str = "a") -> None:
    host.apply(host.plan(command(operation, slot)))


def no_left_overs(group: str) -> list[str]:
    return []


def at(stage: SeedStage, config: KasminaConfig = CONFIG) -> Kasmina:
    """Slot "a" at a stage, come there as a run would, with evidence that passes every gate."""
    host = kasmina(config)
    forward = [SeedOp.GERMINATE, SeedOp.START_TRAINING, SeedOp.START_GRAFTING, SeedOp.STABILIZE, SeedOp.EVALUATE,
               SeedOp.FOSSILIZE]  # fmt: skip
    ends = (S.CULLED, S.EMBARGOED, S.RESETTING)
    for operation in [SeedOp.GERMINATE, SeedOp.CULL] if stage in ends else forward:
        if host.seeds["a"].stage == stage:
            break
        carry_out(host, operation)
        if operation == SeedOp.CULL:
            break
        host.seeds["a"].evidence = Evidence(**vars(PASSES))
        for _ in range(config.blend_steps):
            host.advance()
    if stage == S.TERMINATED:
        host = kasmina(config)
        host.terminate()
    for _ in range(10):
        if host.seeds["a"].stage == stage:
            return host
        host.tick(no_left_overs)
    raise AssertionError(f"{stage.name} was not reached, but {host.seeds['a'].stage.name}")


def as_json(host: Kasmina) -> Any:
    return json.loads(json.dumps(host.state_dict(), allow_nan=False))


@pytest.mark.parametrize(("stage", "operation"), PAIRS, ids=[f"{s.name}-{o.name}" for s, o in PAIRS])
def test_a_plan_changes_nothing_and_applies_or_is_refused(stage: SeedStage, operation: SeedOp) -> None:
    host = at(stage)
    before, form, stream = as_json(host), host.slots["a"].form, torch.get_rng_state()
    legal = MOVES.get((stage, operation))
    if legal is None:
        with pytest.raises(CommandRefused, match="is not legal") as refused:
            host.plan(command(operation))
        assert refused.value.code == "illegal_transition"
        planned = None
    else:
        planned = host.plan(command(operation))
    assert as_json(host) == before and host.slots["a"].form is form
    assert torch.equal(torch.get_rng_state(), stream)
    if legal is not None and planned is not None:
        other = host.seeds["b"].state_dict()
        host.apply(planned)
        assert host.seeds["a"].stage == legal.to
        assert host.seeds["b"].state_dict() == other


@pytest.mark.parametrize("signal", ["shadow", "straight_through"])
@pytest.mark.parametrize("stage", list(SeedStage))
def test_form_and_gradients_of_each_stage(stage: SeedStage, signal: str) -> None:
    host = at(stage, tiny_config(signal=signal).kasmina)
    seed = host.seeds["a"]
    forms: dict[SeedStage, type[nn.Module]] = {
        S.BLENDING: Blend,
        S.PROBATIONARY: Frozen,
        S.FOSSILIZED: Active,
        **({S.TRAINING: StraightThrough} if signal == "straight_through" else {}),
    }
    assert type(host.slots["a"].form) is forms.get(stage, HostOnly)
    assert (seed.module is not None) == (stage in HOLDS_SEED)
    learning = {S.TRAINING, S.BLENDING, S.FOSSILIZED}
    if seed.module is not None:
        assert {p.requires_grad for p in seed.module.parameters()} == {stage in learning}
    assert (seed in host.learning_seeds()) == (stage in learning)
    assert (seed in host.shadow_seeds()) == (stage == S.TRAINING and signal == "shadow")
    assert set(host.groups()) == ({"seed/a"} if stage in HOLDS_SEED else set())


def test_fine_tuning_lets_a_probationary_seed_learn_once() -> None:
    host = at(S.PROBATIONARY)
    carry_out(host, SeedOp.FINE_TUNE)
    assert type(host.slots["a"].form) is Active
    assert host.learning_seeds() == [host.seeds["a"]]
    with pytest.raises(CommandRefused) as refused:
        host.plan(command(SeedOp.FINE_TUNE))
    assert refused.value.code == "already_fine_tuning"


def test_a_fossil_can_be_frozen() -> None:
    host = at(S.FOSSILIZED, KasminaConfig(gradient_window=2, freeze_fossilized=True))
    assert type(host.slots["a"].form) is Frozen
    assert host.learning_seeds() == []


@pytest.mark.parametrize(
    ("stage", "operation", "evidence", "code"),
    [
        (S.TRAINING, SeedOp.START_GRAFTING, Evidence(gradient_norms=[1.0, math.nan]), "g1_gradient_health"),
        (S.BLENDING, SeedOp.STABILIZE, Evidence(loss_now=math.nan), "g2_stability"),
        (S.SHADOWING, SeedOp.EVALUATE, Evidence(), "g3_interface"),
        (S.PROBATIONARY, SeedOp.FOSSILIZE, Evidence(loss_with=1.0, loss_without=0.5), "g4_system_impact"),
    ],
)
def test_a_gate_that_does_not_open_refuses(stage: SeedStage, operation: SeedOp, evidence: Evidence, code: str) -> None:
    host = at(stage)
    host.seeds["a"].evidence = evidence
    before = as_json(host)
    with pytest.raises(CommandRefused) as refused:
        host.plan(command(operation))
    assert refused.value.code == code
    assert as_json(host) == before
    gate = host.next_gate(host.seeds["a"])
    assert gate is not None and not gate.ok
    assert host.seed_states(lambda group: 0.1)[0].metrics["gate_ok"] == 0.0


def test_training_waits_for_a_healthy_host() -> None:
    host = at(S.GERMINATED)
    host.host_norms.load([1.0, math.inf])
    with pytest.raises(CommandRefused, match="of the host"):
        host.plan(command(SeedOp.START_TRAINING))


def test_the_graft_starts_from_the_loss_of_its_moment_and_the_contribution_is_measured_anew() -> None:
    host = at(S.TRAINING)
    host.seeds["a"].evidence.loss_now = 3.25
    host.apply(host.plan(command(SeedOp.START_GRAFTING, blend_steps=7)))
    seed = host.seeds["a"]
    assert (seed.evidence.loss_before_graft, seed.blend_steps, seed.blend_position) == (3.25, 7, 0)
    host = at(S.SHADOWING)
    carry_out(host, SeedOp.EVALUATE)
    assert math.isnan(host.seeds["a"].evidence.contribution)


@pytest.mark.parametrize("steps", [0.0, 0.5, 1e7, math.nan, math.inf])
def test_a_blend_of_no_length_is_refused(steps: float) -> None:
    with pytest.raises(CommandRefused) as refused:
        at(S.TRAINING).plan(command(SeedOp.START_GRAFTING, blend_steps=steps))
    assert refused.value.code == "bad_parameter"


def test_unknown_graft_parameters_slots_and_payloads_are_refused() -> None:
    cases = [
        (command(SeedOp.START_GRAFTING, speed=2.0), "unknown_parameter"),
        (command(SeedOp.CULL, blend_steps=2.0), "unknown_parameter"),
        (command(SeedOp.GERMINATE, slot="elsewhere"), "unknown_seed"),
        (with_identity(do.scale_lr("host", 0.5), "c1", issued_by="test", issued_at_ns=1), "wrong_payload"),
    ]
    for wrong, code in cases:
        with pytest.raises(CommandRefused) as refused:
            at(S.TRAINING).plan(wrong)
        assert refused.value.code == code


# Budgets


def test_budgets_of_parameters_count_planned_grown_and_new() -> None:
    host = kasmina()
    planned = host.plan(command(SeedOp.GERMINATE))
    assert planned.module is not None
    size = sum(p.numel() for p in planned.module.parameters())
    assert size <= CONFIG.max_seed_parameters < 2 * size
    room = CONFIG.max_grown_parameters - size
    host.plan(command(SeedOp.GERMINATE), already_planned=room)
    with pytest.raises(CommandRefused, match="max_grown_parameters=35") as refused:
        host.plan(command(SeedOp.GERMINATE), already_planned=room + 1)
    assert refused.value.code == "g0_sanity"
    host.apply(planned)
    assert host.grown_parameters == size
    tight = kasmina(KasminaConfig(max_seed_parameters=size - 1))
    with pytest.raises(CommandRefused, match=f"max_seed_parameters={size - 1}"):
        tight.plan(command(SeedOp.GERMINATE))


def test_a_seed_that_no_memory_could_hold_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(shape: tuple[int, ...]) -> nn.Module:
        return nn.Linear(shape[0], 2**40)

    monkeypatch.setitem(blueprints._BLUEPRINTS, "huge", Blueprint("huge", frozenset({1}), build, ""))
    huge = with_identity(do.germinate("a", "huge"), "c1", issued_by="test", issued_at_ns=1)
    with pytest.raises(CommandRefused, match=r"exceed kasmina\.max_seed_parameters=25") as refused:
        kasmina().plan(huge)
    assert refused.value.code == "g0_sanity"


def test_a_blueprint_that_needs_real_tensors_is_judged_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(shape: tuple[int, ...]) -> nn.Module:
        return nn.Linear(shape[0], 4, bias=bool(torch.ones(3).sum().item()))  # no number without storage

    monkeypatch.setitem(blueprints._BLUEPRINTS, "real", Blueprint("real", frozenset({1}), build, ""))
    real = with_identity(do.germinate("a", "real"), "c1", issued_by="test", issued_at_ns=1)
    assert kasmina().plan(real).module is not None
    with pytest.raises(CommandRefused, match=r"20 parameters exceed kasmina\.max_seed_parameters=19"):
        kasmina(KasminaConfig(max_seed_parameters=19)).plan(real)


def test_budgets_of_memory_count_planned_grown_and_new(tmp_path: Path) -> None:
    seed_bytes = 56 * 16  # low_rank over 8 features: itself, its gradient, two moments of AdamW
    limits = {"max_seed_mb": seed_bytes / 2**20, "max_grown_mb": 2 * seed_bytes / 2**20}
    with Rig.build(tmp_path, config=tiny_config(**limits)) as rig:
        rig.train(1)
        assert rig.state.kasmina.budget.left(56)["budget_mb"] == pytest.approx(seed_bytes / 2**20)
        measured = rig.evaluator.signal.measure()["early"]
        assert "cost/low_rank" in measured and "cost/residual_mlp" not in measured
        outcomes = rig.boundary(do.germinate("early", "residual_mlp"), do.germinate("late", "low_rank")).outcomes
        assert {o.applied: o.code for o in outcomes} == {False: "g0_sanity", True: "applied"}
        assert any("kasmina.max_seed_mb=" in o.reason for o in outcomes)
        rig.train(2)
        rig.boundary(do.start_training("late"))
        rig.train(1)
        held = {n: t.numel() * t.element_size() for n, t in rig.state.tensors().items() if "seed/late/" in n}
        counters = sum(size for name, size in held.items() if name.endswith("/step"))
        assert sum(held.values()) - counters + 56 * 4 == seed_bytes  # the gradients are gone after the step


@pytest.mark.parametrize(("name", "momentum", "each"), [("adamw", 0.0, 16), ("sgd", 0.9, 12), ("sgd", 0.0, 8),
                                                        ("rmsprop", 0.0, 12), ("rmsprop", 0.9, 16)])  # fmt: skip
def test_the_optimizer_tells_what_a_parameter_costs(name: Any, momentum: float, each: int) -> None:
    config = OptimConfig(name=name, momentum=momentum)
    parameters = {"w": nn.Parameter(torch.zeros(3))}
    optimizer = build_optimizer(config, {"host": parameters}, torch.device("cpu"))
    assert bytes_per_parameter(optimizer) == each
    assert not optimizer.state


def test_budgets_of_memory_follow_the_optimizer_in_force(tmp_path: Path) -> None:
    config = replace(tiny_config(max_grown_mb=1000 / 2**20), optim=OptimConfig(name="sgd", momentum=0.0, lr=0.02))

    def left(rig: Rig) -> float:
        return 1000 - rig.state.kasmina.budget.left(10)["budget_mb"] * 2**20

    with Rig.build(tmp_path, config=config) as rig, Rig.build(tmp_path, config=config) as other:
        rig.train(1)
        before = rig.state.memento()
        assert left(rig) == pytest.approx(10 * 8)
        assert rig.boundary(do.change_optimizer("adamw", lr=0.01)).outcomes[0].applied
        assert left(rig) == pytest.approx(10 * 16)
        # low_rank has 56 parameters: 448 bytes with SGD, 896 with AdamW, and two of them no longer fit.
        outcomes = rig.boundary(do.germinate("early", "low_rank"), do.germinate("late", "low_rank")).outcomes
        assert [o.code for o in sorted(outcomes, key=lambda o: o.command_id)] == ["applied", "g0_sanity"]
        rig.train(1)
        other.state.load(rig.state.tensors(), rig.state.meta())
        assert left(other) == pytest.approx(10 * 16)
        rig.state.restore(before)
        assert left(rig) == pytest.approx(10 * 8)


def test_what_a_parameter_costs_is_found_once_for_each_class_and_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(name: Any, momentum: float, lr: float) -> Optimizer:
        config, parameters = OptimConfig(name=name, momentum=momentum, lr=lr), {"w": nn.Parameter(torch.zeros(3))}
        return build_optimizer(config, {"host": parameters}, torch.device("cpu"))

    asked: list[Optimizer] = []
    monkeypatch.setattr(footprint, "bytes_per_parameter", lambda o: asked.append(o) or bytes_per_parameter(o))
    kinds = [("sgd", 0.0, 0.1), ("sgd", 0.0, 0.2), ("sgd", 0.9, 0.1), ("adamw", 0.0, 0.1), ("sgd", 0.0, 0.3)]
    optimizers = [built(*kind) for kind in kinds]
    present = iter(optimizers)
    cost = Footprint(lambda: next(present))
    assert [cost() for _ in optimizers] == [8, 8, 12, 16, 8]
    assert asked == [optimizers[0], optimizers[2], optimizers[3]]


def test_an_optimizer_that_needs_a_closure_is_named_at_the_start(tmp_path: Path) -> None:
    config = replace(tiny_config(), optim=OptimConfig(name="torch.optim:LBFGS"))
    told = r"^optim\.name='torch\.optim:LBFGS': a first step\(\), without a closure, raised .*closure"
    with pytest.raises(TaskError, match=told):
        Rig.build(tmp_path, config=config)


def test_a_cull_gives_its_budget_back() -> None:
    host = at(S.GERMINATED, KasminaConfig(max_grown_parameters=35, gradient_window=2))
    with pytest.raises(CommandRefused, match="max_grown_parameters"):
        host.plan(command(SeedOp.GERMINATE, slot="b"))
    carry_out(host, SeedOp.CULL)
    carry_out(host, SeedOp.GERMINATE, slot="b")


# Cull, embargo, reset


@pytest.mark.parametrize("stage", [S.GERMINATED, S.TRAINING, S.BLENDING, S.SHADOWING, S.PROBATIONARY])
@pytest.mark.parametrize("embargo", [0, 1, 3])
def test_a_culled_slot_is_closed_for_its_embargo_then_free(stage: SeedStage, embargo: int) -> None:
    host = at(stage, KasminaConfig(gradient_window=2, blend_steps=4, embargo_boundaries=embargo))
    carry_out(host, SeedOp.CULL)
    seed = host.seeds["a"]
    assert (seed.module, seed.parameter_count, seed.blueprint, seed.alpha.item()) == (None, 0, "", 0.0)
    assert type(host.slots["a"].form) is HostOnly
    stages = []
    while seed.stage != S.DORMANT:
        assert [m for (s, _), m in MOVES.items() if s == seed.stage] == []
        host.tick(no_left_overs)
        stages.append(seed.stage)
    assert stages == [*[S.EMBARGOED] * max(1, embargo), S.RESETTING, S.DORMANT]
    carry_out(host, SeedOp.GERMINATE)
    assert as_json(host)["seeds"]["a"]["evidence"] == as_json(at(S.DORMANT))["seeds"]["a"]["evidence"]


def test_a_cancelled_slot_has_no_embargo() -> None:
    host = at(S.TRAINING)
    carry_out(host, SeedOp.CANCEL)
    assert host.seeds["a"].stage == S.RESETTING
    assert host.tick(no_left_overs) == [("a", S.RESETTING, S.DORMANT)]


def test_gate_g5_holds_a_slot_that_is_not_clean() -> None:
    host = at(S.RESETTING)
    assert host.tick(lambda group: [f"optimizer group of {group}"]) == []
    assert host.seeds["a"].stage == S.RESETTING
    assert host.tick(no_left_overs) == [("a", S.RESETTING, S.DORMANT)]


def test_on_a_whole_rig_nothing_of_a_culled_seed_is_left(tmp_path: Path) -> None:
    with Rig.build(tmp_path) as rig:
        names = set(rig.state.tensors())
        rig.grow("early", S.BLENDING)
        assert rig.state.left_overs("seed/early") == ["optimizer group", "LR group"]
        grown = rig.state.tensors()
        assert any(n.startswith("optim/seed/early/") for n in grown)
        rig.boundary(do.cull("early"))
        assert rig.state.left_overs("seed/early") == []
        assert not any("seed/" in n for n in rig.state.tensors())
        assert names <= set(rig.state.tensors())
        for _ in range(4):
            rig.boundary()
        assert [(before, after) for _, before, after in rig.moved] == [
            (S.CULLED, S.EMBARGOED),
            (S.EMBARGOED, S.RESETTING),
            (S.RESETTING, S.DORMANT),
        ]
        rig.grow("early", S.TRAINING)


# Memento and restore


@pytest.mark.parametrize("operation", list(SeedOp))
def test_restore_takes_back_every_operation(operation: SeedOp) -> None:
    for stage, legal in MOVES:
        if legal != operation:
            continue
        host = at(stage)
        seed = host.seeds["a"]
        before, kept, module, form = as_json(host), host.memento(), seed.module, type(host.slots["a"].form)
        flags = [p.requires_grad for p in module.parameters()] if module is not None else []
        carry_out(host, operation)
        assert as_json(host) != before
        host.restore(kept)
        assert as_json(host) == before
        assert host.seeds["a"].module is module and type(host.slots["a"].form) is form
        assert flags == ([p.requires_grad for p in module.parameters()] if module is not None else [])


# Saving, ending, probing, what the policy sees


@pytest.mark.parametrize("stage", list(SeedStage))
def test_a_saved_structure_is_built_again(stage: SeedStage) -> None:
    host, loaded = at(stage), kasmina()
    saved = as_json(host)
    loaded.load_state_dict(saved)
    assert as_json(loaded) == saved
    assert loaded.structure() == host.structure()
    assert {g: list(p) for g, p in loaded.groups().items()} == {g: list(p) for g, p in host.groups().items()}
    # The alpha of a resumed run is the very number of the run that was interrupted.
    assert same_bits(loaded.seeds["a"].alpha, host.seeds["a"].alpha)


def test_a_saved_structure_of_another_model_is_refused() -> None:
    saved = as_json(at(S.GERMINATED))
    other = Kasmina({"a": Slot("a")}, {"a": SHAPE}, CONFIG, 7, torch.device("cpu"), bytes_per_parameter=sixteen)
    with pytest.raises(CheckpointMismatch, match=r"slots \['a', 'b'\], the model has \['a'\]"):
        other.load_state_dict(saved)
    slots = {name: Slot(name) for name in ("a", "b")}
    wide = Kasmina(slots, {"a": (5,), "b": SHAPE}, CONFIG, 7, torch.device("cpu"), bytes_per_parameter=sixteen)
    with pytest.raises(CheckpointMismatch, match="'a': shape"):
        wide.load_state_dict(saved)
    saved["seeds"]["a"]["blueprint"] = "from_another_task"
    with pytest.raises(CheckpointMismatch, match="from_another_task"):
        kasmina().load_state_dict(saved)


@pytest.mark.parametrize("stage", list(SeedStage))
def test_at_the_end_only_fossils_stay(stage: SeedStage) -> None:
    host = at(stage)
    host.terminate()
    fossil = stage == S.FOSSILIZED
    assert host.seeds["a"].stage == (S.FOSSILIZED if fossil else S.TERMINATED)
    assert (host.seeds["a"].module is not None) == fossil
    assert host.seeds["b"].stage == S.TERMINATED


def test_probing_puts_the_seed_in_and_out_and_back() -> None:
    host = at(S.SHADOWING)
    slot, h = host.slots["a"], torch.randn(3, 4)
    seed = host.seeds["a"].module
    assert seed is not None
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.add_(0.5)
        form = slot.form
        with host.probing("a", active=True) as gauge:
            assert torch.allclose(slot(h), h + seed(h))
            assert gauge is not None and gauge.totals[0] > 0
        with host.probing("a", active=False) as gauge:
            assert same_bits(slot(h), h) and gauge is None
        assert slot.form is form
        with pytest.raises(RuntimeError), host.probing("a", active=True):
            raise RuntimeError("the validation failed")
        assert slot.form is form
    with pytest.raises(ValueError, match="'b' holds no seed"), host.probing("b", active=True):
        pass


def test_the_policy_sees_every_slot() -> None:
    host = at(S.BLENDING)
    seed_state, free = host.seed_states(lambda group: {"seed/a": 0.25}[group])
    assert (seed_state.seed_id, seed_state.stage, seed_state.learning_rate) == ("a", S.BLENDING, 0.25)
    assert seed_state.metrics["parameters"] == host.grown_parameters
    assert (seed_state.metrics["alpha"], seed_state.metrics["gate_ok"]) == (1.0, 1.0)
    assert (free.seed_id, free.stage, dict(free.metrics)) == (
        "b", S.DORMANT, {"boundaries_in_stage": host.seeds["b"].boundaries_in_stage}
    )  # fmt: skip


def test_the_way_of_the_rig_is_the_way_of_the_table() -> None:
    stage = S.DORMANT
    for to, step in way("a", "low_rank"):
        assert isinstance(step.payload, SeedCommand)
        assert MOVES[stage, step.payload.operation].to == to
        stage = to
