"""The kept course of a run that went back, and thinning that loses no peak."""

import math

from hypothesis import given
from hypothesis import strategies as st

from tolaria.view.curves import MOST, Curve, Point, courses, kept_pieces, thinned


def curve_of(*pairs: tuple[int, float]) -> Curve:
    curve = Curve()
    for step, value in pairs:
        curve.add(step, value)
    return curve


def test_a_return_leaves_a_branch_and_the_kept_line_never_goes_backwards() -> None:
    found = courses(curve_of((1, 0.9), (2, 0.8), (3, 5.0), (4, 9.0), (3, 0.7), (4, 0.6)))
    assert found.kept == [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6)]
    assert found.left == [[(2, 0.8), (3, 5.0), (4, 9.0)]]  # it goes off where the new course begins


def test_a_second_return_behind_the_first_takes_that_course_along() -> None:
    found = courses(curve_of((1, 1.0), (2, 2.0), (3, 3.0), (3, 3.5), (4, 4.0), (2, 2.5), (3, 3.7)))
    assert [point.value for point in found.kept] == [1.0, 2.5, 3.7]
    assert [[point.value for point in branch] for branch in found.left] == [[1.0, 2.0, 3.0], [1.0, 3.5, 4.0]]


def test_no_points_are_no_course() -> None:
    assert courses(Curve()) == ([], [])


def test_what_was_no_number_stays_a_gap() -> None:
    found = courses(curve_of((1, math.inf), (2, 1.0)))
    assert math.isnan(found.kept[0].value) and found.kept[1] == (2, 1.0)


@given(st.lists(st.integers(0, 30), max_size=60))
def test_kept_steps_rise_and_every_index_is_in_one_piece(steps: list[int]) -> None:
    pieces = list(kept_pieces(steps))
    kept = [steps[i] for start, stop, _ in pieces for i in range(start, stop)]
    assert kept == sorted(set(kept))
    assert [i for start, _, end in pieces for i in range(start, end)] == list(range(len(steps)))
    assert not steps or kept[-1] == steps[-1]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 40))
def test_thinning_keeps_least_and_greatest_and_the_order(values: list[float], buckets: int) -> None:
    points = [Point(step, value) for step, value in enumerate(values)]
    found = thinned(points, 0, len(values), buckets)
    assert len(found) <= max(2 * buckets + 2, 1)
    assert (min(found, key=lambda p: p.value).value, max(found, key=lambda p: p.value).value) == (
        min(values),
        max(values),
    )
    assert [point.step for point in found] == sorted({point.step for point in found})


def test_a_million_steps_keep_their_one_peak() -> None:
    curve = Curve()
    for step in range(1_000_000):
        curve.add(step, 100.0 if step == 123_457 else 1.0)
    kept = courses(curve).kept
    assert len(kept) <= MOST + 2
    assert [point.step for point in kept if point.value > 1] == [123_457]
