"""A seed in TRAINING learns, and the host does not notice: bit for bit the same with it, with another, without one."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.isolation import Leaky, Trace, differences, trace
from tests.rig import Rig, same_bits, tiny_config
from tolaria.kasmina import blueprints
from tolaria.kasmina.blueprints import Blueprint
from tolaria.kasmina.seed import Seed
from tolaria.leyline.types import SeedStage
from tolaria.tamiyo import policy as do

STEPS = 4
SIGNALS = ("shadow", "straight_through")
Change = Callable[[Rig], None]


def run(
    folder: Path, signal: str, change: Change | None, *, accumulation: int = 1, blueprint: str = "residual_mlp"
) -> list[Trace]:
    """The host's traces after a seed entered TRAINING and ``change`` was made to it; None: without any seed."""
    config = tiny_config(signal=signal, accumulation=accumulation)
    folder.mkdir(exist_ok=True)
    with Rig.build(folder, config=config, dropout=0.3, batch_norm=True) as rig:
        rig.train(2)
        for command in (do.germinate("early", blueprint), do.start_training("early")):
            applied = rig.boundary(*([command] if change is not None else []))
            assert all(outcome.applied for outcome in applied.outcomes), applied.outcomes
            rig.train(1)
        if change is not None:
            assert rig.state.kasmina.seeds["early"].stage == SeedStage.TRAINING
            change(rig)
        return trace(rig, STEPS)


def seed_of(rig: Rig) -> tuple[Seed, nn.Module]:
    """The seed in the slot "early" and its module."""
    seed = rig.state.kasmina.seeds["early"]
    assert seed.module is not None
    return seed, seed.module


def as_built(rig: Rig) -> None:
    """Leave the seed as it is."""


def other_weights(rig: Rig) -> None:
    """Give the seed large random weights, from a generator of its own."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in seed_of(rig)[1].parameters():
            parameter.normal_(std=3.0, generator=generator)


def broken(rig: Rig) -> None:
    """Let the seed compute nothing but NaN."""
    with torch.no_grad():
        for parameter in seed_of(rig)[1].parameters():
            parameter.fill_(math.nan)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    """The traces of the run that has no seed."""
    return run(tmp_path_factory.mktemp("without"), "shadow", None)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("change", [as_built, other_weights, broken])
def test_the_host_runs_as_without_a_seed(tmp_path: Path, without: list[Trace], signal: str, change: Change) -> None:
    assert differences(run(tmp_path, signal, change), without) == []


@pytest.mark.parametrize("signal", SIGNALS)
def test_also_over_several_microbatches(tmp_path: Path, signal: str) -> None:
    alone = run(tmp_path / "alone", signal, None, accumulation=3)
    assert differences(run(tmp_path / "grown", signal, other_weights, accumulation=3), alone) == []


@pytest.mark.usefixtures("noisy_blueprint")
def test_a_seed_with_dropout_draws_apart_from_the_host_or_is_refused(tmp_path: Path, without: list[Trace]) -> None:
    assert differences(run(tmp_path, "shadow", as_built, blueprint="noisy"), without) == []
    with Rig.build(tmp_path, config=tiny_config(signal="straight_through")) as rig:
        outcome = rig.boundary(do.germinate("early", "noisy")).outcomes[0]
        assert (outcome.applied, outcome.code) == (False, "random_stream")


@pytest.fixture
def noisy_blueprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blueprint "noisy" with dropout inside."""

    def build(shape: tuple[int, ...]) -> nn.Module:
        return nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Dropout(0.5))

    monkeypatch.setitem(blueprints._BLUEPRINTS, "noisy", Blueprint("noisy", frozenset({1}), build, ""))


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_broken_seeds_gradient_is_dropped_and_told(tmp_path: Path, signal: str) -> None:
    with Rig.build(tmp_path, config=tiny_config(signal=signal)) as rig:
        rig.grow("early", SeedStage.TRAINING)
        broken(rig)
        moments = {p: {k: v.clone() for k, v in s.items()} for p, s in rig.state.optimizer.state.items()}
        rig.train(2)
        dropped = [e for e in rig.told("seed_gradient_not_finite") if e["seed"] == "early"]
        assert len(dropped) == 2
        assert rig.state.skipped_steps == 0
        _, module = seed_of(rig)
        for parameter in module.parameters():
            assert all(same_bits(v, moments[parameter][k]) for k, v in rig.state.optimizer.state[parameter].items())
        applied = rig.boundary(do.start_grafting("early"))
        assert applied.outcomes[0].code == "g1_gradient_health"


@pytest.mark.parametrize("signal", SIGNALS)
def test_meanwhile_the_seed_learns(tmp_path: Path, signal: str) -> None:
    with Rig.build(tmp_path, config=tiny_config(signal=signal)) as rig:
        rig.grow("early", SeedStage.TRAINING)
        _, module = seed_of(rig)
        before = [p.detach().clone() for p in module.parameters()]
        rig.train(3)
        changed = [not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)]
        assert all(changed)


# Positive controls: what leaks is found by the same comparison


def leaky_form(rig: Rig) -> None:
    """Put the leaky form into the seed's slot."""
    other_weights(rig)
    rig.state.kasmina.slots["early"].form = Leaky(seed_of(rig)[1])


def leaky_form_with_nan(rig: Rig) -> None:
    """Put the leaky form around a seed that computes NaN."""
    leaky_form(rig)
    broken(rig)


def leaky_output(rig: Rig) -> None:
    """Let the seed act on the host's output a little."""
    _, module = seed_of(rig)
    slot = rig.state.kasmina.slots["early"]
    slot.form = nn.Sequential(slot.form, Nudge(module))
    other_weights(rig)


class Nudge(nn.Module):
    """h + f(h) / 1000, without a gradient."""

    def __init__(self, seed: nn.Module) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, h: Tensor) -> Tensor:
        """(batch, ...) -> the same."""
        with torch.no_grad():
            f: Tensor = self.seed(h)
        return h + 1e-3 * f


def attached_twin(rig: Rig) -> None:
    """Replace the shadow twin by one whose parameters are the host's own, not detached."""
    (seed, twin) = rig.replica.shadows[0]
    shared: dict[int, object] = {id(p): p for p in rig.state.objective.parameters()}
    leaking = copy.deepcopy(rig.state.objective, shared)
    for slot, own in zip(leaking.slots, twin.slots, strict=True):
        slot.form = own.form
    rig.replica.shadows[0] = (seed, leaking)


def drawing_shadow(rig: Rig) -> None:
    """Let the shadow's dropout draw from the host's random stream."""
    replica = rig.replica
    kept = replica.shadow_backward

    def backward(batch: object) -> None:
        kept(batch)  # type: ignore[arg-type]
        torch.rand(1)

    replica.shadow_backward = backward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("signal", "leak", "found"),
    [
        ("straight_through", leaky_form, "gradient"),
        ("straight_through", leaky_form_with_nan, "logits"),
        ("straight_through", leaky_output, "logits"),
        ("shadow", attached_twin, "gradient"),
        ("shadow", drawing_shadow, "random"),
    ],
)
def test_a_leak_is_found(tmp_path: Path, without: list[Trace], signal: str, leak: Change, found: str) -> None:
    first = differences(run(tmp_path, signal, leak)[:1], without[:1])
    assert any(found in difference for difference in first), first
