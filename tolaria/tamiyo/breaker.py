"""When to ask the policy, and how long to wait: a circuit breaker counted in boundaries.

    CLOSED --failures in a row, or one grave failure--> OPEN --rest boundaries--> HALF_OPEN (a short probe)
       ^                                                 ^                            |
       +---------------- successes in a row -------------|----------------------------+
                                                         +------- any failure --------+

Pure: the boundary number is its only clock, so the same course of answers always gives the same states. Lives on
rank 0; its state is saved with the run, so that a restart does not forget a dead policy.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tolaria.config_tamiyo import TamiyoConfig
from tolaria.leyline.types import CircuitState

GRAVE_CODES = frozenset({"auth", "version", "schema"})
"""Failures that another try will not mend and that may be an attack: the breaker opens at the first one."""


@dataclass
class _Record:
    state: int = int(CircuitState.CLOSED)
    failures: int = 0
    successes: int = 0
    boundary: int = 0
    opened_at: int = 0
    last_code: str = ""


class CircuitBreaker:
    """Call `allow` once per boundary; when it allows, report the outcome with `success` or `failure`."""

    def __init__(self, config: TamiyoConfig) -> None:
        self._config = config
        self._now = _Record()

    @property
    def state(self) -> CircuitState:
        """CLOSED: ask; OPEN: rest; HALF_OPEN: probe."""
        return CircuitState(self._now.state)

    @property
    def last_code(self) -> str:
        """Code of the newest failure; empty when there was none since the breaker closed."""
        return self._now.last_code

    def allow(self, boundary: int) -> int | None:
        """Milliseconds to wait for the policy at this boundary; None: do not ask at all.

        ``boundary`` never decreases except after a rollback; then the rest starts anew at the lower number.
        """
        now = self._now
        now.boundary = boundary
        if now.state == CircuitState.CLOSED:
            return self._config.deadline_ms
        if now.state == CircuitState.OPEN:
            now.opened_at = min(now.opened_at, boundary)
            if boundary - now.opened_at <= self._config.breaker_rest:
                return None
            now.state, now.successes = int(CircuitState.HALF_OPEN), 0
        return self._config.probe_deadline_ms

    def success(self) -> None:
        """The policy gave an acceptable answer at the boundary last allowed."""
        now = self._now
        now.failures = 0
        if now.state == CircuitState.HALF_OPEN:
            now.successes += 1
            if now.successes < self._config.breaker_successes:
                return
        now.state, now.last_code = int(CircuitState.CLOSED), ""

    def failure(self, code: str) -> None:
        """No acceptable answer at the boundary last allowed. ``code`` is that of `PolicyUnavailable`."""
        now = self._now
        now.failures += 1
        now.last_code = code
        enough = now.failures >= self._config.breaker_failures
        if enough or code in GRAVE_CODES or now.state == CircuitState.HALF_OPEN:
            now.state, now.opened_at, now.successes = int(CircuitState.OPEN), now.boundary, 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, whole."""
        return asdict(self._now)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises ValueError, changing nothing, on anything else."""
        expected = asdict(_Record())
        same_types = set(state) == set(expected) and all(type(state[k]) is type(expected[k]) for k in expected)
        if not same_types:
            raise ValueError(f"breaker state {dict(state)!r}: expected the keys and types of {expected!r}")
        CircuitState(state["state"])
        self._now = _Record(**state)
