"""The ledger of seeds: every seed that lived is in it once, with its gain and its cost, also after a restart."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rig import Rig, tiny_config
from tolaria.coordinator.apply import Applied
from tolaria.kasmina.candidates import describe_blueprint
from tolaria.leyline.types import Command, SeedStage
from tolaria.lives import SeedLives
from tolaria.measure import TRAIN_METERS, Report, Worth
from tolaria.tamiyo import policy as do
from tolaria.telemetry.meters import Meters
from tolaria.telemetry.pace import StepTimes
from tolaria.telemetry.summary import SeedRecord

CONFIG = tiny_config(output_ratio=1e6, embargo_boundaries=1)
FLOPS = 64  # low_rank over 8 features


class Ledger:
    """A rig with its ledger, whose boundaries enter it as the loop's do."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.lives = SeedLives(rig.state)
        self.finished: list[SeedRecord] = []

    def boundary(self, *commands: Command, step_ms: float = 2.0, steps: int = 4) -> Report:
        """A boundary, and steps after it."""
        state = self.rig.state
        state.boundary += 1
        state.kasmina.tick(state.left_overs)
        report = self.rig.evaluator.measure(Meters(TRAIN_METERS), StepTimes(whole_ms=step_ms))
        applied: Applied = self.rig.apply(*commands)
        assert all(outcome.applied for outcome in applied.outcomes), applied.outcomes
        self.finished += self.lives.boundary(report)
        self.rig.train(steps)
        return report

    def grow(self, slot: str, to: SeedStage) -> None:
        """Bring a free slot's seed to a stage, one boundary for each move."""
        moves = [do.germinate(slot, "low_rank"), do.start_training(slot), do.start_grafting(slot), do.stabilize(slot),
                 do.evaluate(slot), do.fossilize(slot)]  # fmt: skip
        self.boundary()
        for command in moves:
            self.boundary(command)
            if self.rig.state.kasmina.seeds[slot].stage == to:
                return

    def of(self, slot: str) -> list[SeedRecord]:
        """The entries of a slot."""
        return [record for record in self.lives.records() if record.slot == slot]


def told(report: Report) -> dict[str, tuple[float, float]]:
    """Contributions with their noise."""
    return {slot: (worth.contribution, worth.noise) for slot, worth in report.worth.items()}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Rig.build(tmp_path, config=CONFIG) as rig:
        rig.train(2)
        yield Ledger(rig)


def test_a_slot_in_which_nothing_grew_is_told_as_such(ledger: Ledger) -> None:
    ledger.boundary()
    assert [(r.slot, r.blueprint, r.stage) for r in ledger.lives.records()] == [
        ("early", "", "DORMANT"), ("late", "", "DORMANT"),
    ]  # fmt: skip


def test_a_kept_seed_has_its_gain_with_noise_and_what_it_cost(ledger: Ledger) -> None:
    ledger.grow("early", SeedStage.PROBATIONARY)
    report = ledger.boundary(do.fossilize("early"), step_ms=5.0)
    (seed,) = ledger.of("early")
    assert (seed.stage, seed.blueprint, seed.parameters, seed.alpha) == ("FOSSILIZED", "low_rank", 56, 1.0)
    assert seed.contribution is not None and seed.contribution_noise is not None and seed.contribution_noise > 0
    assert (seed.contribution, seed.contribution_noise) == told(report)["early"]
    evidence = ledger.rig.state.kasmina.seeds["early"].evidence
    assert (seed.contribution, seed.contribution_noise) == (evidence.contribution, evidence.contribution_noise)
    assert seed.flops == describe_blueprint("low_rank", (8,)).flops == FLOPS
    assert (seed.step_ms_before, seed.step_ms, seed.ended_step) == (2.0, 5.0, None)
    assert ledger.finished == [seed]
    ledger.boundary()
    assert len(ledger.finished) == 1  # told once


def test_the_time_with_and_without_is_the_least_that_was_measured(ledger: Ledger) -> None:
    ledger.grow("early", SeedStage.PROBATIONARY)
    pairs = [ledger.boundary().worth["early"].forward_ms for _ in range(3)]
    assert all(len(pair) == 2 and min(pair) > 0 for pair in pairs)
    least = [min(times) for times in zip(*pairs, strict=True)]
    assert ledger.of("early")[0].forward_ms == least
    ledger.boundary(do.fossilize("early"))
    ledger.boundary()
    assert ledger.boundary().worth == {}
    assert len(ledger.of("early")[0].forward_ms) == 2


def test_the_floating_point_work_of_each_stage_is_counted(ledger: Ledger) -> None:
    samples, spent = 4 * ledger.rig.state.sampler.group_size, []
    ledger.grow("early", SeedStage.FOSSILIZED)
    ledger.boundary()
    with_steps = ledger.of("early")[0].train_flops
    # TRAINING, BLENDING and FOSSILIZED learn, GERMINATED and SHADOWING do nothing, PROBATIONARY is frozen.
    spent = [0, 3, 3, 0, 2, 3]
    assert with_steps == sum(spent) * FLOPS * samples


def test_a_culled_seed_stays_in_the_ledger_beside_the_next_one(ledger: Ledger) -> None:
    ledger.grow("early", SeedStage.SHADOWING)
    ledger.boundary()
    report = ledger.boundary(do.cull("early"))
    (first,) = ledger.of("early")
    assert (first.stage, first.ended_in, first.ended_step) == ("CULLED", "SHADOWING", ledger.rig.state.step - 4)
    # Measured at the very boundary at which it was culled.
    assert (first.contribution, first.contribution_noise) == told(report)["early"]
    assert first.forward_ms == []  # never at work
    assert ledger.finished == [first]
    for _ in range(3):
        ledger.boundary()
    ledger.grow("early", SeedStage.TRAINING)
    kept, second = ledger.of("early")
    assert kept == first
    assert (second.stage, second.contribution, second.train_flops) == ("TRAINING", None, 0)
    assert second.born_step > first.born_step and second.command_id != first.command_id
    ledger.boundary(do.cancel("early"))
    assert [r.stage for r in ledger.of("early")] == ["CULLED", "CANCELLED"]
    assert [r.verdict for r in ledger.finished][1:] == ["not measured"]


def test_two_seeds_have_entries_of_their_own(ledger: Ledger) -> None:
    ledger.grow("early", SeedStage.PROBATIONARY)
    ledger.grow("late", SeedStage.SHADOWING)
    report = ledger.boundary()
    assert set(report.worth) == {"early", "late"}
    gains = {r.slot: (r.contribution, r.contribution_noise) for r in ledger.lives.records()}
    assert gains == told(report)


def test_a_saved_ledger_goes_on_as_it_would_have(ledger: Ledger) -> None:
    ledger.grow("early", SeedStage.SHADOWING)
    ledger.boundary(do.cull("early"))
    ledger.grow("late", SeedStage.BLENDING)
    saved = json.loads(json.dumps(ledger.lives.state_dict(), allow_nan=False))
    other = SeedLives(ledger.rig.state)
    other.load_state_dict(saved)
    assert other.records() == ledger.lives.records()
    report = ledger.rig.evaluator.measure(Meters(TRAIN_METERS))
    assert other.boundary(report) == ledger.lives.boundary(report)
    assert other.records() == ledger.lives.records()


def test_a_return_takes_back_what_was_entered_since(ledger: Ledger) -> None:
    ledger.grow("early", SeedStage.BLENDING)
    kept, before = ledger.rig.state.memento(), ledger.lives.records()
    saved = json.loads(json.dumps(ledger.lives.state_dict()))
    ledger.boundary(do.cull("early"))
    assert ledger.of("early")[0].stage == "CULLED"
    ledger.rig.state.restore(kept)
    ledger.lives.load_state_dict(saved)
    assert ledger.lives.records() == before


def test_an_interval_without_steps_and_a_loss_that_is_no_number_are_no_measure(ledger: Ledger) -> None:
    ledger.grow("early", SeedStage.PROBATIONARY)
    report = ledger.boundary(step_ms=4.0)
    (known,) = ledger.of("early")
    bad = replace(report, step_ms=0.0, worth={"early": Worth(float("nan"), float("nan"))})
    ledger.lives.boundary(bad)
    (after,) = ledger.of("early")
    assert (after.contribution, after.contribution_noise) == (known.contribution, known.contribution_noise)
    assert after.step_ms == known.step_ms == 4.0
