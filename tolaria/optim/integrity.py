"""Writing learning rates into an optimizer's groups, and noticing when somebody else did.

A rate is a Python float, or a 0-D tensor that compiled or captured code reads; a tensor is written in place. Where it
lies on a device, its version counter is compared and not its value: reading that would wait for the device.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

RELATIVE_TOLERANCE = 1e-6
ABSOLUTE_TOLERANCE = 1e-12


class LRViolation(NamedTuple):
    """Somebody else wrote a learning rate: ``found`` stood in the group where ``expected`` was left."""

    step: int
    group: str
    expected: float
    found: float


class _Left(NamedTuple):
    """What was left in a group: the rate, and for a tensor which one and its version after the write."""

    rate: float
    tensor: Tensor | None
    version: int


class RateWriter:
    """Remembers what it left in each group. Local; never holds the optimizer."""

    def __init__(self) -> None:
        self._left: dict[str, _Left] = {}

    def write(self, groups: Iterable[tuple[dict[str, Any], float]], step: int) -> list[LRViolation]:
        """Write a rate into each group; what was there and is not what the last call left is reported.

        A group met for the first time, or for the first time since `forget`, has nothing to be compared with.
        """
        violations = []
        tensors: set[int] = set()
        for group, rate in groups:
            name, present, left = group["name"], group["lr"], self._left.get(group["name"])
            if left is not None and not _is_untouched(present, left):
                violations.append(LRViolation(step, name, left.rate, float(present)))
            if isinstance(present, Tensor):
                if id(present) in tensors:
                    # An optimizer made with a tensor as its rate gives all its groups that one.
                    group["lr"] = present = present.clone()
                tensors.add(id(present))
                present.fill_(rate)
                self._left[name] = _Left(rate, present, present._version)
            else:
                group["lr"] = rate
                self._left[name] = _Left(rate, None, 0)
        return violations

    def forget(self, name: str | None = None) -> None:
        """Forget what was left in one group, or in all."""
        if name is None:
            self._left.clear()
        else:
            self._left.pop(name, None)


def _is_untouched(present: Any, left: _Left) -> bool:
    ours = left.tensor
    if ours is not None and present is ours and ours.device.type != "cpu" and ours._version == left.version:
        return True
    # False for NaN too.
    return abs(float(present) - left.rate) <= max(RELATIVE_TOLERANCE * abs(left.rate), ABSOLUTE_TOLERANCE)
