"""Optimizers over named groups of named parameters, rebuilt when the model changes, state carried over by name.

An optimizer's state is keyed by tensor object and saved by position; neither survives a model that grows. Here every
group has a ``"name"`` and ``"param_names"``, and growth, cull and change of shape build a new optimizer whose state is
matched by parameter name. What can not be matched raises; nothing is lost silently. All functions are local.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Muon, Optimizer

from tolaria.config import OptimConfig
from tolaria.errors import ConfigError, TaskError
from tolaria.optim.classes import BUILT_IN, FUSED, keywords, optimizer_class
from tolaria.optim.groups import (
    MACHINE_KEYS,
    FirstStates,
    OptimizerStateError,
    blank_like,
    group_name,
    listed,
    named_parameters,
    options_of,
    over,
    room_for,
    state_of,
)
from tolaria.optim.persist import (
    Scalar,
    group_options,
    load_group_options,
    load_state,
    state_scalars,
    state_tensors,
)
from tolaria.task import users_code

__all__ = [
    "Groups",
    "OptimizerStateError",
    "build_optimizer",
    "carry_hooks",
    "check_takes",
    "group_options",
    "load_group_options",
    "load_state",
    "named_parameters",
    "regroup",
    "state_scalars",
    "state_tensors",
]

Groups: TypeAlias = Mapping[str, Mapping[str, nn.Parameter]]

_FUSED_DEVICES = frozenset({"cpu", "cuda"})
_HOOK_TABLES = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def build_optimizer(cfg: OptimConfig, groups: Groups, device: torch.device) -> Optimizer:
    """A new optimizer with one parameter group per entry of ``groups`` (group name -> parameter name -> parameter).

    Fused where the class and all parameters allow it on ``device``, else foreach. Groups may be empty. Raises
    ValueError when there is no group, or when a name or a parameter occurs twice; ConfigError when the class does not
    take a parameter; TaskError when a class of the user's own is not there or can not be built.
    """
    _check_groups(groups)
    cls = optimizer_class(cfg.name)
    arguments = keywords(cls, cfg)
    parameters = [parameter for members in groups.values() for parameter in members.values()]
    if cls in FUSED and device.type in _FUSED_DEVICES and all(map(_is_fusable, parameters)):
        arguments["fused"] = True
    elif cfg.name in BUILT_IN and cls is not Muon:
        arguments["foreach"] = True
    if cls is Muon:
        _check_matrices(groups)
    how = {key: arguments[key] for key in MACHINE_KEYS & arguments.keys()}
    entries = [_entry(name, members, how) for name, members in groups.items()]
    _settle_fused(cls, entries)
    with nullcontext() if cfg.name in BUILT_IN else users_code(f"optim.name={cfg.name!r}: building it"):
        optimizer = cls(entries, **arguments)
    if [group.get("name") for group in optimizer.param_groups if "lr" in group] != list(groups):
        raise TaskError(f"optim.name={cfg.name!r}: expected it to keep the groups it is given, each with an 'lr'")
    return optimizer


def _check_matrices(groups: Groups) -> None:
    others = [f"{name} {tuple(p.shape)}" for members in groups.values() for name, p in members.items() if p.ndim != 2]
    if others:
        raise ConfigError(
            f"optim.name='muon' updates matrices only, and here are {listed(others)}; choose another optimizer, "
            "such as adamw. Most seeds have parameters of one dimension too"
        )


def regroup(
    optimizer: Optimizer,
    groups: Groups,
    *,
    defaults: Mapping[str, Any] | None = None,
    dropped: Iterable[str] = (),
    fill: Mapping[str, float] | None = None,
) -> Optimizer:
    """A new optimizer of the same class over ``groups``, which takes over state by parameter name.

    - A group that keeps its name keeps its options; a new one gets the optimizer's own defaults, then ``defaults``.
    - A parameter that keeps its name keeps its state: the same tensor objects, also when it changes its group. When
      it grew in shape, the old block of each parameter-shaped tensor is copied and the new part is filled with
      ``fill[key]`` (key as in the state, e.g. "exp_avg_sq"), else as the optimizer itself begins (0 in most; in
      Adagrad's "sum" its initial_accumulator_value). Numbers of the parameter as a whole ("step") stay.
    - A name that had state and is gone must be listed in ``dropped``. Names without state may be listed; a name that
      is still in ``groups`` may not.
    - Hooks on the optimizer go along.

    ``optimizer`` stays as it was, for a caller that drops the result. Once the result has stepped, ``optimizer`` must
    not be used any more: the two share tensors. Raises OptimizerStateError when state can not be matched, ValueError
    for groups in which a name or a parameter occurs twice.
    """
    _check_groups(groups)
    old_options = {group_name(group): options_of(group) for group in optimizer.param_groups}
    fresh = {**optimizer.defaults, **(defaults or {})}
    entries = [_entry(name, members, old_options.get(name, fresh)) for name, members in groups.items()]
    _settle_fused(type(optimizer), entries)
    _check_dropped(optimizer, groups, frozenset(dropped))
    states = [*_begun_states(optimizer, entries), *_matched_states(optimizer, entries, fill or {})]
    new = over(optimizer, entries)
    new.state.update(states)
    if isinstance(new, SGD):
        _complete_momentum(new)
    return new


def _complete_momentum(optimizer: SGD) -> None:
    """Momentum of zero, which is what it begins with, for those that have none in a group where others have it.

    Fused SGD takes all of a group's or none.
    """
    for group in optimizer.param_groups:
        without = [p for p in group["params"] if state_of(optimizer, p).get("momentum_buffer") is None]
        if len(without) < len(group["params"]):
            for parameter in without:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def carry_hooks(old: Optimizer, new: Optimizer) -> None:
    """Let the hooks on ``old`` be those of ``new``."""
    for table in _HOOK_TABLES:  # the table itself, so that a handle held by the hook's owner still removes it
        setattr(new, table, getattr(old, table))


def check_takes(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise OptimizerStateError unless a group of these parameters (by name) could join the optimizer."""
    blank_like(optimizer, [_entry("new", parameters, optimizer.defaults)])


def _check_dropped(optimizer: Optimizer, groups: Groups, dropped: frozenset[str]) -> None:
    new = {name for members in groups.values() for name in members}
    contradicting = sorted(dropped & new)
    if contradicting:
        raise OptimizerStateError(f"parameters both dropped and trained: {listed(contradicting)}")
    had = sorted(name for name, parameter in named_parameters(optimizer).items() if state_of(optimizer, parameter))
    lost = [name for name in had if name not in new and name not in dropped]
    if lost:
        raise OptimizerStateError(f"optimizer state would be lost (list it in 'dropped' if meant): {listed(lost)}")


def _begun_states(optimizer: Optimizer, entries: list[dict[str, Any]]) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the class itself makes of parameters that it has not seen: Adagrad makes state, Muon refuses some."""
    known = named_parameters(optimizer).keys()
    joining = []
    for entry in entries:
        members = zip(entry["param_names"], entry["params"], strict=True)
        if joins := {name: parameter for name, parameter in members if name not in known}:
            joining.append(_entry(entry["name"], joins, options_of(entry)))
    return list(blank_like(optimizer, joining).state.items()) if joining else []


def _matched_states(
    optimizer: Optimizer, entries: list[dict[str, Any]], fill: Mapping[str, float]
) -> list[tuple[Tensor, dict[str, Any]]]:
    old = {name: (p, state_of(optimizer, p)) for name, p in named_parameters(optimizer).items()}
    matched, first = [], FirstStates(optimizer)
    for entry in entries:
        for name, parameter in zip(entry["param_names"], entry["params"], strict=True):
            before, state = old.get(name, (parameter, {}))
            if state:
                same = before.shape == parameter.shape
                begin = {} if same else first.of(entry, parameter, state)
                carried = {
                    key: _carried(f"{name}/{key}", value, before, parameter, fill.get(key, begin.get(key, 0.0)))
                    for key, value in state.items()
                }
                matched.append((parameter, carried))
    return matched


def _carried(what: str, value: Any, old: Tensor, new: Tensor, fill: Any) -> Any:
    """State ``value`` of the parameter ``old`` as state of ``new``; ``fill``: a number, or ``new``'s first state."""
    if value is None or isinstance(value, Scalar):
        return value
    if not isinstance(value, Tensor):
        raise OptimizerStateError(f"state {what} is a {type(value).__name__}; only tensors and plain values carry over")
    if (old.dtype, old.device) != (new.dtype, new.device):
        raise OptimizerStateError(
            f"state {what}: the parameter changed from {old.dtype} on {old.device} to {new.dtype} on {new.device}"
        )
    if old.shape == new.shape or (value.ndim == 0 and old.ndim > 0):
        return value
    if (
        value.shape != old.shape
        or old.ndim != new.ndim
        or any(n < o for n, o in zip(new.shape, old.shape, strict=True))
    ):
        raise OptimizerStateError(
            f"state {what} of shape {tuple(value.shape)} can not follow its parameter from {tuple(old.shape)} "
            f"to {tuple(new.shape)}: only growth along existing dimensions can be matched"
        )
    grown = room_for(torch.empty((), dtype=value.dtype, device=value.device).expand(new.shape), new)
    grown[tuple(slice(size) for size in old.shape)] = value
    for dim, size in enumerate(old.shape):
        beyond = (*(slice(inner) for inner in old.shape[:dim]), slice(size, None))
        grown[beyond] = fill[beyond] if isinstance(fill, Tensor) and fill.ndim else fill
    return grown


def _check_groups(groups: Groups) -> None:
    if not groups:
        raise ValueError("an optimizer needs at least one parameter group")
    owner: dict[str, str] = {}
    name_of: dict[Tensor, str] = {}
    for group, members in groups.items():
        for name, parameter in members.items():
            if name in owner:
                raise ValueError(f"parameter {name!r} is in the groups {owner[name]!r} and {group!r}")
            if parameter in name_of:
                raise ValueError(f"one parameter has two names: {name_of[parameter]!r} and {name!r}")
            owner[name], name_of[parameter] = group, name


def _entry(name: str, members: Mapping[str, nn.Parameter], options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "name": name, "param_names": list(members), "params": list(members.values())}


def _is_fusable(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in _FUSED_DEVICES


def _is_miscomputed(cls: type[Optimizer], parameter: Tensor) -> bool:
    # On the CPU torch's fused SGD with momentum gives other numbers each time for bfloat16 and float16 (torch 2.13).
    return cls is SGD and parameter.device.type == "cpu" and parameter.element_size() < 4


def _settle_fused(cls: type[Optimizer], entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        for name, parameter in zip(entry["param_names"], entry["params"], strict=True):
            if entry.get("fused") and not _is_fusable(parameter):
                raise OptimizerStateError(
                    f"parameter {name!r} ({parameter.dtype}, {parameter.device}) does not fit this fused optimizer"
                )
        if entry.get("fused") and any(_is_miscomputed(cls, parameter) for parameter in entry["params"]):
            entry.update(fused=False, foreach=True)
