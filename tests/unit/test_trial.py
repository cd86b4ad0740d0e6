"""What is tried before it trains: on a whole batch at the start, later on one sample where that tells enough."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.rig import Rig, tiny_config, way
from tolaria.kasmina import blueprints
from tolaria.kasmina.blueprints import Blueprint
from tolaria.leyline.types import Command, SeedStage
from tolaria.objective import Batch
from tolaria.streams import rng_tensors
from tolaria.tamiyo import policy as do

BATCH = 4


class Unlearnable(nn.Module):
    """A seed of which no gradient reaches the inner layer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, features)
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        return self.inner(h).detach() + h * self.scale


class Cut(nn.Module):
    """A seed that learns, but passes no gradient on to what comes before it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, features)

    def forward(self, h: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        out: Tensor = self.inner(h.detach())
        return out


@pytest.fixture(autouse=True)
def odd_blueprints(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, Callable[[int], nn.Module]] = {"unlearnable": Unlearnable, "cut": Cut}
    for name, make in kinds.items():
        built = Blueprint(name, frozenset({1}), lambda shape, make=make: make(shape[0]), "")
        monkeypatch.setitem(blueprints._BLUEPRINTS, name, built)


class Asked:
    """The sizes of the batches that trials asked a rig for."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self._sample = rig.sample
        monkeypatch.setattr(rig, "sample", self)

    def __call__(self, batch_size: int) -> Batch:
        self.sizes.append(batch_size)
        return self._sample(batch_size)

    def during(self, action: Callable[..., object], *arguments: object) -> list[int]:
        """What one action asked for."""
        self.sizes = []
        action(*arguments)
        return self.sizes


def command(rig: Rig, step: Command) -> None:
    outcome = rig.boundary(step).outcomes[0]
    assert outcome.applied, outcome
    rig.train(3)


@pytest.mark.parametrize("blend", ["residual", "convex"])
def test_after_the_start_one_sample_is_enough_and_only_where_something_is_new(
    blend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig.build(tmp_path, config=tiny_config(blend=blend)) as rig:
        asked = Asked(rig, monkeypatch)
        assert asked.during(rig.replica.warm_up, asked) == [BATCH]
        assert asked.during(rig.replica.warm_up, asked) == []
        rig.train(3)
        wanted = {
            "GERMINATED": [], "TRAINING": [1], "BLENDING": [1], "SHADOWING": [], "PROBATIONARY": [1], "FOSSILIZED": [1]
        }  # fmt: skip
        steps = {stage.name: step for stage, step in way("early", "low_rank")}
        assert {name: asked.during(command, rig, steps[name]) for name in wanted} == wanted


def test_where_the_model_needs_more_than_one_sample_it_gets_a_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig.build(tmp_path, batch_norm=True) as rig:
        asked = Asked(rig, monkeypatch)
        rig.replica.warm_up(asked)
        rig.train(3)
        command(rig, do.germinate("early", "low_rank"))
        assert asked.during(command, rig, do.start_training("early")) == [1, BATCH]


def test_a_trial_leaves_no_trace(tmp_path: Path) -> None:
    # With one batch normalisation the whole batch is tried after the one sample has failed halfway.
    for number, task in enumerate(({"dropout": 0.3}, {"dropout": 0.3, "batch_norm": True})):
        (tmp_path / str(number)).mkdir()
        with Rig.build(tmp_path / str(number), **task) as rig:
            rig.replica.warm_up(rig.sample)
            rig.grow("early", SeedStage.TRAINING)
            rig.replica._warm = {part for part in rig.replica._warm if part[0] != "shadow"}
            before, streams = rig.state.digest(), rng_tensors(rig.world.device)
            rig.replica.warm_up(rig.sample)
            assert rig.state.digest() == before
            after = rng_tensors(rig.world.device)
            assert all(torch.equal(streams[name], after[name]) for name in streams)
            seed = rig.state.kasmina.seeds["early"].named_parameters()
            assert all(p.grad is None for p in (*rig.state.host_parameters.values(), *seed.values()))


def test_a_seed_that_gets_no_gradient_is_refused_by_name(tmp_path: Path) -> None:
    with Rig.build(tmp_path) as rig:
        rig.replica.warm_up(rig.sample)
        rig.train(3)
        command(rig, do.germinate("early", "unlearnable"))
        outcome = rig.boundary(do.start_training("early")).outcomes[0]
        assert (outcome.applied, outcome.code) == (False, "warm_up")
        assert "seed/early/inner.weight" in outcome.reason
        assert rig.state.kasmina.seeds["early"].stage == SeedStage.GERMINATED
        rig.train(2)


def test_a_seed_that_cuts_off_the_host_before_it_is_refused(tmp_path: Path) -> None:
    with Rig.build(tmp_path, config=tiny_config(blend="convex")) as rig:
        rig.replica.warm_up(rig.sample)
        rig.grow("early", SeedStage.SHADOWING, "cut")
        outcome = rig.boundary(do.evaluate("early")).outcomes[0]
        assert (outcome.applied, outcome.code) == (False, "warm_up")
        assert "model.inlet.weight" in outcome.reason
