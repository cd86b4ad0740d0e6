"""How a configuration key is declared and checked."""

from dataclasses import field
from typing import Any


def doc(default: Any, text: str) -> Any:
    """A field with a default and the help text that ``--help`` shows (unit included)."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def require(ok: bool, key: str, value: Any, accepted: str) -> None:
    """Raise ValueError naming the key, the value and what is accepted, unless ``ok``."""
    if not ok:
        raise ValueError(f"{key}={value!r}: expected {accepted}")
