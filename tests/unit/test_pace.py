"""Who holds the others up."""

import pytest

from tolaria.telemetry.pace import NO_STEPS, Pace, data_bound, slowness, stragglers


@pytest.mark.parametrize(("own_ms", "slow"), [
    pytest.param([10.0, 10.0], [], id="equal"),
    pytest.param([10.0, 29.0], [], id="less than the ratio"),
    pytest.param([10.0, 31.0], [1], id="more than the ratio"),
    pytest.param([1.0, 5.0], [], id="too little to hold anybody up"),
    pytest.param([50.0], [], id="nobody to hold up"),
    pytest.param([10.0, 11.0, 9.0, 80.0, 90.0], [3, 4], id="two of five"),
    pytest.param([0.0, 0.0], [], id="no step yet"),
])  # fmt: skip
def test_a_straggler_takes_more_than_the_ratio_of_the_others_median(own_ms: list[float], slow: list[int]) -> None:
    assert stragglers(own_ms, 3.0) == slow
    assert stragglers(own_ms, 0.0) == []


def test_a_single_hiccup_makes_no_straggler_and_each_window_begins_anew() -> None:
    pace = Pace()
    for seconds in (0.01, 2.0, 0.01):
        pace.add(seconds, 3 * seconds, seconds / 2)
    assert pace.take(waited_s=0.6) == pytest.approx((10.0, 30.0, 5.0, 200.0))
    assert pace.take(waited_s=0.6) == NO_STEPS
    pace.add(0.01, 0.03, 0.002)
    assert pace.take(waited_s=0.61) == pytest.approx((10.0, 30.0, 2.0, 10.0))


def test_a_straggler_is_told_with_its_data_where_that_is_what_it_takes_longer() -> None:
    assert slowness(1, [5.0, 45.0, 6.0], [0.2, 40.0, 0.3]) == "rank 1 waits 40 ms a step for its data, the others 0 ms"
    assert slowness(1, [5.0, 45.0], [1.0, 8.0]) == "rank 1: 45 ms a step of its own, the others 5 ms"
    # Waiting for data as everybody does is not what makes it slow.
    assert slowness(1, [50.0, 90.0], [40.0, 41.0]) == "rank 1: 90 ms a step of its own, the others 50 ms"


@pytest.mark.parametrize(("data_ms", "step_ms", "told"), [
    pytest.param([40.0, 42.0], 50.0, "every rank waits 40 of 50 ms a step for its data", id="all of them"),
    pytest.param([40.0], 50.0, "it waits 40 of 50 ms a step for its data", id="alone"),
    pytest.param([40.0, 1.0], 50.0, "", id="one of them: that is a straggler"),
    pytest.param([20.0, 20.0], 50.0, "", id="less than for the rest"),
    pytest.param([4.0], 5.0, "", id="too little to mind"),
    pytest.param([], 0.0, "", id="no step"),
])  # fmt: skip
def test_data_that_holds_every_step_up_is_told(data_ms: list[float], step_ms: float, told: str) -> None:
    assert data_bound(data_ms, step_ms) == told
