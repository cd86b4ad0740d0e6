"""What sinks are given: the numbers of a step, or an event, as one record."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from tolaria.telemetry.events import Level

STEP = "step"
"""Kind of the records that metrics.jsonl holds as well; every other kind is an event's."""
BOUNDARY = "boundary"


class Record(NamedTuple):
    """``sequence`` counts the records of one start of a run from 1, so that what a sink has dropped shows as a gap.

    ``step``, ``branch``: where the run was; a return to an earlier state goes on at a lower step of a higher branch.
    ``wall_ns``: Unix time. ``fields``: as in the line of the file, numbers as numbers.
    """

    sequence: int
    kind: str
    level: Level
    rank: int
    step: int
    branch: int
    wall_ns: int
    fields: Mapping[str, Any]


class Sink(Protocol):
    """Somewhere records go. Everything but the making of it happens in one thread of its own.

    An OSError means that it may work again: the sink rests, and is tried again. Any other exception means that it is
    broken, and it is given up. Neither is the run's trouble.
    """

    @property
    def name(self) -> str:
        """As events and counters call it."""
        ...

    @property
    def where(self) -> str:
        """Where what it is given can be found."""
        ...

    def write(self, record: Record) -> None:
        """Take one record; may block."""
        ...

    def flush(self) -> None:
        """Let go what was kept back, try again what failed; called several times a second, when no record waits."""
        ...

    def close(self) -> None:
        """The run is over, or the sink was given up: let go of files and sockets."""
        ...
