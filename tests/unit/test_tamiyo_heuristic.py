"""The heuristic policy: when it grows, what, where, and what it keeps; how often it is wrong on noisy losses."""

import math
import random

import pytest

from tests.packets import operations, slot, state
from tolaria.errors import ConfigError
from tolaria.leyline.codec import decode_command, encode_command
from tolaria.leyline.limits import MAX_COMMANDS, MAX_STRING_CHARS
from tolaria.leyline.types import Command, SeedCommand, SeedOp, SeedStage, SeedState
from tolaria.tamiyo.policies import load_policy
from tolaria.tamiyo.policies import worth as values
from tolaria.tamiyo.policies.heuristic import HISTORY, HeuristicPolicy
from tolaria.tamiyo.policies.worth import Verdict
from tolaria.tamiyo.policy import with_identity

STAGE_AFTER = {
    SeedOp.GERMINATE: SeedStage.GERMINATED,
    SeedOp.START_TRAINING: SeedStage.TRAINING,
    SeedOp.START_GRAFTING: SeedStage.BLENDING,
    SeedOp.STABILIZE: SeedStage.SHADOWING,
    SeedOp.EVALUATE: SeedStage.PROBATIONARY,
    SeedOp.FINE_TUNE: SeedStage.PROBATIONARY,
    SeedOp.FOSSILIZE: SeedStage.FOSSILIZED,
    SeedOp.CULL: SeedStage.CULLED,
}
FREE = slot("mid", SeedStage.DORMANT)
LEVEL = [1.0] * 8
GERMINATION = (SeedOp.GERMINATE, "mid")


def heuristic(**settings: object) -> HeuristicPolicy:
    policy = load_policy(
        "heuristic", {"patience": 4, "min_delta": 0.04, "confidence": 0.9, "host_share": 1.0, **settings}
    )
    assert isinstance(policy, HeuristicPolicy)
    return policy


def course(
    policy: HeuristicPolicy, losses: list[float], seeds: tuple[SeedState, ...] = (FREE,), **metrics: float
) -> list[list[Command]]:
    """What is answered at each boundary, as long as nothing is done about it."""
    return [
        policy.decide(state(b, loss, seeds, losses[: b - 1][::-1], **metrics), ())
        for b, loss in enumerate(losses, start=1)
    ]


def chosen(commands: list[Command]) -> list[tuple[str, str]]:
    found = []
    for command in commands:
        assert isinstance(command.payload, SeedCommand)
        found.append((command.target_seed_id, command.payload.blueprint_id))
    return found


# When


def test_growth_waits_until_the_loss_is_level() -> None:
    assert not any(course(heuristic(), [1.0 - 0.05 * b for b in range(10)]))
    stuck = course(heuristic(), [1.0, 0.9, 0.899, 0.898, 0.899, 0.9])
    assert [operations(commands) for commands in stuck] == [[], [], [], [], [GERMINATION], [GERMINATION]]
    assert stuck[4][0].reason == "loss 0.8984 level: fall 0.2% +- 0.2% in 4 boundaries, 4.0% wanted"


def test_a_rising_loss_is_level_and_one_spike_of_a_falling_loss_is_not() -> None:
    assert operations(course(heuristic(), [1.0, 1.05, 1.1, 1.15])[-1]) == [GERMINATION]
    spiked = [1.0 - 0.05 * b for b in range(10)]
    spiked[6] += 0.5
    assert not any(course(heuristic(), spiked))


def test_a_low_loss_of_long_ago_does_not_make_a_falling_loss_level() -> None:
    assert course(heuristic(), [0.1, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5])[-1] == []


def test_noise_that_hides_any_fall_does_not_put_growth_off_for_ever() -> None:
    rng = random.Random(5)
    losses = [1 + rng.gauss(0, 0.5) for _ in range(60)]
    assert any(course(heuristic(confidence=0.999, min_delta=0.001), losses))


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.02])
def test_a_loss_that_falls_as_fast_as_wanted_is_seldom_called_level(noise: float) -> None:
    """Twice as fast as wanted, from 2 downwards, over 20 boundaries; the share of boundaries that would grow."""
    rng = random.Random(11)
    grown = asked = 0
    for _ in range(60):
        losses = [2.0 - 0.04 * b + rng.gauss(0, 2 * noise) for b in range(20)]
        answers = course(heuristic(), losses)[3:]
        grown += sum(map(bool, answers))
        asked += len(answers)
    assert grown / asked < 0.1


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.01, 0.02])
def test_a_level_loss_is_found_out_soon(noise: float) -> None:
    rng = random.Random(11)
    waited = []
    for _ in range(60):
        answers = course(heuristic(), [1.0 + rng.gauss(0, noise) for _ in range(30)])
        waited.append(next(b for b, commands in enumerate(answers, start=1) if commands))
    assert sorted(waited)[30] <= 10


def test_nothing_grows_in_conservative_mode_or_too_late_to_pay() -> None:
    assert not any(course(heuristic(), LEVEL, conservative=1.0))
    # 3 single boundaries, 2 to train, 3 to blend, 2 to pay.
    assert not any(course(heuristic(), LEVEL, boundaries_left=9.0))
    assert any(course(heuristic(), LEVEL, boundaries_left=10.0))
    assert any(course(heuristic(train_boundaries=1, payoff_boundaries=0), LEVEL, boundaries_left=7.0))
    assert not any(course(heuristic(), LEVEL, seeds=()))


@pytest.mark.parametrize(
    ("changed", "boundaries", "grows"),
    [
        (SeedStage.FOSSILIZED, 2, False), (SeedStage.FOSSILIZED, 3, True),
        (SeedStage.CULLED, 1, False), (SeedStage.EMBARGOED, 2, False), (SeedStage.EMBARGOED, 3, True),
        (SeedStage.RESETTING, 1, False), (SeedStage.DORMANT, 1, False), (SeedStage.DORMANT, 2, True),
    ],
)  # fmt: skip
def test_only_losses_of_the_present_structure_are_judged(changed: SeedStage, boundaries: float, grows: bool) -> None:
    other = slot("low", changed, boundaries_in_stage=boundaries)
    answer = course(heuristic(), LEVEL, seeds=(FREE, other))[-1]
    assert bool(answer) == grows


# Restart


def test_a_fresh_policy_decides_as_the_old_one() -> None:
    rng = random.Random(2)
    losses = [1 + 2 * math.exp(-b / 4) + rng.gauss(0, 0.01) for b in range(40)]
    old = heuristic()
    decided = course(old, losses)
    again = [heuristic().decide(state(b + 1, loss, (FREE,), losses[:b][::-1]), ()) for b, loss in enumerate(losses)]
    assert again == decided
    assert 0 < sum(map(bool, decided)) < 40


def test_losses_are_remembered_for_a_trainer_that_sends_none() -> None:
    losses = [1.0, 0.9, 0.899, 0.898, 0.899, 0.9]
    sent, policy = course(heuristic(), losses), heuristic()
    remembered = [policy.decide(state(b, loss, (FREE,)), ()) for b, loss in enumerate(losses, start=1)]
    assert remembered == sent
    assert heuristic().decide(state(6, 0.9, (FREE,)), ()) == []


def test_after_a_rollback_the_losses_of_the_new_course_count() -> None:
    policy = heuristic()
    for b, loss in enumerate([1.0, 0.9, 0.8, 0.7, 0.6], start=1):
        policy.decide(state(b, loss, (FREE,)), ())
    again = [policy.decide(state(b, 0.9, (FREE,)), ()) for b in (3, 4, 5, 6)]
    assert [operations(commands) for commands in again] == [[], [], [GERMINATION], [GERMINATION]]


def test_a_gap_in_the_history_ends_it() -> None:
    assert not heuristic().decide(state(9, 1.0, (FREE,), loss_history__1=1.0, loss_history__3=1.0), ())


def test_a_loss_that_was_no_number_decides_nothing() -> None:
    broken = [1.0, 1.0, 1e30, 1.0, 1.0, 1.0]
    assert not any(course(heuristic(), broken))


# What and where


def test_the_largest_gain_for_its_cost_is_grown() -> None:
    """By the formula: early/conv 0.6 * sqrt(400) / 4 = 3, late/conv 2, late/mlp 0.5 * sqrt(100) / 2 = 2.5."""
    early = slot("early", SeedStage.DORMANT, signal__conv=0.6, cost__conv=400, flops__conv=3000)
    late = slot("late", SeedStage.DORMANT, signal__conv=0.4, cost__conv=400, flops__conv=3000,
                signal__mlp=0.5, cost__mlp=100, flops__mlp=1000)  # fmt: skip

    def grown(seeds: tuple[SeedState, ...], **settings: object) -> list[tuple[str, str]]:
        policy = heuristic(flops_weight=1.0, **settings)
        return chosen(course(policy, LEVEL, seeds, flops_per_sample=1000.0)[-1])

    assert grown((early, late)) == grown((late, early)) == [("early", "conv")]
    assert grown((late,)) == [("late", "mlp")]
    assert grown((late,), blueprint="conv") == [("late", "conv")]
    assert grown((early, late), seeds_at_once=2) == [("early", "conv"), ("late", "mlp")]
    [offer] = values.offers([early], {"flops_per_sample": 1000.0}, blueprint=None, flops_weight=1.0)
    assert (offer.score, offer.flops, offer.parameters) == (pytest.approx(3.0), 4.0, 400)


def test_a_named_blueprint_grows_although_it_was_not_measured() -> None:
    """Not among kasmina.candidates, or beyond as many as are told of. What was measured and promises nothing stays."""
    other = {"signal__conv": 0.6, "cost__conv": 400.0}
    slots = (slot("early", SeedStage.DORMANT, **other), slot("late", SeedStage.DORMANT, **other))
    assert chosen(course(heuristic(blueprint="mlp"), LEVEL, slots)[-1]) == [("early", "mlp")]
    both = course(heuristic(blueprint="mlp", seeds_at_once=2), LEVEL, slots)[-1]
    assert chosen(both) == [("early", "mlp"), ("late", "mlp")]
    dead = slot("early", SeedStage.DORMANT, **other, signal__mlp=0.0, cost__mlp=100)
    failed = slot("early", SeedStage.DORMANT, **other, cost__mlp=100)
    for found in (dead, failed):
        assert chosen(course(heuristic(blueprint="mlp"), LEVEL, (found, slots[1]))[-1]) == []
    large = slot("early", SeedStage.DORMANT, **other, signal__mlp=1.0, cost__mlp=100)
    assert chosen(course(heuristic(blueprint="mlp"), LEVEL, (large,), budget_parameters=99.0)[-1]) == []


@pytest.mark.parametrize(
    ("weight", "first"),
    [(0.0, "large"), (1.0, "small")],
)
def test_flops_count_as_much_as_they_are_told_to(weight: float, first: str) -> None:
    free = slot("a", SeedStage.DORMANT, signal__large=1.0, cost__large=900, flops__large=9000,
                signal__small=1.0, cost__small=100, flops__small=100)  # fmt: skip
    ranked = values.offers([free], {"flops_per_sample": 1000.0}, blueprint=None, flops_weight=weight)
    assert next(offer.blueprint for offer in ranked) == first


def test_equal_offers_are_told_apart_by_size_and_name_alone() -> None:
    slots = [slot(name, SeedStage.DORMANT, signal__x=1.0, cost__x=4, signal__y=2.0, cost__y=1) for name in "ba"]
    ranked = [values.offers(order, {}, blueprint=None, flops_weight=1.0) for order in (slots, slots[::-1])]
    assert ranked[0] == ranked[1]
    assert [(o.slot, o.blueprint) for o in ranked[0]] == [("a", "y"), ("b", "y"), ("a", "x"), ("b", "x")]


def test_what_exceeds_the_budget_is_not_grown() -> None:
    slots = tuple(
        slot(name, SeedStage.DORMANT, signal__mlp=1.0, cost__mlp=100, signal__big=9.0, cost__big=500) for name in "ab"
    )
    policy = heuristic(seeds_at_once=2)
    assert chosen(course(policy, LEVEL, slots, budget_parameters=1000.0)[-1]) == [("a", "big"), ("b", "big")]
    assert chosen(course(policy, LEVEL, slots, budget_parameters=600.0)[-1]) == [("a", "big"), ("b", "mlp")]
    assert chosen(course(policy, LEVEL, slots, budget_parameters=150.0)[-1]) == [("a", "mlp")]
    assert chosen(course(policy, LEVEL, slots, budget_parameters=99.0)[-1]) == []


def test_a_seed_without_gradient_is_not_grown() -> None:
    dead = slot("a", SeedStage.DORMANT, signal__mlp=0.0, cost__mlp=100)
    assert course(heuristic(), LEVEL, (dead,))[-1] == []


@pytest.mark.parametrize(
    ("rank", "blueprint"), [(3.0, "conv_residual"), (2.0, "residual_mlp"), (1.0, "residual_mlp"), (4.0, "residual_mlp")]
)
def test_without_measured_gradients_the_blueprint_fits_the_slots_shape(rank: float, blueprint: str) -> None:
    assert chosen(course(heuristic(), LEVEL, slot_rank__mid=rank)[-1]) == [("mid", blueprint)]
    assert chosen(course(heuristic(blueprint="low_rank"), LEVEL, slot_rank__mid=rank)[-1]) == [("mid", "low_rank")]
    both = (FREE, slot("top", SeedStage.DORMANT))
    assert len(course(heuristic(seeds_at_once=2), LEVEL, both)[-1]) == 2


# On its way


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (slot("a", SeedStage.GERMINATED, gate_ok=0, boundaries_in_stage=1), None),
        (slot("a", SeedStage.GERMINATED, gate_ok=1, boundaries_in_stage=1), SeedOp.START_TRAINING),
        (slot("a", SeedStage.TRAINING, gate_ok=1, boundaries_in_stage=1), None),
        (slot("a", SeedStage.TRAINING, gate_ok=1, boundaries_in_stage=2), SeedOp.START_GRAFTING),
        (slot("a", SeedStage.TRAINING, gate_ok=0, boundaries_in_stage=5), None),
        (slot("a", SeedStage.TRAINING, gate_ok=0, boundaries_in_stage=8), SeedOp.CULL),
        (slot("a", SeedStage.BLENDING, gate_ok=0, alpha=0.99, boundaries_in_stage=50), None),
        (slot("a", SeedStage.BLENDING, gate_ok=1, alpha=1, boundaries_in_stage=3), SeedOp.STABILIZE),
        (slot("a", SeedStage.BLENDING, gate_ok=0, alpha=1, boundaries_in_stage=3), None),
        (slot("a", SeedStage.BLENDING, gate_ok=0, alpha=1, boundaries_in_stage=6), SeedOp.CULL),
        (slot("a", SeedStage.SHADOWING, gate_ok=1), SeedOp.EVALUATE),
        (slot("a", SeedStage.SHADOWING, gate_ok=0, boundaries_in_stage=6), SeedOp.CULL),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=0), None),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=1, contribution=0.02), SeedOp.FOSSILIZE),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=0, contribution=0.02), None),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=1, contribution=0.009), SeedOp.CULL),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=0, contribution=-1), SeedOp.CULL),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=0, boundaries_in_stage=6), SeedOp.CULL),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=1, contribution=0.02, contribution_noise=0.004), SeedOp.FOSSILIZE),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=1, contribution=0.02, contribution_noise=0.006), SeedOp.FINE_TUNE),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=1, contribution=0.0, contribution_noise=0.006), SeedOp.FINE_TUNE),
        (slot("a", SeedStage.PROBATIONARY, gate_ok=1, contribution=0.0, contribution_noise=0.004), SeedOp.CULL),
    ],
)
def test_each_stage_moves_on_when_its_gate_would_pass(seed: SeedState, expected: SeedOp | None) -> None:
    commands = heuristic(min_contribution=0.01).decide(state(9, 1.0, (seed, FREE)), ())
    assert operations(commands) == ([] if expected is None else [(expected, "a")])
    assert all(any(c.isdigit() for c in command.reason) for command in commands)


def test_every_growing_seed_is_advanced() -> None:
    a = slot("a", SeedStage.SHADOWING, gate_ok=1)
    b = slot("b", SeedStage.GERMINATED, gate_ok=1, boundaries_in_stage=1)
    commands = heuristic().decide(state(9, 1.0, (a, b, FREE), LEVEL), ())
    assert operations(commands) == [(SeedOp.EVALUATE, "a"), (SeedOp.START_TRAINING, "b")]


# Judged


@pytest.mark.parametrize(
    ("contribution", "noise", "expected"),
    [
        (0.1, 0.0, Verdict.PAYS), (0.1, 0.04, Verdict.PAYS), (0.1, 0.06, Verdict.UNDECIDED),
        (0.0, 0.0, Verdict.PAYS), (-0.01, 0.0, Verdict.COSTS), (-0.1, 0.06, Verdict.UNDECIDED),
        (-0.1, 0.04, Verdict.COSTS),
    ],
)  # fmt: skip
def test_a_contribution_counts_beyond_its_noise(contribution: float, noise: float, expected: Verdict) -> None:
    assert values.judge(contribution, noise=noise, needed=0.0, z=2.0) == expected


def test_a_seed_that_does_nothing_is_seldom_kept() -> None:
    rng = random.Random(1)
    told = [values.judge(rng.gauss(0, 0.01), noise=0.01, needed=0.0, z=2.0) for _ in range(4000)]
    assert 0.015 < told.count(Verdict.PAYS) / 4000 < 0.031  # 2.3 % of a normal distribution is beyond 2
    told = [values.judge(rng.gauss(0.04, 0.01), noise=0.01, needed=0.0, z=2.0) for _ in range(4000)]
    assert told.count(Verdict.PAYS) / 4000 > 0.96


def probationary(boundaries: float, noise: float = 0.1, **metrics: float) -> SeedState:
    return slot("a", SeedStage.PROBATIONARY, gate_ok=1, contribution=0.1, contribution_noise=noise,
                boundaries_in_stage=boundaries, **metrics)  # fmt: skip


def test_an_undecided_seed_is_fine_tuned_and_then_judged_for_good() -> None:
    policy = heuristic(fine_tune_boundaries=2)

    def decide(seed: SeedState, **metrics: float) -> list[tuple[SeedOp, str]]:
        return operations(policy.decide(state(9, 1.0, (seed,), **metrics), ()))

    assert decide(probationary(1, fine_tuning=0)) == [(SeedOp.FINE_TUNE, "a")]
    assert decide(probationary(2, fine_tuning=1)) == []
    assert decide(probationary(2, noise=0.04, fine_tuning=1)) == [(SeedOp.FOSSILIZE, "a")]
    assert decide(probationary(3, fine_tuning=1)) == [(SeedOp.CULL, "a")]
    # A trainer that does not tell whether it is fine-tuned is asked once.
    assert decide(probationary(1)) == [(SeedOp.FINE_TUNE, "a")]
    assert decide(probationary(2)) == []
    # At the end there is no time to learn.
    assert decide(probationary(1, fine_tuning=0), boundaries_left=1.0) == [(SeedOp.CULL, "a")]
    never = heuristic(fine_tune_boundaries=0).decide(state(9, 1.0, (probationary(1, fine_tuning=0),)), ())
    assert operations(never) == [(SeedOp.CULL, "a")]


def test_a_seed_must_bring_what_its_flops_would_have_brought_the_host() -> None:
    """The host shed 0.01 a boundary around boundary 15.5, of 32. The seed costs half as much as the host and 12
    boundaries are left: for 6 more at the end the host would have shed 0.01 * 15.5 * log(1 + 6 / 32) = 0.02664."""
    before = [1.0 + 0.01 * back for back in range(10)]  # newest first, the first one at germination
    history = [0.9, 0.9, *before]

    def decide(contribution: float, seen: list[float] = history, **settings: object) -> list[Command]:
        seed = slot("a", SeedStage.PROBATIONARY, age=3, gate_ok=1, contribution=contribution, flops=500.0,
                    boundaries_in_stage=1)  # fmt: skip
        packet = state(20, 0.9, (seed,), seen, boundaries_left=12.0, flops_per_sample=1500.0)
        return heuristic(**settings).decide(packet, ())

    assert operations(decide(0.0267)) == [(SeedOp.FOSSILIZE, "a")]
    [culled] = decide(0.0266)
    assert operations([culled]) == [(SeedOp.CULL, "a")]
    assert culled.reason == "contribution +0.0266 +- 0, needed 0.02664 (what its FLOPs would give the host)"
    assert operations(decide(0.0134, host_share=0.5)) == [(SeedOp.FOSSILIZE, "a")]
    assert operations(decide(0.0133, host_share=0.5)) == [(SeedOp.CULL, "a")]
    assert operations(decide(0.001, host_share=0.0)) == [(SeedOp.FOSSILIZE, "a")]
    assert operations(decide(0.001, [0.9, 0.9, *[1.0] * 10])) == [(SeedOp.FOSSILIZE, "a")]
    assert operations(decide(0.001, history[:4])) == [(SeedOp.FOSSILIZE, "a")]  # too little is known of the host


def test_more_training_is_worth_what_a_loss_that_falls_with_the_logarithm_of_time_says() -> None:
    def loss(t: float) -> float:
        return 3 - 0.2 * math.log(t)

    bought = values.host_alternative(0.2 / 15, at=15, end=40, left=20, ratio=0.3)
    assert bought == pytest.approx(loss(40) - loss(46))
    assert values.host_alternative(-0.01, at=15, end=40, left=20, ratio=0.3) == 0.0
    assert values.host_alternative(0.01, at=15, end=0, left=0, ratio=0.3) == 0.0


@pytest.mark.parametrize(
    ("seed", "sent", "expected"),
    [
        ({"flops": 500}, {"flops_per_sample": 1500}, 0.5),
        ({"parameters": 20, "flops": 500}, {"flops_per_sample": 1500, "parameters": 120}, 0.5),
        ({"parameters": 20}, {"flops_per_sample": 1500, "parameters": 120}, 0.2),
        ({}, {"flops_per_sample": 1500}, None),
        ({"flops": 1500}, {"flops_per_sample": 1500}, None),
    ],
)
def test_what_a_seed_costs_is_told_by_flops_or_else_by_parameters(
    seed: dict[str, float], sent: dict[str, float], expected: float | None
) -> None:
    assert values.cost_ratio(slot("a", SeedStage.PROBATIONARY, **seed), sent) == expected


@pytest.mark.parametrize(("contribution", "end"), [(0.3, SeedStage.FOSSILIZED), (-0.3, SeedStage.CULLED)])
def test_one_seed_goes_all_the_way(contribution: float, end: SeedStage) -> None:
    policy = heuristic()
    seed, stages = FREE, [SeedStage.DORMANT]
    for boundary in range(1, 25):
        commands = policy.decide(state(boundary, 1.0, (seed,), [1.0] * min(boundary - 1, HISTORY)), ())
        assert len(commands) <= 1
        stage, waited = seed.stage, seed.metrics.get("boundaries_in_stage", 0) + 1
        for operation, name in operations(commands):
            assert name == "mid"
            stage, waited = STAGE_AFTER[operation], 1
            stages.append(stage)
        if stage in (SeedStage.FOSSILIZED, SeedStage.CULLED):
            break
        seed = slot("mid", stage, gate_ok=1, alpha=1, contribution=contribution, boundaries_in_stage=waited)
    assert stages == [*list(SeedStage)[:6], end]


# Words and settings


def test_every_reason_fits_the_wire_whole() -> None:
    wild = [123.45678, 98.7654321, 1.23e-5, 4567.891, 0.00012345]
    commands: list[Command] = []
    for scale in wild:
        free = slot("mid", SeedStage.DORMANT, signal__mlp=scale, cost__mlp=999_999.0, flops__mlp=1e12)
        losses = [scale * (1 + 0.0123 * (-1) ** b) for b in range(HISTORY + 1)]
        commands += course(heuristic(patience=16, min_delta=0.5), losses, (free,), flops_per_sample=1e7)[-1]
        for noise in (0.0, scale / 3, scale * 1.0001):
            for stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY):
                seed = slot("a", stage, norm=scale, gate_ok=1, alpha=1, boundaries_in_stage=1234, flops=1e6,
                            contribution=-scale, contribution_noise=noise)  # fmt: skip
                before = [scale * (1 + 0.01 * back) for back in range(HISTORY)]
                packet = state(20, scale, (seed,), before, boundaries_left=10.0, flops_per_sample=3e6)
                commands += heuristic(z=1.2345, fine_tune_boundaries=2000).decide(packet, ())
    assert len(commands) >= 60
    assert {c.reason.split()[0] for c in commands} == {"loss", "trained", "alpha", "output", "contribution"}
    for command in commands:
        assert len(command.reason) <= MAX_STRING_CHARS and not command.reason.endswith("...")
        sent = with_identity(command, "id", issued_by="x", issued_at_ns=1)
        assert decode_command(encode_command(sent)) == sent


@pytest.mark.parametrize(
    "args",
    [
        {"patience": 3}, {"patience": 17}, {"patience": 5.5}, {"min_delta": 1.0}, {"min_delta": -0.1},
        {"confidence": 0.5}, {"confidence": 1.0}, {"confidence": float("nan")}, {"flops_weight": -1},
        {"seeds_at_once": 0}, {"train_boundaries": True}, {"blend_boundaries": 0}, {"payoff_boundaries": -1},
        {"stall_boundaries": 0}, {"z": -0.5}, {"z": True}, {"fine_tune_boundaries": -1},
        {"min_contribution": float("inf")}, {"host_share": -1.0}, {"blueprint": ""}, {"blueprint": "a b"},
        {"blueprint": 3}, {"z": "2"},
    ],
)  # fmt: skip
def test_bad_settings_are_named_with_what_is_accepted(args: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(args))}=.*: expected"):
        load_policy("heuristic", args)


def test_it_commands_no_more_than_a_reply_holds() -> None:
    seeds = tuple(slot(f"s{i}", SeedStage.GERMINATED, boundaries_in_stage=1, gate_ok=1) for i in range(100))
    commands = HeuristicPolicy().decide(state(5, seeds=seeds), ())
    assert len(commands) == MAX_COMMANDS
