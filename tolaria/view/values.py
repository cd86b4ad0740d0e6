"""Values out of files that another version may have written: of the right type, or the answer for "not told"."""

import math
from collections.abc import Mapping
from typing import Any


def text(value: object) -> str:
    """A string as it is; anything else is none."""
    return value if isinstance(value, str) else ""


def whole(value: object, default: int = 0) -> int:
    """A whole number; ``default`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return default
    return int(value)


def real(value: object) -> float | None:
    """A number, also one that JSON cannot hold ("NaN", "-Infinity"); None for anything else."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def numbers(value: object) -> dict[str, float]:
    """The numbers of a mapping by name; what is none is left out."""
    found = {str(name): real(entry) for name, entry in value.items()} if isinstance(value, Mapping) else {}
    return {name: entry for name, entry in found.items() if entry is not None}


def mapping(value: object) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    return dict(value) if isinstance(value, Mapping) else {}


def items(value: object) -> list[Any]:
    """The entries of a list; none of anything else."""
    return list(value) if isinstance(value, (list, tuple)) else []


def rows(value: object) -> list[dict[str, Any]]:
    """A list of JSON objects; what is none is left out."""
    return [dict(entry) for entry in items(value) if isinstance(entry, Mapping)]
