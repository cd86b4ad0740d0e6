"""Optimizers over named groups of named parameters, rebuilt when the model changes, state carried over by name.

An optimizer's state is keyed by tensor object and saved by position; neither survives a model that grows. Here every
group has a ``"name"`` and ``"param_names"``, and growth, cull and change of shape build a new optimizer whose state is
matched by parameter name. What can not be matched raises; nothing is lost silently. All functions are local.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from tolaria.config import OptimConfig
from tolaria.optim.groups import (
    OptimizerStateError,
    blank_like,
    group_name,
    listed,
    named_parameters,
    options_of,
    state_of,
)
from tolaria.optim.persist import group_options, load_group_options, load_state_tensors, state_tensors

__all__ = [
    "Groups",
    "OptimizerStateError",
    "build_optimizer",
    "group_options",
    "load_group_options",
    "load_state_tensors",
    "named_parameters",
    "regroup",
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
    ValueError when there is no group, or when a name or a parameter occurs twice.
    """
    _check_groups(groups)
    parameters = [parameter for members in groups.values() for parameter in members.values()]
    fused = device.type in _FUSED_DEVICES and all(_is_fusable(parameter) for parameter in parameters)
    foreach = None if fused else True
    entries = [_entry(name, members, {}) for name, members in groups.items()]
    match cfg.name:
        case "adam" | "adamw":
            return (Adam if cfg.name == "adam" else AdamW)(
                entries, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay,
                fused=fused, foreach=foreach,
            )  # fmt: skip
        case "sgd":
            return SGD(
                entries, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=fused, foreach=foreach
            )
        case "rmsprop":  # torch has no fused form of it
            return RMSprop(
                entries, lr=cfg.lr, alpha=cfg.beta2, eps=cfg.eps, weight_decay=cfg.weight_decay,
                momentum=cfg.momentum, foreach=True,
            )  # fmt: skip


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
      ``fill[key]`` (key as in the state, e.g. "exp_avg_sq"), else 0.
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
    _check_fusable(entries)
    states = _matched_states(optimizer, groups, frozenset(dropped), fill or {})
    new = blank_like(optimizer, entries)
    for table in _HOOK_TABLES:  # the table itself, so that a handle held by the hook's owner still removes it
        setattr(new, table, getattr(optimizer, table))
    for parameter, state in states:
        new.state[parameter] = state
    return new


def _matched_states(
    optimizer: Optimizer, groups: Groups, dropped: frozenset[str], fill: Mapping[str, float]
) -> list[tuple[Tensor, dict[str, Any]]]:
    new = {name: parameter for members in groups.values() for name, parameter in members.items()}
    contradicting = sorted(dropped & new.keys())
    if contradicting:
        raise OptimizerStateError(f"parameters both dropped and trained: {listed(contradicting)}")
    old = {name: (p, state_of(optimizer, p)) for name, p in named_parameters(optimizer).items()}
    lost = sorted(name for name, (_, state) in old.items() if state and name not in new and name not in dropped)
    if lost:
        raise OptimizerStateError(f"optimizer state would be lost (list it in 'dropped' if meant): {listed(lost)}")
    return [
        (new[name], {key: _carried(f"{name}/{key}", value, parameter, new[name], fill.get(key, 0.0))
                     for key, value in state.items()})
        for name, (parameter, state) in old.items()
        if state and name in new
    ]  # fmt: skip


def _carried(what: str, value: Any, old: Tensor, new: Tensor, fill: float) -> Any:
    """State ``value`` of the parameter ``old`` as state of ``new``."""
    if value is None or isinstance(value, bool | int | float | str):
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
    grown = torch.full_like(new, fill, dtype=value.dtype, device=value.device, requires_grad=False)
    grown[tuple(slice(size) for size in value.shape)] = value
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


def _check_fusable(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        for name, parameter in zip(entry["param_names"], entry["params"], strict=True):
            if entry.get("fused") and not _is_fusable(parameter):
                raise OptimizerStateError(
                    f"parameter {name!r} ({parameter.dtype}, {parameter.device}) does not fit this fused optimizer"
                )
