"""The optimizer step through torch.compile: one graph per parameter group, with the learning rate as an input.

A rate that is a Python float is part of what was compiled, so every change of it compiles again; a 0-D tensor is read
each time. Groups are stepped one by one, since which of them have gradients is part of the graph too, and each by an
optimizer of its own that outlives the run's: what was compiled belongs to one optimizer object, and growth makes new
ones. So freezing a group, or a new one, leaves the others' graphs as they are.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.optim.groups import blank_like, options_of

_FORM = {"fused": False, "foreach": None}
"""The form of the update that can be compiled; it is taken into one kernel all the same."""

_EXTENTS = (2, 3, 5, 7, 2, 3)
"""Of the stand-in, as many as the parameter has dimensions."""

# All groups run the same code, of which dynamo compiles only so many forms together; older versions know no other way.
_APART: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


class CompiledStep:
    """Steps an optimizer whose groups are named. Local.

    The first step of each group blocks for its compilation. A change of another hyperparameter than the learning rate
    compiles that group again, once for each value. Hooks on the optimizer's step are not called.
    """

    def __init__(self) -> None:
        self._groups: dict[str, _OneGroup] = {}
        self._rehearsed: set[type[Optimizer]] = set()

    def __call__(self, optimizer: Optimizer) -> None:
        """One update of every group that has a gradient; what it changes is what ``optimizer.step()`` would."""
        for group in optimizer.param_groups:
            if any(parameter.grad is not None for parameter in group["params"]):
                self._of(optimizer, group).step(optimizer, group)
        gone = self._groups.keys() - {group["name"] for group in optimizer.param_groups}
        for name in gone:
            del self._groups[name]

    def rehearse(self, optimizer: Optimizer) -> None:
        """Compile the step of a small stand-in, to see whether steps of this class can be compiled here; once.

        Raises what torch.compile raises. The optimizer is not touched.
        """
        if type(optimizer) in self._rehearsed:
            return
        group = optimizer.param_groups[0]
        stand_in = torch.zeros(_EXTENTS[: group["params"][0].ndim], device=group["params"][0].device)
        stand_in.grad = torch.zeros_like(stand_in)
        own = {**options_of(group), **_form_of(group), "params": [stand_in]}
        torch.compile(_step, dynamic=False, **_APART)(blank_like(optimizer, [own]))
        self._rehearsed.add(type(optimizer))

    def _of(self, optimizer: Optimizer, group: dict[str, Any]) -> "_OneGroup":
        own = self._groups.get(group["name"])
        if own is None or not own.fits(optimizer, group):
            own = self._groups[group["name"]] = _OneGroup(optimizer, group)
        return own


class _OneGroup:
    """One parameter group, its optimizer, and the compiled steps of it by the group's other options."""

    def __init__(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        # On the CPU: reading it there waits for no device.
        self._rate = torch.zeros((), dtype=torch.float64)
        self._optimizer = blank_like(optimizer, [{**group, **_form_of(group), "lr": self._rate}])
        self._steps: dict[str, Callable[[Optimizer], None]] = {}

    def fits(self, optimizer: Optimizer, group: dict[str, Any]) -> bool:
        """Whether it was made for these very parameters in an optimizer of this class."""
        own = self._optimizer.param_groups[0]["params"]
        same = len(own) == len(group["params"]) and all(a is b for a, b in zip(own, group["params"], strict=True))
        return same and type(optimizer) is type(self._optimizer)

    def step(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        """One update; rate, options and state are those of ``group`` in the run's optimizer."""
        group.update(_form_of(group))
        if group["lr"] is not self._rate:
            # Always the same tensor, also when the group was made again or restored: another one is another input.
            self._rate.fill_(float(group["lr"]))
            group["lr"] = self._rate
        options = {key: group[key] for key in self._optimizer.defaults if key != "lr"}
        self._optimizer.param_groups[0].update(options)
        for parameter in group["params"]:
            self._share_state(optimizer, parameter)
        key = repr(options)
        if key not in self._steps:
            self._steps[key] = torch.compile(_step, dynamic=False, **_APART)
        self._steps[key](self._optimizer)
        for parameter in group["params"]:
            if parameter in self._optimizer.state:
                optimizer.state[parameter] = self._optimizer.state[parameter]

    def _share_state(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Let both optimizers hold the same state: the run's is what counts, its form in memory is ours."""
        theirs, ours = optimizer.state.get(parameter), self._optimizer.state.get(parameter)
        if theirs is ours:
            return
        if theirs is None:
            del self._optimizer.state[parameter]
        elif ours is None:
            self._optimizer.state[parameter] = theirs
        else:
            ours.clear()
            ours.update(theirs)


def _form_of(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _FORM.items() if key in group}


def _step(optimizer: Optimizer) -> None:
    optimizer.step()
