"""What the trainer would refuse of a reply, told from the state alone. Pure; needs no model.

By the table of stages, the groups of parameters that there are, and the default bounds of ``[tuning]``. What only the
trainer knows (gates, memory, checkpoints, other blueprints) is not judged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tolaria.config import OPTIMIZERS
from tolaria.config_tuning import LRConfig, TuningConfig
from tolaria.errors import CommandRefused, MessageRejected
from tolaria.kasmina.lifecycle import HOLDS_SEED, move
from tolaria.leyline.codec import decode_command
from tolaria.leyline.limits import as_written
from tolaria.leyline.types import (
    BETA1,
    BETA2,
    CLIP_NORM,
    FREEZE,
    HYPERPARAMETERS,
    LR,
    LR_SCALE,
    MOMENTUM,
    OPTIMIZER_CLASS,
    UNDO,
    WEIGHT_DECAY,
    BreakerCommand,
    CircuitState,
    Command,
    CommandType,
    OptimizerCommand,
    RollbackCommand,
    SeedCommand,
    SystemState,
)
from tolaria.leyline.words import describe
from tolaria.optim.tuning_limits import check_change, check_range, check_scale
from tolaria.tamiyo.sight import Sight

MESSAGES, LEGAL, BOUNDS, CONSERVATIVE = "messages", "legal", "bounds", "conservative"
"""The checks that a fault belongs to."""

HOST = "host"
_USUAL = {WEIGHT_DECAY: 0.01, BETA1: 0.9, BETA2: 0.999, MOMENTUM: 0.9, CLIP_NORM: 1.0}
"""Where the hyperparameters stand in the simulated run."""
_TUNING, _LR = TuningConfig(), LRConfig()


@dataclass(frozen=True)
class Fault:
    """Why one command would be refused. ``check``: which of the checks it fails."""

    check: str
    command: str
    reason: str

    def __str__(self) -> str:
        return f"{self.command}: {self.reason}"


def judge(state: SystemState, commands: Sequence[bytes]) -> list[tuple[Command | None, Fault | None]]:
    """Each serialized command with what is wrong with it, in order."""
    touched: set[str] = set()
    ids: set[str] = set()
    judged: list[tuple[Command | None, Fault | None]] = []
    for raw in commands:
        try:
            command = decode_command(raw)
        except MessageRejected as error:
            judged.append((None, Fault(MESSAGES, "unreadable command", str(error))))
            continue
        fault = next(_faults(command, Sight(state), touched, ids), None)
        touched.add(command.target_seed_id)
        ids.add(command.command_id)
        judged.append((command, fault))
    return judged


def _faults(command: Command, sees: Sight, touched: set[str], ids: set[str]) -> Iterator[Fault]:
    what = describe(command)
    if command.command_id in ids:
        yield Fault(LEGAL, what, f"another command of the reply has the id {command.command_id}")
    if command.command_type in (CommandType.EMERGENCY, CommandType.STRUCTURAL_PRUNING):
        yield Fault(LEGAL, what, "no trainer carries this out")
    payload = command.payload
    try:
        if isinstance(payload, SeedCommand):
            _check_seed(command.target_seed_id, payload, sees, touched)
        elif isinstance(payload, OptimizerCommand):
            _check_optimizer(payload, sees)
        elif isinstance(payload, RollbackCommand) and payload.step > sees.state.global_step:
            yield Fault(LEGAL, what, f"step {payload.step} is not reached yet, the run is at {sees.state.global_step}")
        elif isinstance(payload, BreakerCommand) and payload.desired_state == CircuitState.HALF_OPEN:
            yield Fault(LEGAL, what, "a breaker opens or closes by command; HALF_OPEN is its own business")
    except CommandRefused as error:
        yield Fault(error.code, what, str(error))


def _check_seed(target: str, payload: SeedCommand, sees: Sight, touched: set[str]) -> None:
    slot = sees.slot(target)
    if slot is None:
        known = ", ".join(s.name for s in sees.slots[:8]) or "none"
        raise CommandRefused(LEGAL, f"no slot {target!r}; slots: {known}")
    try:
        move(slot.stage, payload.operation)
    except CommandRefused as error:
        raise CommandRefused(LEGAL, str(error)) from error
    if target in touched:
        raise CommandRefused(LEGAL, f"slot {target!r} was commanded in this reply already")
    if sees.conservative:
        raise CommandRefused(CONSERVATIVE, "no structural change in conservative mode")


def _check_optimizer(payload: OptimizerCommand, sees: Sight) -> None:
    values = {name: as_written(value) for name, value in payload.hyperparameters.items()}
    if payload.optimizer_id.startswith(OPTIMIZER_CLASS):
        _check_class(payload.optimizer_id.removeprefix(OPTIMIZER_CLASS), values, sees)
        return
    if unknown := sorted(values.keys() - set(HYPERPARAMETERS)):
        raise CommandRefused(LEGAL, f"no hyperparameter {', '.join(unknown)}; there are {', '.join(HYPERPARAMETERS)}")
    if values.keys() >= {LR, LR_SCALE} or (UNDO in values and values != {UNDO: 1.0}):
        raise CommandRefused(LEGAL, "lr and lr_scale: one of them; undo is 1 and comes alone")
    if values.get(FREEZE, 1.0) not in (0.0, 1.0):
        raise CommandRefused(LEGAL, f"freeze={values[FREEZE]:g}: expected 1, or 0 to thaw")
    groups = [HOST, *(f"seed/{slot.name}" for slot in sees.slots if slot.stage in HOLDS_SEED)]
    if not any(fnmatchcase(group, payload.optimizer_id) for group in groups):
        raise CommandRefused(LEGAL, f"no group {payload.optimizer_id!r}; groups: {', '.join(groups[:8])}")
    rate = sees.learning_rate
    # A rate beyond all bounds is that of an odd state, and tells nothing of the command.
    rate = rate if rate is not None and 0 < rate <= _TUNING.max_lr else None
    try:
        for name, value in values.items():
            _check_value(name, value, rate)
    except CommandRefused as error:
        raise CommandRefused(BOUNDS, str(error)) from error
    if sees.conservative and _faster(values, rate):
        raise CommandRefused(CONSERVATIVE, "nothing learns faster in conservative mode")


def _check_value(name: str, value: float, rate: float | None) -> None:
    if name == LR_SCALE or (name == LR and rate):
        check_scale(_TUNING, _LR, HOST, name, value, old=1.0, settled=rate or 1e-3)
    elif name in _USUAL:
        check_change(_TUNING, HOST, name, _USUAL[name], value)


def _faster(values: dict[str, float], rate: float | None) -> bool:
    return (
        values.get(LR_SCALE, 1.0) > 1
        or values.get(FREEZE, 1.0) == 0
        or (LR in values and rate is not None and values[LR] > rate * (1 + 1e-6))
        or any(values.get(name, _USUAL[name]) > _USUAL[name] for name in (BETA1, MOMENTUM, CLIP_NORM))
        or values.get(BETA2, _USUAL[BETA2]) < _USUAL[BETA2]
    )


def _check_class(name: str, values: dict[str, float], sees: Sight) -> None:
    if name not in OPTIMIZERS and ":" not in name:
        raise CommandRefused(LEGAL, f"no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    if unknown := sorted(values.keys() - {LR, MOMENTUM, WEIGHT_DECAY}):
        raise CommandRefused(LEGAL, f"a change of class takes lr, momentum and weight_decay, not {unknown}")
    try:
        for key, value in values.items():
            check_range(_TUNING, key, name, _USUAL.get(key, 1e-3), value)
    except CommandRefused as error:
        raise CommandRefused(BOUNDS, str(error)) from error
    if sees.conservative:
        raise CommandRefused(CONSERVATIVE, "no other optimizer in conservative mode")
