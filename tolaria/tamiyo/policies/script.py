"""The policy that plays a file: boundary -> commands. For rehearsals, tests, and people who know what they want.

A script is a TOML file. ``version`` is optional; each ``[[command]]`` is one command, given at its boundary in the
order of the file:

    version = "rehearsal-1"

    [[command]]
    boundary = 3                      # number of the boundary, the first one is 1
    op = "germinate"
    slot = "middle"
    blueprint = "residual_mlp"
    reason = "third boundary"         # optional with every command

    [[command]]
    boundary = 4
    op = "scale_lr"
    group = "host*"                   # a group of parameters or a shell pattern
    factor = 0.5

    op              further keys
    germinate       slot, blueprint
    start_grafting  slot, blend_steps (optional: optimizer steps from alpha 0 to 1)
    start_training, stabilize, evaluate, fine_tune, fossilize, cull, cancel
                    slot
    scale_lr        group, factor
    set_lr          group, lr: the rate at that step, on top of which warm-ups, a re-warm and conservative mode hold it
                    back for a while; the schedule goes on in proportion
    freeze, thaw    group
    set_optimizer   group and one or more of lr, lr_scale, freeze (1 or 0), weight_decay, beta1, beta2, momentum,
                    clip_norm
    undo            group: takes back the newest of these commands on it that was not taken back yet
    change_optimizer
                    optimizer (its name), lr, momentum, weight_decay (one of the three at least); can not be undone, and
                    ends what can be
    rollback        step (optional; without it: the newest good checkpoint)
    conservative    on (true or false)
    pause
    emergency       level (1 to 4): raised beside the answer of that boundary, once, also if the run comes back to it
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tolaria.errors import ConfigError, MessageRejected
from tolaria.leyline.codec import encode_command
from tolaria.leyline.types import (
    HYPERPARAMETERS,
    UNDO,
    Command,
    EmergencyLevel,
    EmergencySignal,
    FieldReport,
    SeedOp,
    SystemState,
)
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import Policy, boundary_of, with_identity

_NUMBER = (int, float)
_ALWAYS: dict[str, Any] = {"op": str, "boundary": int, "reason": str}
_TUNED = tuple(name for name in HYPERPARAMETERS if name != UNDO)
_OPTIONAL = frozenset({"reason", "blend_steps", "step"})
_KEYS: dict[str, dict[str, Any]] = {
    **{op.name.lower(): {"slot": str} for op in SeedOp},
    "germinate": {"slot": str, "blueprint": str},
    "start_grafting": {"slot": str, "blend_steps": int},
    "scale_lr": {"group": str, "factor": _NUMBER},
    "set_lr": {"group": str, "lr": _NUMBER},
    "freeze": {"group": str},
    "thaw": {"group": str},
    "set_optimizer": {"group": str, **dict.fromkeys(_TUNED, _NUMBER)},
    "undo": {"group": str},
    "change_optimizer": {"optimizer": str, "lr": _NUMBER, "momentum": _NUMBER, "weight_decay": _NUMBER},
    "rollback": {"step": int},
    "conservative": {"on": bool},
    "pause": {},
    "emergency": {"level": int},
}
"""op -> its keys, beside those of every command, with their types."""


class ScriptPolicy(Policy):
    """Gives what a script file names for a boundary: commands, which depend on the boundary alone, and an emergency.

    The emergency is raised once: a run that goes back because of it comes to the same boundary again.
    """

    def __init__(self, *, file: str) -> None:
        """Reads the whole file; raises ConfigError that names the file, the command and the key."""
        self.version, self._commands, self._emergencies = load_script(Path(file))
        self._raised: EmergencySignal | None = None

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        """The script's commands for this boundary."""
        boundary = boundary_of(state)
        self._raised = self._emergencies.pop(boundary, None)
        return list(self._commands.get(boundary, []))

    def emergency(self) -> EmergencySignal | None:
        """That of the boundary just decided, once."""
        raised, self._raised = self._raised, None
        return raised


def load_script(path: Path) -> tuple[str, dict[int, list[Command]], dict[int, EmergencySignal]]:
    """Version, commands and emergencies by boundary of a script file. Raises ConfigError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"policy script {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"policy script {path}: not TOML ({error})") from error
    version = content.pop("version", f"script:{path.name}")
    entries = content.pop("command", [])
    if content or type(version) is not str or type(entries) is not list:
        raise ConfigError(f"policy script {path}: expected only version and [[command]], found {sorted(content)}")
    commands: dict[int, list[Command]] = {}
    emergencies: dict[int, EmergencySignal] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"policy script {path}, command {number}"
        boundary, given = _read_entry(entry, where)
        if isinstance(given, Command):
            commands.setdefault(boundary, []).append(given)
        elif emergencies.setdefault(boundary, given) is not given:
            raise ConfigError(f"{where}: a second emergency at boundary {boundary}; there can be one")
    return version, commands, emergencies


def _read_entry(entry: Any, where: str) -> tuple[int, Command | EmergencySignal]:
    op = entry.get("op") if isinstance(entry, dict) else None
    if op not in _KEYS:
        raise ConfigError(f"{where}: op={op!r}; expected one of {', '.join(_KEYS)}")
    where = f"{where} ({op})"
    accepted = {**_ALWAYS, **_KEYS[op]}
    for key, value in entry.items():
        if key not in accepted:
            raise ConfigError(f"{where}: unknown key {key!r}; expected {', '.join(accepted)}")
        _check_type(value, accepted[key], f"{where}: {key}")
    optional = _OPTIONAL | set(_TUNED) if op in ("set_optimizer", "change_optimizer") else _OPTIONAL
    missing = [key for key in accepted if key not in entry and key not in optional]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing")
    if op == "set_optimizer" and not entry.keys() & set(_TUNED):
        raise ConfigError(f"{where}: expected one or more of {', '.join(_TUNED)}")
    if op == "emergency":
        return entry["boundary"], _emergency(entry, where)
    command = _command(op, entry)
    try:
        encode_command(with_identity(command, "script", issued_by="script", issued_at_ns=0))
    except MessageRejected as error:
        raise ConfigError(f"{where}: {error}") from error
    return entry["boundary"], command


def _emergency(entry: Mapping[str, Any], where: str) -> EmergencySignal:
    if entry["level"] not in tuple(EmergencyLevel):
        raise ConfigError(f"{where}: level={entry['level']}; expected 1 (notice) to 4 (halt)")
    return do.raise_level(entry["level"], entry.get("reason", "script"))


def _command(op: str, entry: Mapping[str, Any]) -> Command:
    reason = entry.get("reason", "script")
    match op:
        case "scale_lr" | "set_lr" | "freeze" | "thaw" | "set_optimizer" | "undo" | "change_optimizer":
            return _optimizer_command(op, entry, reason)
        case "rollback":
            return do.rollback(step=entry.get("step"), reason=reason)
        case "conservative":
            return do.conservative(entry["on"], reason=reason)
        case "pause":
            return do.pause(reason=reason)
        case "start_grafting":
            return do.start_grafting(entry["slot"], blend_steps=entry.get("blend_steps"), reason=reason)
        case _:
            return do.seed_command(
                SeedOp[op.upper()], entry["slot"], blueprint=entry.get("blueprint", ""), reason=reason
            )


def _optimizer_command(op: str, entry: Mapping[str, Any], reason: str) -> Command:
    values = {name: float(entry[name]) for name in _TUNED if name in entry}
    match op:
        case "change_optimizer":
            return do.change_optimizer(entry["optimizer"], **values, reason=reason)
        case "scale_lr":
            return do.scale_lr(entry["group"], float(entry["factor"]), reason=reason)
        case "freeze" | "thaw" | "undo":
            make = {"freeze": do.freeze, "thaw": do.thaw, "undo": do.undo}[op]
            return make(entry["group"], reason=reason)
        case _:
            return do.set_optimizer(entry["group"], reason=reason, **values)


def _check_type(value: Any, accepted: Any, where: str) -> None:
    kinds = accepted if isinstance(accepted, tuple) else (accepted,)
    # type() and not isinstance: a bool is no number here.
    if type(value) not in kinds:
        raise ConfigError(f"{where}={value!r}: expected {' or '.join(kind.__name__ for kind in kinds)}")
