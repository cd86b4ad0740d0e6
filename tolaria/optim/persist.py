"""An optimizer's state and options by name, for checkpoints, digests and broadcasts. All functions are local."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import CheckpointMismatch
from tolaria.optim.groups import (
    IDENTITY_KEYS,
    OptimizerStateError,
    blank_like,
    group_name,
    listed,
    named_parameters,
    options_of,
    state_of,
)

# How an update is computed, not what it is: this machine's choice, so neither saved nor loaded.
_MACHINE_KEYS = frozenset({"fused", "foreach", "capturable", "differentiable"})


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``"<parameter name>/<key>"`` -> live tensor (no copy).

    Parameters that were never updated have none. Raises OptimizerStateError for state that is not a tensor.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in named_parameters(optimizer).items():
        for key, value in state_of(optimizer, parameter).items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise OptimizerStateError(f"state {key!r} of {name!r} is a {type(value).__name__}, not a tensor")
            found[f"{name}/{key}"] = value
    return found


def load_state_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Replace the optimizer's whole state by copies of ``tensors``, named as `state_tensors` names them.

    State that has the form already is overwritten in place. Parameters without an entry end up without state.
    Raises CheckpointMismatch, with nothing changed, when a name is unknown, or a parameter's keys, a shape or a
    dtype are not those that this optimizer would make itself.
    """
    present = state_tensors(optimizer)
    if same_form(present, tensors):
        copy_tensors(tensors, present)
        return
    saved: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        saved.setdefault(name, {})[key] = tensor
    unknown = sorted(saved.keys() - named_parameters(optimizer).keys())
    if unknown:
        raise CheckpointMismatch(f"saved optimizer state of parameters that are not trained here: {listed(unknown)}")
    loaded: list[tuple[Tensor, dict[str, Tensor]]] = []
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in saved:
                own = _state_it_would_make(optimizer, group, parameter)
                loaded.append((parameter, _filled(name, own, saved[name])))
    optimizer.state.clear()
    for parameter, state in loaded:
        optimizer.state[parameter] = state


def same_form(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names with the same shapes and types."""
    return one.keys() == other.keys() and all(
        (t.shape, t.dtype) == (other[n].shape, other[n].dtype) for n, t in one.items()
    )


def copy_tensors(source: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Overwrite every live tensor by the source's of that name, in place."""
    with torch.no_grad():
        torch._foreach_copy_([live[name] for name in source], list(source.values()))


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Each group's name, parameter names and options (lr, weight_decay, ...), JSON-able, in the groups' order.

    Raises OptimizerStateError for an option that JSON can not hold.
    """
    named_parameters(optimizer)
    return [
        {
            "name": group_name(group),
            "param_names": list(group["param_names"]),
            "options": {
                key: _plain(value, f"option {key!r} of group {group_name(group)!r}")
                for key, value in options_of(group).items()
                if key not in _MACHINE_KEYS
            },
        }
        for group in optimizer.param_groups
    ]


def load_group_options(optimizer: Optimizer, saved: Iterable[Mapping[str, Any]]) -> None:
    """Set the options that `group_options` gave, matched by group name.

    Raises CheckpointMismatch, with nothing changed, unless the groups' names and each group's parameter names are the
    same and every saved option exists here.
    """
    by_name = {str(entry["name"]): entry for entry in saved}
    groups = {group_name(group): group for group in optimizer.param_groups}
    if by_name.keys() != groups.keys():
        raise CheckpointMismatch(f"saved optimizer groups: {sorted(by_name)}; trained here: {sorted(groups)}")
    for name, group in groups.items():
        differing = set(by_name[name]["param_names"]) ^ set(group["param_names"])
        if differing:
            raise CheckpointMismatch(f"optimizer group {name!r}: only on one side: {listed(sorted(differing))}")
        unknown = by_name[name]["options"].keys() - (group.keys() - IDENTITY_KEYS)
        if unknown:
            raise CheckpointMismatch(f"optimizer group {name!r}: unknown options {listed(sorted(unknown))}")
    for name, group in groups.items():
        for key, value in by_name[name]["options"].items():
            if isinstance(group[key], Tensor):  # a learning rate that compiled code reads
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def _state_it_would_make(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """The state that a first step with these options creates, found by making one with a stand-in parameter.

    The optimizer itself is the only place that knows its keys, their dtypes and devices ("step" is on the CPU or
    beside the parameter, as fused and capturable say).
    """
    stand_in = torch.zeros_like(parameter, requires_grad=True)
    stand_in.grad = torch.zeros_like(parameter)
    probe = blank_like(optimizer, [{**options_of(group), "params": [stand_in]}])
    probe.step()
    return {key: value for key, value in state_of(probe, stand_in).items() if isinstance(value, Tensor)}


def _filled(name: str, own: dict[str, Tensor], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    if own.keys() != saved.keys():
        raise CheckpointMismatch(
            f"optimizer state of {name!r} holds {sorted(saved)}, this optimizer's has {sorted(own)}"
        )
    for key, tensor in saved.items():
        if (tensor.shape, tensor.dtype) != (own[key].shape, own[key].dtype):
            raise CheckpointMismatch(
                f"optimizer state {key!r} of {name!r} is {tensor.dtype} {tuple(tensor.shape)}; "
                f"expected {own[key].dtype} {tuple(own[key].shape)}"
            )
    return {key: tensor.copy_(saved[key]) for key, tensor in own.items()}


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    items = list(value) if isinstance(value, tuple | list) else [value]
    if not all(item is None or isinstance(item, bool | int | float | str) for item in items):
        raise OptimizerStateError(f"{what} is {value!r}: not JSON-able")
    return items if isinstance(value, tuple | list) else value
