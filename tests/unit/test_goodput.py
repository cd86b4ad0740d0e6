"""The clock that splits a run's wall time: always in one category, the sum is the time, whatever happens."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolaria.compiled_code import compiling_seen
from tolaria.phases import unseen
from tolaria.telemetry.goodput import AGAIN, CATEGORIES, Ledger


class Now:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s

    def goes(self, seconds: float) -> None:
        self.s += seconds


def spent(ledger: Ledger) -> dict[str, float]:
    """What is not nothing, to a microsecond."""
    return {category: round(s, 6) for category, s in ledger.seconds().items() if s}


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def ledger(now: Now) -> Ledger:
    """A new run's clock, 5 s after the process began."""
    made = Ledger(began=95.0, clock=now)
    made.begin(0)
    return made


def test_what_comes_before_the_first_step_is_start_up_and_what_is_compiled_then_is_compile(now: Now) -> None:
    ledger = Ledger(began=95.0, clock=now)
    with ledger.phases("compile"):
        now.goes(3.0)
    now.goes(1.0)
    assert (ledger.activity, spent(ledger)) == ("start-up", {"start-up": 6.0, "compile": 3.0})
    ledger.begin(0)
    now.goes(2.0)
    assert (ledger.activity, spent(ledger)) == ("compute", {"start-up": 6.0, "compile": 3.0, "compute": 2.0})


def test_what_is_inside_another_category_is_its_own_and_the_outer_one_goes_on_behind_it(
    now: Now, ledger: Ledger
) -> None:
    with ledger.phases("boundary"):
        now.goes(1.0)
        with ledger.phases("validation"):
            now.goes(10.0)
            with ledger.phases("validation"):
                now.goes(20.0)
        now.goes(2.0)
        assert ledger.activity == "boundary"
    with ledger.phases("forward"):
        now.goes(4.0)
    assert spent(ledger) == {"start-up": 5.0, "boundary": 3.0, "validation": 30.0, "compute": 4.0}


def test_a_category_is_left_by_an_error_too(now: Now, ledger: Ledger) -> None:
    def lost() -> None:
        now.goes(1.0)
        raise RuntimeError

    with pytest.raises(RuntimeError), ledger.phases("boundary"), ledger.phases("validation"):
        lost()
    now.goes(2.0)
    assert (ledger.activity, spent(ledger)) == ("compute", {"start-up": 5.0, "validation": 1.0, "compute": 2.0})


def test_steps_that_had_been_reached_before_are_replayed_and_the_return_is_not(now: Now, ledger: Ledger) -> None:
    for step in range(1, 11):
        now.goes(1.0)
        ledger.at(step)
    with ledger.phases("rollback"):
        now.goes(0.5)
    ledger.at(7)
    for step in (8, 9):
        with ledger.phases("data"):
            now.goes(0.25)
            assert ledger.activity == "replayed"
        now.goes(0.75)
        ledger.at(step)
    with ledger.phases("paused"):
        now.goes(8.0)
        assert ledger.activity == "paused"
    now.goes(1.0)
    ledger.at(10)
    now.goes(1.0)
    ledger.at(11)
    assert spent(ledger) == {"start-up": 5.0, "compute": 11.0, "rollback": 0.5, "replayed": 3.0, "paused": 8.0}
    assert (ledger.own("data wait"), ledger.furthest) == (0.5, 11)


def test_a_later_start_goes_on_from_the_former_seconds_and_replays_up_to_the_furthest_step(now: Now) -> None:
    ledger = Ledger(began=95.0, former={"compute": 50.0, "start-up": 4.0}, furthest=20, gap_s=3.0, clock=now)
    with ledger.phases("compile"):
        now.goes(2.0)
        assert ledger.activity == "restart"
    ledger.begin(19)
    now.goes(1.0)
    ledger.at(20)
    now.goes(1.0)
    # From the last sign of life to the first step: 3 s without anybody, 5 of starting, 2 of compiling.
    assert spent(ledger) == {"compute": 51.0, "start-up": 4.0, "restart": 10.0, "replayed": 1.0}


def test_whatever_is_done_in_a_rehearsal_is_rehearsal_and_no_part_of_the_runs_own_steps(
    now: Now, ledger: Ledger
) -> None:
    now.goes(1.0)
    with ledger.phases("rehearsal"):
        for phase in ("data", "forward", "validation", "compile"):
            with ledger.phases(phase):  # type: ignore[arg-type]
                now.goes(2.0)
                assert ledger.activity == "rehearsal"
    now.goes(1.0)
    assert (spent(ledger), ledger.own("data wait")) == ({"start-up": 5.0, "compute": 2.0, "rehearsal": 8.0}, 0.0)


def test_time_can_be_told_to_have_been_another_category_only_as_far_as_nobody_has_booked_it(
    now: Now, ledger: Ledger
) -> None:
    now.goes(1.0)
    moment = ledger.now()
    now.goes(2.0)
    ledger.since(moment, "sync wait")
    now.goes(1.0)
    ledger.since(moment, "sync wait")  # the second in between is already told
    ledger.since(float("inf"), "sync wait")  # never noted: nothing
    assert spent(ledger) == {"start-up": 5.0, "compute": 1.0, "sync wait": 3.0}


moves = st.lists(st.one_of(
    st.sampled_from(["data", "sync", "boundary", "validation", "checkpoint", "rollback", "paused", "compile"]),
    st.just("leave"), st.integers(0, 6), st.floats(0, 3)))  # fmt: skip


@given(moves)
def test_the_sum_is_the_wall_time_after_any_course(course: list[str | int | float]) -> None:
    now = Now()
    ledger = Ledger(began=now.s, clock=now)
    ledger.begin(0)
    open_ = []
    for move in course:
        if move == "leave":
            if open_:
                open_.pop().__exit__(None, None, None)
        elif isinstance(move, str):
            open_.append(ledger.phases(move))  # type: ignore[arg-type]
            open_[-1].__enter__()
        elif isinstance(move, int):
            ledger.at(move)
        else:
            now.goes(move)
    assert sum(ledger.seconds().values()) == pytest.approx(now.s - 100.0)
    assert ledger.activity in CATEGORIES
    assert (ledger.activity == "replayed") <= (ledger.category in AGAIN)


def test_the_profiler_sees_the_phases_too_and_without_one_nothing_is_added(ledger: Ledger) -> None:
    seen = []

    class Range:
        def __init__(self, phase: str) -> None:
            self.phase = phase

        def __enter__(self) -> None:
            seen.append((self.phase, ledger.category))

        def __exit__(self, *_: object) -> None:
            seen.append((self.phase, "left"))

    assert ledger.beside(unseen) is ledger.phases
    both = ledger.beside(Range)  # type: ignore[arg-type]
    with both("data"), both("forward"):
        pass
    assert seen == [("data", "data wait"), ("forward", "data wait"), ("forward", "left"), ("data", "left")]
    assert isinstance(ledger.phases("forward"), nullcontext)


def test_a_compile_in_the_middle_of_a_step_is_compile_although_nobody_asked_for_it(ledger: Ledger, now: Now) -> None:
    def trace(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        assert ledger.activity == "compile"
        now.goes(7.0)
        return graph

    try:
        step = torch.compile(lambda x: x + 1, backend=trace)
        with compiling_seen(ledger), ledger.phases("forward"):
            step(torch.ones(3))
            now.goes(1.0)
            step(torch.ones(3))  # nothing new
    finally:
        torch._dynamo.reset()
    assert spent(ledger) == {"start-up": 5.0, "compile": 7.0, "compute": 1.0}


def test_what_is_held_together_is_of_one_category_whatever_is_entered_in_it(now: Now, ledger: Ledger) -> None:
    with ledger.phases("rehearsal"), ledger.undivided():
        now.goes(1.0)
        with ledger.phases("sync"), ledger.phases("compile"):
            now.goes(2.0)
            assert ledger.activity == "rehearsal"
        began = ledger.now()
        now.goes(3.0)
        ledger.since(began, "sync wait")
    with ledger.phases("sync"):
        now.goes(4.0)
    assert spent(ledger) == {"start-up": 5.0, "rehearsal": 6.0, "sync wait": 4.0}
