"""Another optimizer class in the middle of a run: groups, names, order and settings stay, state where it can.

Surgery has two phases. The plan is a finished new optimizer, made here or by `regroup`: it may raise, and the old one
does not notice. The commit is one assignment by the optimizer's owner, which can not fail halfway. All functions are
local and give the same on every rank.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.config import OPTIMIZERS, OptimConfig
from tolaria.errors import CheckpointMismatch
from tolaria.optim.classes import ADAM_FAMILY
from tolaria.optim.groups import FirstStates, further_options, group_name, options_of, state_of
from tolaria.optim.rebuild import build_optimizer, carry_hooks

SHARED_OPTIONS = frozenset({"lr", "weight_decay", "betas", "eps", "momentum", "maximize", "amsgrad"})
"""Options that mean the same in every class that has them."""
_NOTHING = 1e-30  # a product this small is lost beside 1, and the steps to it are few


def same_family(one: type[Optimizer], other: type[Optimizer]) -> bool:
    """Whether a learning rate of one class suits the other."""
    return one is other or {one, other} <= ADAM_FAMILY


def change_class(optimizer: Optimizer, config: OptimConfig, *, anew: Iterable[str] = ()) -> Optimizer:
    """A new optimizer as ``config`` says, over the groups of ``optimizer``; ``optimizer`` stays as it is.

    - Groups keep names, order, parameters, and of their options those in SHARED_OPTIONS that the new class has, and
      those that the old class did not know. All other options, and those named in ``anew`` ("momentum"), are
      ``config``'s, or the class's own defaults.
    - State begins anew, except between Adam, AdamW and NAdam (`ADAM_FAMILY`), which keep the same running means of the
      gradient and its square under the same keys: ``step``, ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``) are
      carried, the larger ones as the same tensor objects. With L2 weight decay (Adam, NAdam) the decay is in the
      means, with AdamW it is not; it leaves them as they forget. NAdam's ``mu_product`` is what it would have become in
      as many steps. Other classes share names but not meanings: the momentum of SGD is a sum of gradients, that of
      RMSprop of updates, that of Muon a mean.
    - Hooks on the optimizer go along.

    Once the result has stepped, ``optimizer`` must not be used any more. Raises ValueError when the class has no option
    of a name in ``anew``, and what `build_optimizer` raises.
    """
    members = {group_name(g): dict(zip(g["param_names"], g["params"], strict=True)) for g in optimizer.param_groups}
    parameters = [parameter for group in members.values() for parameter in group.values()]
    new = build_optimizer(config, members, parameters[0].device if parameters else torch.device("cpu"))
    if unknown := sorted(set(anew) - new.defaults.keys()):
        raise ValueError(f"optimizer {config.name!r} has no {' and no '.join(unknown)}")
    shared = (SHARED_OPTIONS & new.defaults.keys()) - set(anew)
    for old_group, group in zip(optimizer.param_groups, new.param_groups, strict=True):
        kept = {key: value for key, value in options_of(old_group).items() if key in shared}
        group.update(kept | further_options(optimizer, old_group))
    carry_hooks(optimizer, new)
    if {type(optimizer), type(new)} <= ADAM_FAMILY:
        for parameter, state in _moments(optimizer, new):
            new.state[parameter] = state
    return new


def settings_meta(configured: OptimConfig, now: OptimConfig) -> dict[str, Any]:
    """The settings in force as JSON: the class, and what else was changed since the start."""
    before, after = asdict(configured), asdict(now)
    return {"name": now.name, "changed": {k: v for k, v in after.items() if k != "name" and v != before[k]}}


def saved_settings(configured: OptimConfig, saved: Mapping[str, Any]) -> OptimConfig:
    """The settings that `settings_meta` told of, over today's. Raises CheckpointMismatch."""
    try:
        name, changed = saved["name"], saved["changed"]
        # What is imported is the user's choice, never a file's.
        if name not in (*OPTIMIZERS, configured.name):
            raise CheckpointMismatch(f"saved with the optimizer {name!r}; to go on with it, set optim.name to it")
        return replace(configured, name=name, **changed)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointMismatch(f"saved optimizer settings are malformed: {error!r}") from error


def _moments(old: Optimizer, new: Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """The state of the new optimizer's parameters that the old one's gives, where it gives all of it."""
    carried = []
    first = FirstStates(new)
    products: dict[tuple[float, str], Tensor] = {}
    for group in new.param_groups:
        for parameter in group["params"]:
            made, state = first.small(group, parameter), dict(state_of(old, parameter))
            if state and "mu_product" in made.keys() - state.keys():
                at = (float(state["step"]), group["name"])
                if at not in products:
                    products[at] = _mu_product(made["mu_product"], int(state["step"]), group)
                state["mu_product"] = products[at]
            if made.keys() <= state.keys():
                carried.append((parameter, {key: _alike(state[key], own) for key, own in made.items()}))
    return carried


def _alike(value: Tensor, own: Tensor) -> Tensor:
    # A counter is beside the parameter or on the CPU, as the new class has it.
    return value if own.ndim else own.clone().copy_(value)


def _mu_product(own: Tensor, step: int, group: Mapping[str, Any]) -> Tensor:
    """NAdam's product of its momenta after ``step`` steps, as it comes about: rounded to its own type at each."""
    beta1, decay = group["betas"][0], group["momentum_decay"]
    product = torch.ones_like(own)
    for number in range(1, step + 1):
        product *= beta1 * (1.0 - 0.5 * 0.96 ** (number * decay))
        if float(product) < _NOTHING:
            break
    return product
