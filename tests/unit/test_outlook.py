"""What a policy chooses by: a measured gradient is the one that a seed gets, and measuring leaves no trace."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.rig import Rig, make_task, same_bits, tiny_config
from tolaria import outlook
from tolaria.config import Config, PrecisionConfig
from tolaria.config_aggregate import AggregateConfig
from tolaria.errors import ConfigError
from tolaria.kasmina import blueprints
from tolaria.kasmina.blueprints import Blueprint
from tolaria.kasmina.candidates import newborn
from tolaria.kasmina.shadow import make_twin
from tolaria.leyline.types import SeedStage
from tolaria.mode import Mode
from tolaria.objective import Objective
from tolaria.streams import rng_tensors
from tolaria.task import Task

BLUEPRINTS = ("identity", "low_rank", "residual_mlp")
SLOTS = ("early", "late")


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprints, "_BLUEPRINTS", dict(blueprints._BLUEPRINTS))


def register(name: str, build: Callable[[tuple[int, ...]], nn.Module]) -> None:
    blueprints._BLUEPRINTS[name] = Blueprint(name, frozenset({1}), build, "")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig.build(tmp_path, dropout=0.3, batch_norm=True) as built:
        built.train(5)
        yield built


def shadow_gradient(rig: Rig, slot: str, blueprint: str) -> float:
    """The size of the gradient that a TRAINING seed's shadow gives on the boundary's batch."""
    seed = rig.state.kasmina.seeds[slot]
    seed.module = newborn(blueprint, seed.shape, run_seed=rig.config.run.seed, device=torch.device("cpu"))
    twin = make_twin(rig.state.objective, "slots", seed, "residual")
    batch = rig.evaluator.signal.batch()
    with torch.random.fork_rng(devices=[]):
        twin(batch.inputs, batch.targets, batch.weights).sum().backward()
    squares = sum(float(p.grad.double().square().sum()) for p in seed.module.parameters() if p.grad is not None)
    seed.module = None
    return math.sqrt(squares)


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("blueprint", BLUEPRINTS)
def test_the_signal_is_the_gradient_of_a_seed_that_is_there(rig: Rig, slot: str, blueprint: str) -> None:
    measured = rig.evaluator.signal.measure()[slot]
    assert measured[f"signal/{blueprint}"] > 0
    assert measured[f"signal/{blueprint}"] == pytest.approx(shadow_gradient(rig, slot, blueprint), rel=1e-6)


@pytest.mark.parametrize("blueprint", BLUEPRINTS)
def test_also_beside_a_seed_that_is_at_work(tmp_path: Path, blueprint: str) -> None:
    with Rig.build(tmp_path) as rig:
        rig.grow("early", SeedStage.BLENDING)
        measured = rig.evaluator.signal.measure()
        assert set(measured) == {"late"}
        assert measured["late"][f"signal/{blueprint}"] == pytest.approx(
            shadow_gradient(rig, "late", blueprint), rel=1e-6
        )


@pytest.mark.parametrize("blueprint", BLUEPRINTS)
def test_in_low_precision_it_is_what_the_seed_gets_there(tmp_path: Path, blueprint: str) -> None:
    config = replace(tiny_config(), precision=PrecisionConfig(amp="bf16"))
    with Rig.build(tmp_path, config=config) as rig:
        rig.train(2)
        measured = rig.evaluator.signal.measure()["early"]
        with rig.replica.autocast():
            expected = shadow_gradient(rig, "early", blueprint)
        assert measured[f"signal/{blueprint}"] == pytest.approx(expected, rel=1e-2)  # sums in another order, 8 bits
        assert expected != pytest.approx(shadow_gradient(rig, "early", blueprint), rel=1e-6)


@pytest.mark.parametrize("mode", ["weighted", "pcgrad"])
@pytest.mark.parametrize("at_work", [False, True])
def test_also_where_the_gradients_of_seeds_are_aggregated(tmp_path: Path, mode: Any, at_work: bool) -> None:
    config = replace(
        tiny_config(freeze_fossilized=False), aggregate=AggregateConfig(mode=mode, attribution="kasmina")
    )  # fmt: skip
    with Rig.build(tmp_path, config=config) as rig:
        if at_work:
            rig.grow("late", SeedStage.FOSSILIZED, "residual_mlp")
        seam = rig.state.kasmina.seam
        assert (seam is not None) == (mode == "weighted")
        if seam is not None:
            seam.fill_(1e-38)  # what a microbatch left behind; divided by it, a gradient is not finite
        measured = rig.evaluator.signal.measure()
        assert rig.told("signal_failed") == []
        assert set(measured) == ({"early"} if at_work else set(SLOTS))
        for slot, blueprint in ((s, b) for s in measured for b in BLUEPRINTS):
            expected = shadow_gradient(rig, slot, blueprint)
            assert measured[slot][f"signal/{blueprint}"] == pytest.approx(expected, rel=1e-6)
        assert seam is None or bool((seam == 1e-38).all())


def test_the_loss_scale_of_float16_is_not_in_the_signal(rig: Rig) -> None:
    plain = rig.evaluator.signal.measure()
    rig.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    assert rig.state.scaler.get_scale() == 2.0**14
    scaled = rig.evaluator.signal.measure()
    for slot, metrics in plain.items():
        assert scaled[slot] == pytest.approx(metrics, rel=1e-6)


class Reused(nn.Module):
    """Sends the batch through one slot twice, and works in place on what comes out."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        h = self.host.early(torch.tanh(self.host.inlet(x)))  # type: ignore[operator]
        h = functional.relu(h, inplace=True)
        logits: Tensor = self.host.head(functional.relu(self.host.early(self.host.middle(h)), inplace=True))  # type: ignore[operator]
        return logits


def make_reused() -> Task:
    task = make_task()
    return Task(**{**vars(task), "model": Reused(task.model), "slots": {}})


@pytest.mark.parametrize("blueprint", BLUEPRINTS)
def test_a_slot_that_is_passed_twice_and_worked_on_in_place(tmp_path: Path, blueprint: str) -> None:
    with Rig.build(tmp_path, make=make_reused) as rig:
        measured = rig.evaluator.signal.measure()["early"]
        assert measured[f"signal/{blueprint}"] == pytest.approx(shadow_gradient(rig, "early", blueprint), rel=1e-6)


class Checkpointed(nn.Module):
    """Keeps no activations: what passes through the slots passes through them again in the backward pass."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.host, x, use_reentrant=False)  # type: ignore[no-any-return]


def make_checkpointed() -> Task:
    task = make_task()
    return Task(**{**vars(task), "model": Checkpointed(task.model), "slots": {"late": "host.middle"}})


def test_activation_checkpointing_changes_no_signal(tmp_path: Path) -> None:
    measured = []
    for make in (make_task, make_checkpointed):
        with Rig.build(tmp_path, make=make) as rig:
            measured.append(rig.evaluator.signal.measure())
            assert rig.told("signal_failed") == []
    assert set(measured[0]) == set(SLOTS)
    assert measured[0] == measured[1]


def test_costs_are_those_of_the_blueprint(rig: Rig) -> None:
    measured = rig.evaluator.signal.measure()["early"]
    assert measured["cost/low_rank"] == 8 + 8 + 8 * 2 + 2 * 8 + 8
    assert measured["flops/low_rank"] == 2 * (8 * 2 + 2 * 8)
    assert (measured["cost/identity"], measured["flops/identity"]) == (8, 0)
    assert not any("conv" in name or "attention" in name for name in measured)  # they take other shapes


def test_measuring_leaves_no_trace(rig: Rig) -> None:
    digest, streams = rig.state.digest(), rng_tensors(torch.device("cpu"))
    forms = {name: slot.form for name, slot in rig.state.kasmina.slots.items()}
    assert rig.evaluator.signal.measure()
    assert rig.evaluator.cost.flops()
    assert rig.state.digest() == digest
    assert all(same_bits(now, streams[n]) for n, now in rng_tensors(torch.device("cpu")).items())
    assert all(p.grad is None for p in rig.state.objective.parameters())
    assert all(slot.form is forms[name] for name, slot in rig.state.kasmina.slots.items())


def test_a_run_that_measures_trains_as_one_that_does_not(tmp_path: Path) -> None:
    digests = []
    for measures in (False, True):
        folder = tmp_path / str(measures)
        folder.mkdir()
        with Rig.build(folder, config=tiny_config(measure_signal=measures), dropout=0.3, batch_norm=True) as rig:
            rig.train(3)
            rig.boundary()
            rig.train(3)
            digests.append(rig.state.digest())
    assert digests[0] == digests[1]


def test_every_boundary_draws_another_batch_and_the_same_again(rig: Rig) -> None:
    first = rig.evaluator.signal.batch().inputs
    assert torch.equal(first, rig.evaluator.signal.batch().inputs)
    rig.state.boundary += 1
    assert not torch.equal(first, rig.evaluator.signal.batch().inputs)


@pytest.mark.parametrize(
    ("config", "slots", "names"),
    [
        (tiny_config(measure_signal=False), set(), set()),
        (tiny_config(candidates="low_rank, conv_residual"), set(SLOTS), {"low_rank"}),
        (tiny_config(max_seed_parameters=70), set(SLOTS), {"identity", "low_rank"}),
        (tiny_config(max_grown_parameters=8), set(SLOTS), {"identity"}),
        (tiny_config(max_grown_parameters=7), set(), set()),
    ],
)
def test_only_what_could_be_germinated_is_measured(
    tmp_path: Path, config: Config, slots: set[str], names: set[str]
) -> None:
    with Rig.build(tmp_path, config=config) as rig:
        measured = rig.evaluator.signal.measure()
        assert set(measured) == slots
        assert {name for metrics in measured.values() for name in metrics} == {
            f"{kind}/{name}" for kind in ("signal", "cost", "flops") for name in names
        }
        assert rig.told("signal_failed") == []


def test_a_conservative_run_measures_nothing(rig: Rig) -> None:
    rig.state.mode = Mode(conservative=True)
    assert rig.evaluator.signal.measure() == {}


class Fails(nn.Linear):
    """Runs on two samples, as when it is built, and on no more."""

    def forward(self, h: Tensor) -> Tensor:
        if len(h) > 2:
            raise RuntimeError("too many samples")
        return super().forward(h)


class Counts(nn.Linear):
    """Has a buffer that a pass moves, and draws random numbers."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape[-1], shape[-1])
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(functional.dropout(h))


def test_blueprints_of_ones_own_are_measured_and_one_that_fails_is_left_out(rig: Rig) -> None:
    register("fails", lambda shape: Fails(shape[-1], shape[-1]))
    register("broken", lambda shape: nn.Linear(1, 1 // 0))
    register("counts", Counts)
    register("huge", lambda shape: nn.Linear(shape[-1], 2**40))  # no machine could hold it
    streams = rng_tensors(torch.device("cpu"))
    measured = rig.evaluator.signal.measure()["early"]
    assert measured["signal/counts"] > 0
    assert measured["cost/fails"] == 72 and "signal/fails" not in measured
    assert not any(name.endswith(("broken", "huge")) for name in measured)
    assert all(same_bits(now, streams[n]) for n, now in rng_tensors(torch.device("cpu")).items())


class Remembers(nn.Linear):
    """Its output depends on how often it has run."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape[-1], shape[-1])
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.runs += 1
        return self.runs * super().forward(h)


def test_a_newborn_is_built_once_for_all_slots_of_a_shape_and_is_new_in_each(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("remembers", Remembers)
    rig.evaluator.signal.measure()  # what a blueprint costs is found once in a run
    built: list[str] = []
    monkeypatch.setattr(outlook, "newborn", lambda name, *a, **k: built.append(name) or newborn(name, *a, **k))
    measured = rig.evaluator.signal.measure()
    names = [name.removeprefix("signal/") for name in measured["early"] if name.startswith("signal/")]
    assert sorted(built) == sorted(names) == sorted((*BLUEPRINTS, "remembers"))
    for slot in SLOTS:
        expected = shadow_gradient(rig, slot, "remembers")
        assert measured[slot]["signal/remembers"] == pytest.approx(expected, rel=1e-6)


def test_where_more_blueprints_fit_than_can_be_told_the_built_in_ones_stay(rig: Rig) -> None:
    own = [f"{letter}-own" for letter in "abcdefghiz"]
    for name in own:
        register(name, lambda shape: nn.Linear(shape[-1], shape[-1]))

    def told() -> set[str]:
        return {name.removeprefix("cost/") for name in rig.evaluator.signal.measure()["early"] if "cost/" in name}

    assert told() == {*BLUEPRINTS, *own[:5]}
    rig.replica.config = replace(rig.config, kasmina=replace(rig.config.kasmina, candidates="z-own, low_rank"))
    assert told() == {"z-own", "low_rank"}


def test_a_pass_that_fails_is_told_and_the_run_goes_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    forms = {name: slot.form for name, slot in rig.state.kasmina.slots.items()}
    monkeypatch.setattr(Objective, "forward", fail)
    assert rig.evaluator.signal.measure() == {}
    (told,) = rig.told("signal_failed")
    assert "no room" in told["reason"]
    assert all(slot.form is forms[name] for name, slot in rig.state.kasmina.slots.items())


def test_the_forward_cost_is_that_of_host_and_acting_seeds(rig: Rig) -> None:
    host = 2 * (5 * 8 + 8 * 8 + 8 * 3)
    assert rig.evaluator.cost.flops() == host
    rig.grow("early", SeedStage.TRAINING)
    assert rig.evaluator.cost.flops() == host
    rig.boundary()
    with Rig.build(rig.events_path.parent) as other:
        other.grow("early", SeedStage.BLENDING)
        assert other.evaluator.cost.flops() == host + 2 * (8 * 2 + 2 * 8)


@pytest.mark.parametrize(
    ("candidates", "told"),
    [("low_rank,nonsense", "unknown nonsense; known are bottleneck_attention"), ("low_rank," * 9, "9 names")],
)
def test_wrong_candidates_are_told_before_training_starts(tmp_path: Path, candidates: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"kasmina\.candidates='low_rank,.*{told}.*at most 8"):
        Rig.build(tmp_path, config=tiny_config(candidates=candidates))
