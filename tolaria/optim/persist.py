"""An optimizer's state and options by name, for checkpoints, digests and broadcasts. All functions are local."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import CheckpointMismatch
from tolaria.optim.groups import (
    MACHINE_KEYS,
    FirstStates,
    OptimizerStateError,
    further_options,
    group_name,
    listed,
    named_parameters,
    options_of,
    room_for,
    state_of,
)

Scalar: TypeAlias = bool | int | float | str


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``"<parameter name>/<key>"`` -> live tensor (no copy).

    Parameters that were never updated have none. Raises OptimizerStateError for state that is neither a tensor nor a
    plain value.
    """
    return {name: value for name, value in _state(optimizer) if isinstance(value, Tensor)}


def without_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a run without those of its optimizer, whose names begin with ``optim/``."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("optim/")}


def state_scalars(optimizer: Optimizer) -> dict[str, Scalar]:
    """The part of the state that is plain numbers, truth values or text, named as in `state_tensors`; JSON-able.

    Raises what `state_tensors` raises.
    """
    return {name: value for name, value in _state(optimizer) if not isinstance(value, Tensor)}


def load_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Scalar]) -> None:
    """Replace the optimizer's whole state by copies of what `state_tensors` and `state_scalars` gave.

    State that has the form already is overwritten in place. Parameters without an entry end up without state.
    Raises CheckpointMismatch, with nothing changed, when a name is unknown, or a parameter's keys, a shape or a
    dtype are not those that this optimizer would make itself.
    """
    if has_form(optimizer, tensors, scalars):
        copy_tensors(tensors, state_tensors(optimizer))
        set_scalars(optimizer, scalars)
        return
    saved: dict[str, dict[str, Any]] = {}
    for full_name, value in (*tensors.items(), *scalars.items()):
        name, _, key = full_name.rpartition("/")
        saved.setdefault(name, {})[key] = value
    unknown = sorted(saved.keys() - named_parameters(optimizer).keys())
    if unknown:
        raise CheckpointMismatch(f"saved optimizer state of parameters that are not trained here: {listed(unknown)}")
    loaded: list[tuple[Tensor, dict[str, Any]]] = []
    first = FirstStates(optimizer)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in saved:
                own = first.of(group, parameter, saved[name])
                loaded.append((parameter, _filled(name, parameter, own, saved[name])))
    optimizer.state.clear()
    for parameter, state in loaded:
        optimizer.state[parameter] = state


def has_form(optimizer: Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Scalar]) -> bool:
    """Whether the optimizer's state has exactly these tensors, by name, shape and type, and scalars, by name."""
    return same_form(state_tensors(optimizer), tensors) and state_scalars(optimizer).keys() == scalars.keys()


def set_scalars(optimizer: Optimizer, scalars: Mapping[str, Scalar]) -> None:
    """Overwrite the scalars of the state by those of the same names. Raises KeyError for an unknown parameter."""
    parameters = named_parameters(optimizer)
    for full_name, value in scalars.items():
        name, _, key = full_name.rpartition("/")
        optimizer.state[parameters[name]][key] = value


def same_form(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names with the same shapes and types."""
    return one.keys() == other.keys() and all(
        (t.shape, t.dtype) == (other[n].shape, other[n].dtype) for n, t in one.items()
    )


def copy_tensors(source: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Overwrite every live tensor by the source's of that name, in place."""
    if not source:
        return
    with torch.no_grad():
        torch._foreach_copy_([live[name] for name in source], list(source.values()))


def group_options(optimizer: Optimizer, *, rates: bool = True) -> list[dict[str, Any]]:
    """Each group's name, parameter names and options (lr, weight_decay, ...), JSON-able, in the groups' order.

    ``rates=False`` leaves "lr" out, for whoever computes it anew before each step. Raises OptimizerStateError for an
    option that JSON can not hold.
    """
    named_parameters(optimizer)
    return [
        {
            "name": group_name(group),
            "param_names": list(group["param_names"]),
            "options": {
                key: _plain(value, f"option {key!r} of group {group_name(group)!r}")
                for key, value in options_of(group).items()
                if key not in MACHINE_KEYS and (rates or key != "lr")
            },
        }
        for group in optimizer.param_groups
    ]


def load_group_options(optimizer: Optimizer, saved: Iterable[Mapping[str, Any]]) -> None:
    """Set the options that `group_options` gave, matched by group name.

    A group may have options that the optimizer's class does not know; afterwards it has those that were saved, and no
    others. Raises CheckpointMismatch, with nothing changed, unless the groups' names and each group's parameter names
    are the same.
    """
    by_name = {str(entry["name"]): entry for entry in saved}
    groups = {group_name(group): group for group in optimizer.param_groups}
    if by_name.keys() != groups.keys():
        raise CheckpointMismatch(f"saved optimizer groups: {sorted(by_name)}; trained here: {sorted(groups)}")
    for name, group in groups.items():
        differing = set(by_name[name]["param_names"]) ^ set(group["param_names"])
        if differing:
            raise CheckpointMismatch(f"optimizer group {name!r}: only on one side: {listed(sorted(differing))}")
    for name, group in groups.items():
        options = by_name[name]["options"]
        for key in further_options(optimizer, group).keys() - options.keys():
            del group[key]
        for key, value in options.items():
            if isinstance(group.get(key), Tensor):  # a learning rate that compiled code reads
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def _state(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Full name and value of all that is held of any parameter."""
    for name, parameter in named_parameters(optimizer).items():
        for key, value in state_of(optimizer, parameter).items():
            if value is None:
                continue
            if not isinstance(value, Tensor | Scalar):
                raise OptimizerStateError(f"state {key!r} of {name!r} is a {type(value).__name__}, not a tensor")
            yield f"{name}/{key}", value


def _filled(name: str, parameter: Tensor, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    if own.keys() != saved.keys():
        raise CheckpointMismatch(
            f"optimizer state of {name!r} holds {sorted(saved)}, this optimizer's has {sorted(own)}"
        )
    for key, value in saved.items():
        if _form(value) != _form(own[key]):
            raise CheckpointMismatch(
                f"optimizer state {key!r} of {name!r} is {_form(value)}; expected {_form(own[key])}"
            )
    return {
        key: room_for(value, parameter).copy_(saved[key]) if isinstance(value, Tensor) else saved[key]
        for key, value in own.items()
    }


def _form(value: Any) -> str:
    # Which kind of number it is may change as the optimizer goes on.
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "a plain value"


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    items = list(value) if isinstance(value, tuple | list) else [value]
    if not all(item is None or isinstance(item, bool | int | float | str) for item in items):
        raise OptimizerStateError(f"{what} is {value!r}: not JSON-able")
    return items if isinstance(value, tuple | list) else value
