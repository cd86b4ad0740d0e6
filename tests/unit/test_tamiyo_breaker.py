"""The breaker's whole course, boundary by boundary."""

import json

import pytest

from tolaria.config import TamiyoConfig
from tolaria.leyline.types import CircuitState
from tolaria.tamiyo.breaker import CircuitBreaker

CONFIG = TamiyoConfig(deadline_ms=2000, probe_deadline_ms=500, breaker_failures=3, breaker_rest=5, breaker_successes=2)


def drive(breaker: CircuitBreaker, outcomes: str, first: int = 1) -> list[int | None]:
    """What each boundary was allowed; '.' answered, 'x' timed out, 'a' bad signature. Ignored where not asked."""
    allowed = []
    for boundary, outcome in enumerate(outcomes, start=first):
        allowed.append(breaker.allow(boundary))
        if allowed[-1] is None:
            continue
        if outcome == ".":
            breaker.success()
        else:
            breaker.failure("auth" if outcome == "a" else "timeout")
    return allowed


def test_a_dead_policy_costs_three_deadlines_and_then_only_rare_probes() -> None:
    breaker = CircuitBreaker(CONFIG)
    allowed = drive(breaker, "x" * 15)
    assert allowed == [2000] * 3 + [None] * 5 + [500] + [None] * 5 + [500]
    assert breaker.state == CircuitState.OPEN
    assert breaker.last_code == "timeout"


def test_two_answered_probes_close_it() -> None:
    breaker = CircuitBreaker(CONFIG)
    allowed = drive(breaker, "xxx......" + "." + "..")
    assert allowed[8:] == [500, 500, 2000, 2000]
    assert breaker.state == CircuitState.CLOSED
    assert breaker.last_code == ""


def test_between_the_probes_it_is_half_open() -> None:
    breaker = CircuitBreaker(CONFIG)
    drive(breaker, "xxx......")
    assert breaker.state == CircuitState.HALF_OPEN
    breaker.allow(10)
    breaker.failure("timeout")
    assert breaker.state == CircuitState.OPEN
    assert breaker.allow(11) is None


def test_only_failures_in_a_row_count() -> None:
    breaker = CircuitBreaker(CONFIG)
    assert drive(breaker, "xx.xx.xx.") == [2000] * 9
    assert breaker.state == CircuitState.CLOSED


@pytest.mark.parametrize("code", ["auth", "schema"])
def test_grave_failures_open_it_at_once(code: str) -> None:
    breaker = CircuitBreaker(CONFIG)
    breaker.allow(1)
    breaker.failure(code)
    assert breaker.state == CircuitState.OPEN
    assert breaker.last_code == code
    assert breaker.allow(2) is None


def test_a_rollback_to_an_earlier_boundary_does_not_lengthen_the_rest_for_ever() -> None:
    breaker = CircuitBreaker(CONFIG)
    drive(breaker, "xxx", first=1000)
    assert drive(breaker, "......", first=1) == [None] * 6
    assert breaker.allow(7) == 500


def test_saved_and_loaded_at_any_boundary_it_goes_on_the_same() -> None:
    outcomes = "x.xxx.....x......a......."
    whole = drive(CircuitBreaker(CONFIG), outcomes)
    assert None in whole and 500 in whole
    for cut in range(len(outcomes)):
        first, second = CircuitBreaker(CONFIG), CircuitBreaker(CONFIG)
        allowed = drive(first, outcomes[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert allowed + drive(second, outcomes[cut:], first=cut + 1) == whole


@pytest.mark.parametrize(
    "damage", [{"state": 7}, {"state": "1"}, {"failures": True}, {"extra": 1}, {"last_code": None}]
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: dict[str, object]) -> None:
    breaker = CircuitBreaker(CONFIG)
    drive(breaker, "xx")
    before = breaker.state_dict()
    with pytest.raises(ValueError, match=r"breaker state|CircuitState"):
        breaker.load_state_dict({**before, **damage})
    assert breaker.state_dict() == before
