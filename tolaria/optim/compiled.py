"""The optimizer step through torch.compile: one graph per parameter group, with the learning rate as an input.

A rate that is a Python float is part of what was compiled, so every change of it compiles again; a 0-D tensor is read
each time. Groups are stepped one by one, since which of them have gradients is part of the graph too: freezing one, or
a new one, leaves the others' graphs as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_FORM = {"fused": False, "foreach": None}
"""The form of the update that can be compiled; it is taken into one kernel all the same."""


class CompiledStep:
    """Steps an optimizer whose groups are named. Local. The first step of each group blocks for its compilation.

    A change of another hyperparameter than the learning rate compiles that group again. Hooks on the optimizer's step
    run once for each group.
    """

    def __init__(self) -> None:
        # On the CPU: reading them there waits for no device.
        self._rates: dict[str, Tensor] = {}
        self._steps: dict[str, Callable[[Optimizer], None]] = {}

    def __call__(self, optimizer: Optimizer) -> None:
        """One update of every group that has a gradient; what it changes is what ``optimizer.step()`` would."""
        groups = optimizer.param_groups
        try:
            for group in groups:
                if all(parameter.grad is None for parameter in group["params"]):
                    continue
                self._make_ready(group)
                optimizer.param_groups = [group]
                self._step_of(group["name"])(optimizer)
        finally:
            optimizer.param_groups = groups

    def _make_ready(self, group: dict[str, Any]) -> None:
        group.update({key: value for key, value in _FORM.items() if key in group})
        rate = self._rates.setdefault(group["name"], torch.zeros((), dtype=torch.float64))
        if group["lr"] is not rate:
            # Always the same tensor, also when the group was made again or restored: another one is another input.
            rate.fill_(float(group["lr"]))
            group["lr"] = rate

    def _step_of(self, name: str) -> Callable[[Optimizer], None]:
        if name not in self._steps:
            self._steps[name] = torch.compile(_step, dynamic=False)
        return self._steps[name]


def _step(optimizer: Optimizer) -> None:
    optimizer.step()
