"""How a configuration key is declared and checked."""

from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple, TypeAlias

Scalar: TypeAlias = bool | int | float | str


def doc(default: Any, text: str) -> Any:
    """A field with a default and the help text that ``--help`` shows (unit included)."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def require(ok: bool, key: str, value: Any, accepted: str) -> None:
    """Raise ValueError naming the key, the value and what is accepted, unless ``ok``."""
    if not ok:
        raise ValueError(f"{key}={value!r}: expected {accepted}")


class Range(NamedTuple):
    """Which numbers a key takes, and how that is said."""

    holds: Callable[[float], bool]
    accepted: str


NOT_NEGATIVE = Range(lambda value: value >= 0, "0 or more")
POSITIVE = Range(lambda value: value > 0, "more than 0")
ONE_OR_MORE = Range(lambda value: value >= 1, "1 or more")
SHARE = Range(lambda value: 0 <= value <= 1, "0 to 1")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "0 <= value < 1")


def require_range(part: object, section: str, allowed: Range, *keys: str) -> None:
    """Raise ValueError for the first of these keys of a section whose number is none that it takes."""
    for key in keys:
        value = getattr(part, key)
        require(allowed.holds(value), f"{section}.{key}", value, allowed.accepted)
