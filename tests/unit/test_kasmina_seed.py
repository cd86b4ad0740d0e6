"""A seed saved, loaded, kept and taken back: nothing is rounded, nothing is lost, NaN included."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.rig import Rig, same_bits
from tolaria.kasmina.gates import Evidence
from tolaria.kasmina.lifecycle import HOLDS_SEED, alpha_at
from tolaria.kasmina.seed import NormRing, Seed
from tolaria.leyline.types import SeedStage

numbers = st.floats(width=32)  # NaN and infinities too
exact_numbers = st.floats()


def new_seed(window: int = 3) -> Seed:
    return Seed(slot="early", shape=(4,), alpha=torch.zeros(()), norms=NormRing(window))


def as_json(seed: Seed) -> Any:
    """What a checkpoint keeps of a seed, through JSON that knows no NaN."""
    return json.loads(json.dumps(seed.state_dict(), allow_nan=False))


@st.composite
def evidences(draw: st.DrawFn) -> Evidence:
    return Evidence(
        gradient_norms=draw(st.lists(exact_numbers, max_size=4)),
        loss_before_graft=draw(exact_numbers),
        loss_now=draw(exact_numbers),
        loss_with=draw(exact_numbers),
        loss_without=draw(exact_numbers),
        output_ratio=draw(exact_numbers),
        non_finite_outputs=draw(st.integers(0, 2**40)),
        shape_mismatch=draw(st.text(max_size=20)),
    )


@settings(deadline=None, max_examples=60)
@given(
    evidence=evidences(),
    norms=st.lists(numbers, max_size=7),
    stage=st.sampled_from(list(SeedStage)),
    position=st.integers(0, 60),
    counts=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    fine_tuning=st.booleans(),
)
def test_what_is_saved_is_loaded_bit_for_bit(
    evidence: Evidence,
    norms: list[float],
    stage: SeedStage,
    position: int,
    counts: tuple[int, int],
    fine_tuning: bool,
) -> None:
    seed = new_seed()
    seed.stage, seed.blueprint, seed.command_id, seed.schedule = stage, "low_rank", "c1", "cosine"
    seed.blend_steps, seed.blend_position = 50, position
    seed.boundaries_in_stage, seed.age_boundaries = counts
    seed.fine_tuning, seed.evidence = fine_tuning, evidence
    seed.norms.load(norms)
    saved = as_json(seed)

    loaded = new_seed()
    loaded.load_state_dict(saved)
    assert as_json(loaded) == saved
    # repr tells NaN from numbers and -0.0 from 0.0, and is exact for floats.
    assert repr(loaded.evidence) == repr(evidence)
    assert repr(loaded.norms.read()) == repr(seed.norms.read())
    assert loaded.alpha.item() == pytest.approx(alpha_at("cosine", position, 50))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 5), norms=st.lists(numbers, max_size=12))
def test_the_ring_keeps_the_newest_norms_oldest_first(size: int, norms: list[float]) -> None:
    ring = NormRing(size)
    for norm in norms:
        ring.add(norm)
    assert repr(ring.read()) == repr(norms[-size:])
    other = NormRing(size)
    other.load(ring.read())
    other.add(0.5)
    ring.add(0.5)
    assert repr(other.read()) == repr(ring.read())


def test_a_loaded_ring_has_nothing_of_before() -> None:
    ring = NormRing(3)
    for norm in (1.0, 2.0, 3.0, 4.0):
        ring.add(norm)
    ring.load([])
    assert ring.read() == []


def test_alpha_advances_with_the_optimizer_in_blending_only() -> None:
    for stage in SeedStage:
        seed = new_seed()
        seed.stage, seed.blend_steps, seed.schedule = stage, 4, "linear"
        course = []
        for _ in range(6):
            seed.advance()
            course.append(seed.alpha.item())
        expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] if stage == SeedStage.BLENDING else [0.0] * 6
        assert course == expected
        if stage == SeedStage.BLENDING:
            assert seed.alpha_value == 1.0


@pytest.mark.parametrize("stage", list(SeedStage))
def test_alpha_as_the_policy_sees_it(stage: SeedStage) -> None:
    seed = new_seed()
    seed.stage, seed.blend_steps, seed.blend_position, seed.schedule = stage, 4, 3, "linear"
    expected = {SeedStage.BLENDING: 0.75, SeedStage.PROBATIONARY: 1.0, SeedStage.FOSSILIZED: 1.0}
    assert seed.alpha_value == expected.get(stage, 0.0)
    assert seed.occupied == (stage in HOLDS_SEED)


def test_a_memento_takes_back_every_field() -> None:
    seed = new_seed()
    seed.module, seed.stage, seed.blueprint = nn.Linear(4, 4), SeedStage.BLENDING, "low_rank"
    seed.blend_steps, seed.blend_position = 10, 4
    seed.advance()
    seed.evidence = Evidence(gradient_norms=[1.0, 2.0], loss_now=0.5)
    seed.norms.load([3.0, math.nan])
    before, objects, weights = seed.memento(), (seed.module, seed.alpha), seed.module.weight.clone()
    saved = as_json(seed)

    seed.evidence.loss_now, seed.evidence.gradient_norms = 7.0, []
    seed.norms.load([])
    seed.alpha.zero_()
    seed.module, seed.stage, seed.blueprint, seed.fine_tuning = None, SeedStage.CULLED, "", True
    seed.blend_steps = seed.blend_position = seed.boundaries_in_stage = seed.age_boundaries = 99
    assert as_json(seed) != saved

    seed.restore(before)
    assert as_json(seed) == saved
    module, alpha = objects
    assert vars(seed)["module"] is module and vars(seed)["alpha"] is alpha
    assert alpha.item() == pytest.approx(alpha_at("sigmoid", 5, 10))
    assert same_bits(module.weight, weights)


def test_evidence_of_a_memento_is_a_copy() -> None:
    seed = new_seed()
    seed.evidence = Evidence(loss_now=1.0)
    kept = seed.memento()["evidence"]
    seed.evidence.loss_now = 2.0
    assert kept.loss_now == 1.0


def test_names_of_parameters_and_buffers_carry_the_slot(tmp_path: Path) -> None:
    seed = new_seed()
    assert (seed.group, seed.parameter_count, seed.named_parameters(), seed.named_buffers()) == (
        "seed/early",
        0,
        {},
        {},
    )
    seed.module = nn.BatchNorm1d(4)
    assert set(seed.named_parameters()) == {"seed/early/weight", "seed/early/bias"}
    assert "seed/early/running_mean" in seed.named_buffers()
    assert seed.parameter_count == 8
    with Rig.build(tmp_path) as rig:
        rig.grow("early", SeedStage.GERMINATED)
        grown = rig.state.kasmina.seeds["early"]
        assert all(name.startswith("seed/early/") for name in grown.named_parameters())
        assert rig.state.kasmina.groups()["seed/early"] == grown.named_parameters()


def test_all_evidence_is_saved_exactly() -> None:
    seed = new_seed()
    values = {name: 1 / (3 + place) for place, name in enumerate(vars(Evidence()))}
    seed.evidence = Evidence(
        **{**values, "gradient_norms": [1 / 3, math.inf], "non_finite_outputs": 2, "shape_mismatch": "x"}  # type: ignore[arg-type]
    )
    loaded = new_seed()
    loaded.load_state_dict(as_json(seed))
    assert loaded.evidence == seed.evidence
