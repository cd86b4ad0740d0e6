"""When a run goes back by itself: which losses are incidents, what is blamed, how often, when it gives up."""

import json
import math

import pytest

from tolaria.config_recovery import RecoveryConfig
from tolaria.recovery.autopilot import Incident, SpikeWatch, StepFact, collapse, plan_attempt, same_place

CONFIG = RecoveryConfig(spike_ratio=15.0, spike_window=8, spike_min_losses=4, non_finite_steps=3, attempts=2,
                        attempt_steps=100)  # fmt: skip


def fact(step: int, loss: float, *, taken: bool = True) -> StepFact:
    return StepFact(step=step, window=(0, step * 8, step * 8 + 8), taken=taken, loss=loss)


def watched(losses: list[float], config: RecoveryConfig = CONFIG) -> tuple[SpikeWatch, list[Incident]]:
    watch = SpikeWatch(config)
    found = [watch.add(fact(step, loss)) for step, loss in enumerate(losses, 1)]
    return watch, [incident for incident in found if incident is not None]


def test_a_loss_of_more_than_the_ratio_times_the_median_is_an_incident_that_blames_its_samples() -> None:
    _, found = watched([1.0, 1.1, 0.9, 1.0, 15.1])
    (incident,) = found
    assert (incident.cause, incident.level, incident.step, incident.first) == ("loss_spike", 3, 5, 5)
    assert incident.windows == ((0, 40, 48),)
    assert "15.1" in incident.reason and "running median 1" in incident.reason


@pytest.mark.parametrize("losses", [
    pytest.param([1.0, 1.1, 0.9, 1.0, 15.0], id="just the ratio"),
    pytest.param([1.0, 1.0, 1.0, 99.0], id="too few losses to judge by"),
    pytest.param([1.0] * 6 + [0.0] * 6 + [5.0], id="a median of zero says nothing"),
    pytest.param([9.0, 3.0, 1.0, 0.4, 0.3, 2.0], id="the ups and downs of a start"),
])  # fmt: skip
def test_what_is_no_spike(losses: list[float]) -> None:
    assert watched(losses)[1] == []


@pytest.mark.parametrize(("loss", "spike"), [(27.0, False), (115.0, True)])
def test_an_epochs_short_last_step_is_judged_with_the_samples_it_lacks_at_the_usual_loss(
    loss: float, spike: bool
) -> None:
    watch, _ = watched([1.0] * 6)
    short = StepFact(step=7, window=(0, 56, 57), taken=True, loss=loss)  # 1 sample, 8 in the steps before
    found = watch.add(short)
    assert (found is not None) == spike


def test_a_spike_does_not_move_the_median_that_judges_the_next_one() -> None:
    _, found = watched([1.0] * 5 + [100.0, 100.0, 100.0])
    assert [incident.first for incident in found] == [6, 7, 8]


def test_the_median_forgets_old_losses() -> None:
    assert watched([100.0] * 8 + [1.0] * 8 + [20.0])[1][0].first == 17


def test_after_a_reset_losses_are_gathered_anew_before_one_is_judged() -> None:
    watch, _ = watched([1.0] * 6)
    watch.reset()
    assert [watch.add(fact(step, 50.0)) for step in (7, 8, 9, 10)] == [None] * 4
    assert watch.add(fact(11, 50.0 * 15.1)) is not None


def test_skipped_steps_count_only_in_a_row_and_are_blamed_together() -> None:
    watch = SpikeWatch(CONFIG)
    taken = [False, False, True, False, False, False]
    found = [watch.add(fact(step, 1.0 if ok else math.nan, taken=ok)) for step, ok in enumerate(taken, 1)]
    assert found[:5] == [None] * 5
    assert found[5] is not None and (found[5].cause, found[5].first, found[5].step) == ("non_finite", 4, 6)
    assert len(found[5].windows) == 3 and "3 steps in a row" in found[5].reason


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_step_that_was_taken_with_a_loss_that_is_no_number_is_an_incident_at_once(loss: float) -> None:
    _, found = watched([1.0, 1.0, loss])
    assert [(incident.cause, incident.first) for incident in found] == [("non_finite", 3)]


def test_the_watch_goes_on_from_its_json_as_if_nothing_had_been() -> None:
    whole, _ = watched([0.1 * step for step in range(1, 8)])
    again = SpikeWatch(CONFIG)
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert again.state_dict() == whole.state_dict()
    assert again.add(fact(8, 7.77)) == whole.add(fact(8, 7.77)) is not None


def test_widening_blames_one_three_seven_steps_before() -> None:
    watch, found = watched([1.0] * 10 + [99.0])
    starts = [[w[1] // 8 for w in watch.widened(found[0], times).windows] for times in range(5)]
    assert starts == [[11], [10, 11], [8, 9, 10, 11], [*range(4, 12)], [*range(1, 12)]]
    assert watch.widened(found[0], 2).first == 8


def incident(step: int, cause: str = "loss_spike") -> Incident:
    return Incident(cause=cause, level=3, reason="the reason", step=step, first=step)  # type: ignore[arg-type]


@pytest.mark.parametrize(("earlier", "older", "held", "stops"), [
    ([], 0, False, False),
    ([150], 1, False, False),
    ([150, 190], 2, True, False),
    ([150, 190, 199], 0, False, True),
    ([10, 20, 30], 0, False, False),
    ([10, 20, 190], 1, False, False),
])  # fmt: skip
def test_attempts_go_further_back_then_conservative_then_stop(
    earlier: list[int], older: int, held: bool, stops: bool
) -> None:
    attempt = plan_attempt(incident(200), earlier, CONFIG)
    assert bool(attempt.stop) == stops
    if stops:
        assert "the reason" in attempt.stop and "3 times within 100 steps" in attempt.stop
    else:
        assert (attempt.older, attempt.held) == (older, held)


def test_only_returns_near_this_place_widen_what_is_blamed() -> None:
    assert same_place(incident(100), [93, 100, 108, 109, 50], CONFIG) == 3
    assert same_place(incident(100), [100] * 9, CONFIG) == 5


@pytest.mark.parametrize(("losses", "accuracies", "collapsed"), [
    ([0.5], [0.9], False),
    ([math.nan], [0.9], True),
    ([0.5, 2.6], [0.9, 0.4], True),
    ([0.5, 2.6], [0.9, 0.5], False),
    ([0.5, 2.4], [0.9, 0.1], False),
    ([0.5, 0.4, 2.3], [0.8, 0.9, 0.3], True),
    ([-0.1, -0.2], [0.4, 0.1], False),
    ([0.1, *[1.0] * 8, 2.0], [0.9] * 10, False),
])  # fmt: skip
def test_a_collapse_is_a_multiple_of_the_best_loss_at_half_the_best_accuracy(
    losses: list[float], accuracies: list[float], collapsed: bool
) -> None:
    assert (collapse(losses, accuracies, 5.0) is not None) == collapsed
