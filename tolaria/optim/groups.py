"""Named groups of named parameters in an optimizer: how they are read, and made again."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import TolariaError

IDENTITY_KEYS = frozenset({"params", "name", "param_names"})


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

    Raises OptimizerStateError when the class can not be constructed from its defaults.
    """
    cls = type(optimizer)
    # Defaults may hold what the constructor does not take (AdamW: decoupled_weight_decay).
    accepted = inspect.signature(cls).parameters
    arguments = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    try:
        return cls(entries, **arguments)
    except TypeError as error:
        raise OptimizerStateError(f"{cls.__name__} can not be built again from its defaults: {error}") from error


def listed(names: list[str], limit: int = 5) -> str:
    """Names for an error message, the first few of them."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
