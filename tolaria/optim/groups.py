"""Named groups of named parameters in an optimizer: how they are read, and made again."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import TolariaError

IDENTITY_KEYS = frozenset({"params", "name", "param_names"})
MACHINE_KEYS = frozenset({"fused", "foreach", "capturable", "differentiable"})
"""How an update is computed, not what it is: this machine's choice, so neither saved nor carried to another class."""


class OptimizerStateError(TolariaError, RuntimeError):
    """Optimizer state can not be matched to parameters by name. The optimizer that was given is unchanged."""


def group_name(group: Mapping[str, Any]) -> str:
    """The group's ``"name"``. Raises OptimizerStateError when it has none."""
    if "name" not in group:
        raise OptimizerStateError("an optimizer group has no 'name'; build the optimizer with build_optimizer")
    return str(group["name"])


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the group says besides whose group it is: lr, weight_decay, ..."""
    return {key: value for key, value in group.items() if key not in IDENTITY_KEYS}


def further_options(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The group's options that the optimizer's class does not know, such as a bound on its gradient's norm."""
    known = optimizer.defaults.keys() | MACHINE_KEYS
    return {key: value for key, value in options_of(group).items() if key not in known}


def named_parameters(optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameter name -> parameter, over all groups in order. Raises OptimizerStateError where names are missing."""
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names")
        if names is None or len(names) != len(group["params"]):
            raise OptimizerStateError(f"group {group_name(group)!r} does not name its parameters ('param_names')")
        found.update(zip(names, group["params"], strict=True))
    return found


def state_of(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    """The parameter's state, empty when it was never updated."""
    # Optimizer.state is a defaultdict: plain indexing would create an entry.
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return state


def blank_like(optimizer: Optimizer, entries: list[dict[str, Any]]) -> Optimizer:
    """A new optimizer of the same class and defaults over ``entries``, without state.

    Raises OptimizerStateError when the class can not be constructed from its defaults, or does not take a parameter.
    """
    cls = type(optimizer)
    # Defaults may hold what the constructor does not take (AdamW: decoupled_weight_decay).
    accepted = inspect.signature(cls).parameters
    arguments = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    try:
        return cls(entries, **arguments)
    except (TypeError, ValueError) as error:
        raise OptimizerStateError(f"{cls.__name__} can not be built from its defaults: {error}") from error


def state_it_would_make(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state that a first step with the group's options and a gradient of zero leaves of such a parameter.

    Found by taking one with a stand-in: the optimizer itself is the only place that knows its keys, their first values,
    dtypes and devices ("step" is on the CPU or beside the parameter, as fused and capturable say).
    """
    stand_in = torch.zeros_like(parameter, requires_grad=True)
    stand_in.grad = torch.zeros_like(parameter)
    probe = blank_like(optimizer, [{**options_of(group), "params": [stand_in]}])
    probe.step()
    return {key: value for key, value in state_of(probe, stand_in).items() if value is not None}


def listed(names: list[str], limit: int = 5) -> str:
    """Names for an error message, the first few of them."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
