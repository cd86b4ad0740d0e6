"""Trends of noisy losses: the statistics against references, and how often they are wrong."""

import random
import statistics

import numpy as np
import pytest
from scipy import stats

from tolaria.tamiyo.policies.trend import FEWEST, Course, Trend, course, fit, t_quantile

AHEAD, WORTH = 5, 0.03
TRIALS = 1000


def judged(losses: list[float], confidence: float = 0.9) -> Course:
    return course(fit(losses), ahead=AHEAD, worth=WORTH, confidence=confidence)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 15, 40])
@pytest.mark.parametrize("probability", [0.51, 0.8, 0.9, 0.975, 0.999])
def test_quantiles_are_those_of_student(probability: float, degrees: int) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


@pytest.mark.parametrize("points", [FEWEST, 5, 9, 17])
def test_the_line_is_that_of_least_squares(points: int) -> None:
    rng = random.Random(points)
    losses = [2 - 0.1 * i + rng.gauss(0, 0.05) for i in range(points)]
    found, reference = fit(losses), stats.linregress(np.arange(points), losses)
    assert found.fall == pytest.approx(-reference.slope, rel=1e-9)
    assert found.error == pytest.approx(reference.stderr, rel=1e-9)
    assert found.level == pytest.approx(reference.intercept + reference.slope * (points - 1), rel=1e-9)
    assert found.points == points


def test_too_few_losses_are_no_trend() -> None:
    with pytest.raises(ValueError, match="3 losses: expected 4 or more"):
        fit([1.0, 0.9, 0.8])


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0], Course.LEVEL),
        ([1.0, 0.998, 0.996, 0.994, 0.992], Course.LEVEL),  # beyond doubt, but 1 % is not worth waiting for
        ([1.0, 1.01, 1.02, 1.03, 1.04], Course.LEVEL),
        ([1.0, 0.98, 0.96, 0.94, 0.92], Course.FALLING),
        ([1.0, 0.97, 0.95, 0.92, 0.90], Course.FALLING),
        ([1.0, 0.98, 0.96, 0.94, 1.10], Course.UNCLEAR),  # one spike ends no fall
        ([1.0, 1.001, 0.999, 1.0, 0.90], Course.UNCLEAR),  # nor does one dip begin one
        ([1.2, 0.9, 1.1, 0.8, 1.0], Course.UNCLEAR),  # too noisy to tell
        ([-1.0, -1.02, -1.04, -1.06, -1.08], Course.FALLING),  # a loss may be negative
    ],
)
def test_courses(losses: list[float], expected: Course) -> None:
    assert judged(losses, confidence=0.95) == expected


def test_more_confidence_leaves_more_unclear() -> None:
    clearly = Trend(fall=0.01, error=0.004, level=1.0, points=6)
    assert course(clearly, ahead=5, worth=0.03, confidence=0.9) == Course.FALLING
    assert course(clearly, ahead=5, worth=0.03, confidence=0.99) == Course.UNCLEAR


def share(expected: Course, *, fall: float, noise: float, points: int, confidence: float) -> float:
    rng = random.Random(7)
    trials = TRIALS
    series = ([1 - fall * i + rng.gauss(0, noise) for i in range(points)] for _ in range(trials))
    return sum(judged(losses, confidence) == expected for losses in series) / trials


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.03])
@pytest.mark.parametrize("points", [5, 16])
@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
def test_false_alarms_are_as_rare_as_promised(confidence: float, points: int, noise: float) -> None:
    wrong = 1 - confidence
    sampling = 3 * (wrong * confidence / TRIALS) ** 0.5
    # On the edge of what is worth having, where to be wrong is easiest.
    assert share(Course.LEVEL, fall=WORTH / AHEAD, noise=noise, points=points, confidence=confidence) < wrong + sampling
    assert share(Course.LEVEL, fall=2 * WORTH / AHEAD, noise=noise, points=points, confidence=confidence) < wrong
    assert share(Course.FALLING, fall=0.0, noise=noise, points=points, confidence=confidence) < wrong + sampling


def test_what_is_clear_is_nearly_always_seen() -> None:
    assert share(Course.LEVEL, fall=0.0, noise=0.003, points=5, confidence=0.9) > 0.95
    assert share(Course.FALLING, fall=0.03, noise=0.01, points=5, confidence=0.9) > 0.95
    assert share(Course.LEVEL, fall=0.0, noise=0.03, points=16, confidence=0.9) > 0.7


def test_a_decelerating_loss_is_called_level_once_it_is() -> None:
    """2 e^(-b / 6) + 1 falls by less than 3 % in 5 boundaries from boundary 23 on; the window looks back over 5."""
    rng = random.Random(3)
    first = []
    for _ in range(200):
        losses = [2 * 2.718281828 ** (-b / 6) + 1 + rng.gauss(0, 0.004) for b in range(60)]
        first.append(next(b for b in range(5, 60) if judged(losses[b - 4 : b + 1]) == Course.LEVEL))
    assert 22 <= statistics.median(first) <= 32
    assert min(first) >= 17
