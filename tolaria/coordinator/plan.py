"""What a decision would do: every rank plans it against its own state, and the plans are compared before one acts.

A command is checked against the stricter of the mode before and after; a refused one falls out, with the reason.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tolaria.coordinator.decision import judging_mode, refusal
from tolaria.coordinator.optimizer_class import check_class, check_seed, names_class
from tolaria.errors import CommandRefused, MessageRejected
from tolaria.kasmina.host import PlannedMove
from tolaria.leyline.codec import decode_command, encode_decision
from tolaria.leyline.types import (
    BreakerCommand,
    Command,
    CommandType,
    Decision,
    OptimizerCommand,
    RollbackCommand,
)
from tolaria.mode import Mode
from tolaria.optim.tuning import Tuning
from tolaria.state import TrainState


@dataclass(frozen=True)
class Outcome:
    """What became of one command: applied, or refused with a stable code and the reason in words."""

    command_id: str
    command: Command | None
    applied: bool
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What this rank would do about a decision: moves of seeds, changes of the optimizer, a return.

    ``accepted``: the commands that it carries out; ``refused``: what became of the others. ``pause``: why the run is to
    stand still after the decision, None if it is not.
    """

    decision: Decision
    refused: tuple[Outcome, ...] = ()
    accepted: tuple[Command, ...] = ()
    seed_moves: tuple[PlannedMove, ...] = ()
    tunings: tuple[Tuning, ...] = ()
    classes: tuple[OptimizerCommand, ...] = ()
    breakers: tuple[BreakerCommand, ...] = ()
    go_back: RollbackCommand | None = None
    pause: str | None = None

    @property
    def changes(self) -> bool:
        """Whether there is anything to apply, beside the mode."""
        return bool(self.seed_moves or self.tunings or self.classes)

    def digest(self) -> bytes:
        """sha256 of what led to the plan: two ranks may accept different commands of one decision."""
        verdicts = [f"{outcome.command_id}:{outcome.code}" for outcome in self.refused]
        return hashlib.sha256(encode_decision(self.decision) + "|".join(verdicts).encode()).digest()

    def dropped(self, code: str, reason: str) -> "Plan":
        """The plan that does nothing: what this one accepted is refused."""
        return Plan(decision=self.decision, refused=(*self.refused, *refuse(self.accepted, code, reason)))


def refuse(commands: Sequence[Command], code: str, reason: str) -> list[Outcome]:
    """The outcomes of commands that are refused together."""
    return [Outcome(command.command_id, command, False, code, reason) for command in commands]


def make_plan(decision: Decision, state: TrainState, healthy_boundaries: int) -> Plan:
    """Check a decision's commands against this rank's state. Local; changes nothing."""
    refused: list[Outcome] = []
    moves: list[PlannedMove] = []
    tunings: list[Tuning] = []
    classes: list[OptimizerCommand] = []
    breakers: list[BreakerCommand] = []
    accepted: list[Command] = []
    touched: set[str] = set()
    received = list(_read(decision))
    mode = _judging_mode(decision, state, received, healthy_boundaries)
    for name, command in received:
        try:
            if not isinstance(command, Command):
                raise command
            _check_command(command, mode, touched)
            if command.command_type == CommandType.SEED:
                planned = sum(p.numel() for m in moves if m.module is not None for p in m.module.parameters())
                move = state.kasmina.plan(command, already_planned=planned)
                check_seed(move, state)
                moves.append(move)
                touched.add(command.target_seed_id)
            elif isinstance(command.payload, OptimizerCommand):
                if names_class(command.payload) and not tunings:
                    touched |= check_class(command.payload, state, touched, mode)
                    classes.append(command.payload)
                elif not names_class(command.payload) and not classes:
                    tunings.append(_plan_tuning(command.command_id, command.payload, state, touched, mode))
                    touched |= tunings[-1].touched
                else:
                    # What one is planned against the other replaces.
                    raise CommandRefused("one_per_boundary", "another class and settings of the present one: one only")
            elif isinstance(command.payload, BreakerCommand):
                breakers.append(command.payload)
            accepted.append(command)
        except (CommandRefused, MessageRejected) as error:
            known = command if isinstance(command, Command) else None
            refused.append(Outcome(name, known, False, error.code, str(error)))
    returns = [c for c in accepted if isinstance(c.payload, RollbackCommand)]
    if returns:
        # What else the decision asks for would be undone by the return.
        others = tuple(c for c in accepted if c is not returns[0])
        refused += refuse(others, "going_back", "the decision asks to go back to an earlier state")
        return Plan(
            decision=decision, refused=tuple(refused), accepted=(returns[0],),
            go_back=returns[0].payload,  # type: ignore[arg-type]
        )  # fmt: skip
    pauses = [c.reason or "asked for by the policy" for c in accepted if c.command_type == CommandType.PAUSE]
    return Plan(
        decision=decision, refused=tuple(refused), accepted=tuple(accepted), seed_moves=tuple(moves),
        tunings=tuple(tunings), classes=tuple(classes), breakers=tuple(breakers), pause=next(iter(pauses), None),
    )  # fmt: skip


_Received: TypeAlias = tuple[str, Command | CommandRefused | MessageRejected]
"""Name for the outcome; the command, or why there is none."""


def _read(decision: Decision) -> Iterator[_Received]:
    ids: set[str] = set()
    for position, raw in enumerate(decision.commands):
        # The outcome of what is no command, or has another's id, must not be taken for that of the other.
        nameless = f"boundary-{decision.boundary}-{position}"
        try:
            command = decode_command(raw)
        except MessageRejected as error:
            yield nameless, error
            continue
        if command.command_id in ids:
            yield nameless, CommandRefused("duplicate_id", "another command of this reply has the same command_id")
        else:
            ids.add(command.command_id)
            yield command.command_id, command


def _judging_mode(
    decision: Decision, state: TrainState, received: Sequence[_Received], healthy_boundaries: int
) -> Mode:  # fmt: skip
    wishes = [
        command.payload for _, command in received
        if isinstance(command, Command) and isinstance(command.payload, BreakerCommand)
        and refusal(command, state.mode) is None
    ]  # fmt: skip
    return judging_mode(state.mode, decision, wishes, healthy_boundaries)


def _check_command(command: Command, mode: Mode, touched: set[str]) -> None:
    refused = refusal(command, mode)
    if refused is not None:
        raise CommandRefused(*refused)
    if command.target_seed_id in touched and command.command_type == CommandType.SEED:
        raise CommandRefused(
            "one_per_boundary", f"slot {command.target_seed_id!r} was commanded at this boundary already"
        )


def _plan_tuning(
    command_id: str, payload: OptimizerCommand, state: TrainState, touched: set[str], mode: Mode
) -> Tuning:  # fmt: skip
    tuning = state.tuner.plan(
        command_id, payload, state.optimizer, state.lr, step=state.step, conservative=mode.conservative
    )
    if tuning.touched & touched:
        # Each alone may be within the bounds and both together not.
        again = ", ".join(sorted(tuning.touched & touched))
        raise CommandRefused("one_per_boundary", f"{again} was commanded at this boundary already")
    return tuning
