"""Named groups of named parameters in an optimizer: how they are read, and made again."""

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import TolariaError

IDENTITY_KEYS = frozenset({"params", "name", "param_names"})
MACHINE_KEYS = frozenset({"fused", "foreach", "capturable", "differentiable"})
"""How an update is computed, not what it is: this machine's choice, so neither saved nor carried to another class."""

_EXTENTS = (5, 7, 11, 13)  # no two alike: what is shaped as the parameter can be told from what is not


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


def over(optimizer: Optimizer, entries: list[dict[str, Any]]) -> Optimizer:
    """The same optimizer, its hooks and all else that it holds, over ``entries`` and without state.

    No constructor runs, so it costs nothing that grows with the parameters; what joins is checked by `blank_like`.
    """
    new = object.__new__(type(optimizer))
    new.__dict__.update(optimizer.__dict__)
    new.defaults = dict(optimizer.defaults)
    new.param_groups = [{**optimizer.defaults, **entry} for entry in entries]
    new.state = defaultdict(dict)
    return new


def first_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state that a first step with the group's options and a gradient of zero leaves of such a parameter.

    Found by taking one with a stand-in: the optimizer itself is the only place that knows its keys, their first values,
    dtypes and devices ("step" is on the CPU or beside the parameter, as fused and capturable say).
    """
    stand_in = torch.zeros_like(parameter, requires_grad=True)
    stand_in.grad = torch.zeros_like(parameter)
    probe = blank_like(optimizer, [{**options_of(group), "params": [stand_in]}])
    probe.step()
    return {key: value for key, value in state_of(probe, stand_in).items() if value is not None}


class FirstStates:
    """`first_state` of many parameters: one small stand-in for all that differ in nothing but their extents."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._small: dict[str, tuple[torch.Size, dict[str, Any]]] = {}

    def of(self, group: Mapping[str, Any], parameter: Tensor, expected: Mapping[str, Any]) -> dict[str, Any]:
        """The first state of a parameter, to be read only: tensors may be one number, expanded.

        Where it is not as ``expected``, by keys and dtypes, it is surely so.
        """
        if parameter.ndim <= len(_EXTENTS):
            shape, small = self._of_small(group, parameter)
            if small.keys() == expected.keys() and all(_scales(v, shape, expected[key]) for key, v in small.items()):
                return {key: _enlarged(value, parameter) for key, value in small.items()}
        return first_state(self._optimizer, group, parameter)

    def small(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """That of the stand-in: the same keys, dtypes, devices and numbers, another shape."""
        return self._of_small(group, parameter)[1]

    def _of_small(self, group: Mapping[str, Any], parameter: Tensor) -> tuple[torch.Size, dict[str, Any]]:
        options = sorted(options_of(group).items())
        kind = repr((parameter.dtype, parameter.device, parameter.ndim, options))
        if kind not in self._small:
            stand_in = parameter.new_empty(_EXTENTS[: parameter.ndim])
            self._small[kind] = (stand_in.shape, first_state(self._optimizer, group, stand_in))
        return self._small[kind]


def _scales(value: Any, shape: torch.Size, expected: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return True
    if not isinstance(expected, Tensor) or value.dtype != expected.dtype:
        return False  # a class may hold large parameters in another form than small ones
    return value.shape == shape and bool((value == value.reshape(-1)[0]).all())


def _enlarged(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0:
        return value.clone()
    return value.reshape(-1)[0].expand(parameter.shape)


def room_for(value: Tensor, parameter: Tensor) -> Tensor:
    """Memory for state of this form, laid out as the parameter is where it has its shape. Not initialised."""
    like = parameter if value.shape == parameter.shape else value
    return torch.empty_like(like, dtype=value.dtype, device=value.device, requires_grad=False)


def listed(names: list[str], limit: int = 5) -> str:
    """Names for an error message, the first few of them."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
