"""Who holds the others up."""

import pytest

from tolaria.telemetry.pace import Pace, stragglers


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
        pace.add(seconds, 3 * seconds)
    assert pace.take() == pytest.approx((10.0, 30.0))
    assert pace.take() == (0.0, 0.0)
