"""Which optimizer class a name stands for, and what of the ``optim`` section it is built with.

A name is one of `tolaria.config.OPTIMIZERS` or the import path of a class of the user's own.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop

from tolaria.config import OptimConfig
from tolaria.errors import TaskError
from tolaria.task import import_object

BUILT_IN: Mapping[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": SGD,
    "rmsprop": RMSprop,
    "adagrad": Adagrad,
    "nadam": NAdam,
    "muon": Muon,
}
FUSED: frozenset[type[Optimizer]] = frozenset({AdamW, Adam, SGD})
"""Those with one kernel for the whole update, on the CPU and on CUDA alike."""
ADAM_FAMILY: frozenset[type[Optimizer]] = frozenset({AdamW, Adam, NAdam})
"""Those that keep the same two moments (``exp_avg``, ``exp_avg_sq``) and take rates of one size."""


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of that name. Imports the user's module; raises TaskError when there is no optimizer of that path."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    found = import_object(name, "optim.name")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise TaskError(f"optim.name={name!r}: expected a subclass of torch.optim.Optimizer, found {found!r:.60}")
    return found


def keywords(cls: type[Optimizer], config: OptimConfig) -> dict[str, Any]:
    """The settings that the class's constructor takes: of lr, weight_decay, betas, eps and momentum those it names.

    A setting of another form than the class's own default is left to the class (Adafactor's eps is a pair).
    """
    offered: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "momentum": config.momentum,
    }
    if cls is RMSprop:
        offered["alpha"] = config.beta2
    accepted = inspect.signature(cls).parameters
    return {key: value for key, value in offered.items() if key in accepted and _is_alike(accepted[key].default, value)}


def _is_alike(default: Any, value: Any) -> bool:
    if default is inspect.Parameter.empty or default is None:
        return True
    if isinstance(default, tuple) and isinstance(value, tuple):
        return len(default) == len(value)
    return isinstance(default, tuple) is isinstance(value, tuple)
