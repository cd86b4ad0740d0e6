"""The command that changes the optimizer's class: an OPTIMIZER command whose ``optimizer_id`` is "class/NAME".

Groups of parameters are called "host" and "seed/<slot>", so no group is meant by it. Its hyperparameters are the new
settings, for all groups: lr (the host's peak rate), momentum, weight_decay. ``[tuning]`` bounds them as it does those
of the present class, except for how far one boundary may go: settings of two classes do not compare.
"""

from collections.abc import Mapping

from tolaria.config import OPTIMIZERS
from tolaria.errors import CommandRefused, ConfigError, TaskError
from tolaria.kasmina.host import PlannedMove
from tolaria.leyline.limits import as_written
from tolaria.leyline.types import LR, OPTIMIZER_CLASS, OptimizerCommand
from tolaria.mode import Mode
from tolaria.optim.classes import optimizer_class
from tolaria.optim.groups import OptimizerStateError
from tolaria.optim.rebuild import check_takes
from tolaria.optim.surgery import same_family
from tolaria.optim.tuning_limits import check_range, check_rate
from tolaria.state import TrainState

SETTINGS = ("lr", "momentum", "weight_decay")
TOUCHED = "optimizer class"  # no name of a slot or a group has a space


def names_class(payload: OptimizerCommand) -> bool:
    """Whether the command asks for another class."""
    return payload.optimizer_id.startswith(OPTIMIZER_CLASS)


def check_class(payload: OptimizerCommand, state: TrainState, touched: set[str], mode: Mode) -> set[str]:
    """Plan phase: what the command touches. Changes nothing; local, the same on every rank.

    ``mode``: the one that the decision is judged by. Raises CommandRefused: "one_per_boundary", "conservative",
    "unknown_parameter", "unknown_optimizer", "same_optimizer", "lr_missing", "out_of_bounds", or "optimizer_unfit" with
    what the class says of these parameters or settings.
    """
    name, given = _wanted(payload)
    if TOUCHED in touched:
        raise CommandRefused("one_per_boundary", "the optimizer's class was commanded at this boundary already")
    if mode.conservative:
        raise CommandRefused("conservative", f"no other optimizer in conservative mode ({mode.reason})")
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
    _check_bounds(name, given, state)
    try:
        state.plan_optimizer(name, given)
    except (ConfigError, TaskError, ValueError, RuntimeError, MemoryError) as error:
        raise CommandRefused("optimizer_unfit", f"{name}: {error}") from error
    return {TOUCHED}


def change_class(payload: OptimizerCommand, state: TrainState) -> None:
    """Apply phase: go on with that class. `TrainState.memento` and `restore` take it back."""
    state.change_optimizer(*_wanted(payload))


def check_seed(planned: PlannedMove, state: TrainState) -> None:
    """Raise CommandRefused("optimizer_unfit") when the optimizer does not take the parameters of a new seed."""
    if planned.module is None:
        return
    try:
        check_takes(state.optimizer, dict(planned.module.named_parameters()))
    except OptimizerStateError as error:
        blueprint = planned.seed_command.blueprint_id
        raise CommandRefused("optimizer_unfit", f"blueprint {blueprint!r} with {state.optim.name}: {error}") from error


def _wanted(payload: OptimizerCommand) -> tuple[str, dict[str, float]]:
    """Name of the class, and its settings as somebody wrote them."""
    given = {key: as_written(value) for key, value in payload.hyperparameters.items()}
    return payload.optimizer_id.removeprefix(OPTIMIZER_CLASS), given


def _check_bounds(name: str, given: Mapping[str, float], state: TrainState) -> None:
    for key, value in given.items():
        check_range(state.tuner.bounds, key, name, getattr(state.optim, key), value)
    if LR in given:
        # What commands did to a group stays, so its rate is another one than the host's peak.
        for group in state.lr.groups:
            rate = state.lr.settled_lr_at(group, state.step) * state.lr.scale_of(group)
            check_rate(state.tuner.bounds, group, rate, rate * (given[LR] / state.optim.lr))
