"""The table of stages: every pair of stage and operation is legal as the contract says, or refused by name."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.errors import CommandRefused
from tolaria.kasmina.lifecycle import HOLDS_SEED, MOVES, after_boundary, alpha_at, move
from tolaria.leyline.types import SeedGate, SeedOp, SeedStage

S, Op, G = SeedStage, SeedOp, SeedGate
SCHEDULES = ("sigmoid", "linear", "cosine")

# The contract, written down a second time: stage -> operation -> (next stage, gate).
CONTRACT: dict[SeedStage, dict[SeedOp, tuple[SeedStage, SeedGate | None]]] = {
    S.DORMANT: {Op.GERMINATE: (S.GERMINATED, G.G0_SANITY)},
    S.GERMINATED: {
        Op.START_TRAINING: (S.TRAINING, G.G1_GRADIENT_HEALTH),
        Op.CULL: (S.CULLED, None),
        Op.CANCEL: (S.RESETTING, None),
    },
    S.TRAINING: {
        Op.START_GRAFTING: (S.BLENDING, G.G1_GRADIENT_HEALTH),
        Op.CULL: (S.CULLED, None),
        Op.CANCEL: (S.RESETTING, None),
    },
    S.BLENDING: {Op.STABILIZE: (S.SHADOWING, G.G2_STABILITY), Op.CULL: (S.CULLED, None)},
    S.SHADOWING: {Op.EVALUATE: (S.PROBATIONARY, G.G3_INTERFACE), Op.CULL: (S.CULLED, None)},
    S.PROBATIONARY: {
        Op.FINE_TUNE: (S.PROBATIONARY, None),
        Op.FOSSILIZE: (S.FOSSILIZED, G.G4_SYSTEM_IMPACT),
        Op.CULL: (S.CULLED, None),
    },
    S.FOSSILIZED: {},
    S.CULLED: {},
    S.EMBARGOED: {},
    S.RESETTING: {},
    S.TERMINATED: {},
}
PAIRS = list(itertools.product(SeedStage, SeedOp))


@pytest.mark.parametrize(("stage", "operation"), PAIRS, ids=[f"{s.name}-{o.name}" for s, o in PAIRS])
def test_every_pair_is_legal_as_written_or_refused(stage: SeedStage, operation: SeedOp) -> None:
    expected = CONTRACT[stage].get(operation)
    if expected is None:
        with pytest.raises(CommandRefused, match=f"{operation.name} is not legal in {stage.name}") as refused:
            move(stage, operation)
        assert refused.value.code == "illegal_transition"
        for legal in CONTRACT[stage]:
            assert legal.name in str(refused.value)
    else:
        found = move(stage, operation)
        assert (found.to, found.gate) == expected


def test_the_table_has_nothing_beyond_the_contract() -> None:
    assert set(MOVES) == {(stage, operation) for stage, row in CONTRACT.items() for operation in row}


def test_stages_that_hold_a_seed() -> None:
    assert {S.GERMINATED, S.TRAINING, S.BLENDING, S.SHADOWING, S.PROBATIONARY, S.FOSSILIZED} == HOLDS_SEED


@pytest.mark.parametrize(
    ("stage", "boundaries", "embargo", "expected"),
    [
        (S.CULLED, 0, 5, S.EMBARGOED),
        (S.EMBARGOED, 1, 2, S.EMBARGOED),
        (S.EMBARGOED, 2, 2, S.RESETTING),
        (S.EMBARGOED, 0, 0, S.RESETTING),
        (S.RESETTING, 0, 5, S.DORMANT),
        *[(stage, 99, 1, stage) for stage in (S.DORMANT, S.TERMINATED, *sorted(HOLDS_SEED))],
    ],
)
def test_what_happens_by_itself(stage: SeedStage, boundaries: int, embargo: int, expected: SeedStage) -> None:
    assert after_boundary(stage, boundaries, embargo) == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 2000))
def test_alpha_runs_from_exactly_0_to_exactly_1_and_never_back(schedule: str, steps: int) -> None:
    course = [alpha_at(schedule, position, steps) for position in range(steps + 3)]
    assert course[0] == 0.0
    assert course[steps:] == [1.0, 1.0, 1.0]
    assert all(before < after for before, after in itertools.pairwise(course[: steps + 1]))


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(deadline=None, max_examples=50)
@given(steps=st.integers(2, 500), share=st.floats(0, 1))
def test_alpha_is_symmetric_about_the_middle(schedule: str, steps: int, share: float) -> None:
    position = round(share * steps)
    there, back = alpha_at(schedule, position, steps), alpha_at(schedule, steps - position, steps)
    assert there + back == pytest.approx(1.0)


def test_the_courses_differ_as_their_names_say() -> None:
    quarter = {schedule: alpha_at(schedule, 25, 100) for schedule in SCHEDULES}
    assert quarter["linear"] == 0.25
    assert quarter["cosine"] == pytest.approx(0.1464466)
    assert quarter["sigmoid"] == pytest.approx(0.0396, abs=2e-3)  # sigma(-pi), rescaled by less than 0.4 %


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="schedule='steep'"):
        alpha_at("steep", 1, 2)
