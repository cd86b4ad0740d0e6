"""The command that changes the optimizer's class: an OPTIMIZER command whose ``optimizer_id`` is "class/NAME".

Groups of parameters are called "host" and "seed/<slot>", so no group is meant by it. Its hyperparameters are the new
settings, for all groups: lr (the host's peak rate), momentum, weight_decay.
"""

from tolaria.config import OPTIMIZERS
from tolaria.errors import CommandRefused, ConfigError, TaskError
from tolaria.kasmina.host import PlannedMove
from tolaria.leyline.types import OPTIMIZER_CLASS, OptimizerCommand
from tolaria.optim.classes import optimizer_class
from tolaria.optim.groups import OptimizerStateError
from tolaria.optim.rebuild import check_takes
from tolaria.optim.surgery import same_family
from tolaria.state import TrainState

SETTINGS = ("lr", "momentum", "weight_decay")
TOUCHED = "optimizer class"  # no name of a slot or a group has a space


def names_class(payload: OptimizerCommand) -> bool:
    """Whether the command asks for another class."""
    return payload.optimizer_id.startswith(OPTIMIZER_CLASS)


def check_class(payload: OptimizerCommand, state: TrainState, touched: set[str]) -> set[str]:
    """Plan phase: what the command touches. Changes nothing; local, the same on every rank.

    Raises CommandRefused: "one_per_boundary", "conservative", "unknown_parameter", "unknown_optimizer",
    "same_optimizer", "lr_missing", or "optimizer_unfit" with what the class says of these parameters or settings.
    """
    name, given = _wanted(payload), payload.hyperparameters
    if TOUCHED in touched:
        raise CommandRefused("one_per_boundary", "the optimizer's class was commanded at this boundary already")
    if state.mode.conservative:
        raise CommandRefused("conservative", f"no other optimizer in conservative mode ({state.mode.reason})")
    if unknown := sorted(set(given) - set(SETTINGS)):
        raise CommandRefused("unknown_parameter", f"a change of class takes {', '.join(SETTINGS)}, not {unknown}")
    # A policy may choose among what torch has and what the run was configured with; it can not have a module imported.
    known = dict.fromkeys((*OPTIMIZERS, state.configured_optimizer))
    if name not in known:
        raise CommandRefused("unknown_optimizer", f"no optimizer {name!r}; there are {', '.join(known)}")
    if name == state.optim.name:
        raise CommandRefused("same_optimizer", f"the optimizer is {name} already")
    if "lr" not in given and not same_family(type(state.optimizer), optimizer_class(name)):
        raise CommandRefused("lr_missing", f"from {state.optim.name} to {name} rates differ in size: give 'lr'")
    try:
        state.plan_optimizer(name, given)
    except (ConfigError, TaskError, ValueError, RuntimeError, MemoryError) as error:
        raise CommandRefused("optimizer_unfit", f"{name}: {error}") from error
    return {TOUCHED}


def change_class(payload: OptimizerCommand, state: TrainState) -> None:
    """Apply phase: go on with that class. `TrainState.memento` and `restore` take it back."""
    state.change_optimizer(_wanted(payload), payload.hyperparameters)


def check_seed(planned: PlannedMove, state: TrainState) -> None:
    """Raise CommandRefused("optimizer_unfit") when the optimizer does not take the parameters of a new seed."""
    if planned.module is None:
        return
    try:
        check_takes(state.optimizer, dict(planned.module.named_parameters()))
    except OptimizerStateError as error:
        blueprint = planned.seed_command.blueprint_id
        raise CommandRefused("optimizer_unfit", f"blueprint {blueprint!r} with {state.optim.name}: {error}") from error


def _wanted(payload: OptimizerCommand) -> str:
    return payload.optimizer_id.removeprefix(OPTIMIZER_CLASS)
