"""Commands in a few words, for people, and what of a command decides what is done."""

from collections.abc import Sequence

from tolaria.errors import MessageRejected
from tolaria.leyline.codec import decode_command
from tolaria.leyline.types import (
    FREEZE,
    HYPERPARAMETERS,
    LR_SCALE,
    OPTIMIZER_CLASS,
    UNDO,
    BreakerCommand,
    Command,
    OptimizerCommand,
    SeedCommand,
)


def describe(command: Command) -> str:
    """A command in a few words: "germinate late with conv_residual"."""
    payload = command.payload
    if isinstance(payload, SeedCommand):
        extra = f" with {payload.blueprint_id}" if payload.blueprint_id else ""
        return f"{payload.operation.name.lower().replace('_', ' ')} {command.target_seed_id}{extra}"
    if isinstance(payload, OptimizerCommand):
        known = [name for name in HYPERPARAMETERS if name in payload.hyperparameters]
        names = known + sorted(payload.hyperparameters.keys() - set(known))
        words = ", ".join(_hyperparameter(name, payload.hyperparameters[name]) for name in names)
        if payload.optimizer_id.startswith(OPTIMIZER_CLASS):
            return f"optimizer {payload.optimizer_id.removeprefix(OPTIMIZER_CLASS)}: {words}"
        return f"{payload.optimizer_id or '*'}: {words}"
    if isinstance(payload, BreakerCommand):
        return f"breaker {payload.desired_state.name.lower()}"
    return command.command_type.name.lower().replace("_", " ")


def _hyperparameter(name: str, value: float) -> str:
    if name == LR_SCALE:
        return f"lr x{value:g}"
    if name == FREEZE and value in (0.0, 1.0):
        return "freeze" if value else "thaw"
    return UNDO if name == UNDO and value == 1.0 else f"{name} {value:g}"


def essence(raw: bytes) -> str:
    """Of a serialized command all that decides what it does, as text: equal for two that ask for the same.

    Left out: its id, who issued it when, its explanation. One that cannot be read is its own essence.
    """
    try:
        command = decode_command(raw)
    except MessageRejected:
        return f"unreadable {raw.hex()}"
    return f"{command.command_type.name} {command.target_seed_id} {command.payload!r}"


def agree(commands: Sequence[bytes], others: Sequence[bytes]) -> bool:
    """Whether two replies ask for the same things in the same order."""
    return [*map(essence, commands)] == [*map(essence, others)]


def in_words(raw: bytes) -> str:
    """A serialized command in a few words."""
    try:
        return describe(decode_command(raw))
    except MessageRejected as error:
        return f"unreadable command ({error.code})"
