"""Decisions, pure: what rank 0 tells every rank at a boundary, and what that makes of the run's mode.

reply or failure, present mode  ->  Decision (broadcast as it is)  ->  the next mode, the same on every rank
"""

from dataclasses import dataclass, replace

from tolaria.leyline.types import BreakerCommand, CircuitState, Command, CommandType, Decision
from tolaria.mode import Mode

ANSWERED = "answered"
NOT_ASKED = "breaker_open"
NO_POLICY = "no_policy"
OPERATOR = "operator"
"""Source of a decision that carries out an operator's order."""


@dataclass(frozen=True)
class Answer:
    """What came of the question to the policy. ``code`` is ANSWERED, NOT_ASKED, NO_POLICY or a failure's code."""

    code: str
    commands: tuple[bytes, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the policy should have answered and did not."""
        return self.code not in (ANSWERED, NO_POLICY)


def decide(answer: Answer, *, boundary: int, step: int, mode: Mode) -> Decision:
    """The decision of rank 0. A failed answer decides "no change" and conservative mode."""
    return Decision(
        boundary=boundary,
        step_effective=step,
        source="fallback" if answer.failed else "policy",
        reason=answer.code,
        conservative=mode.conservative or answer.failed,
        commands=() if answer.failed else answer.commands,
    )


def next_mode(mode: Mode, decision: Decision, breakers: list[BreakerCommand], healthy_boundaries: int) -> Mode:
    """The mode after a decision. ``breakers`` are the circuit-breaker commands that were accepted with it.

    Entered on a failed answer or by command (OPEN); left by command (CLOSED), or, unless a command holds it, after
    ``healthy_boundaries`` answered boundaries in a row.
    """
    for command in breakers:
        if command.desired_state == CircuitState.OPEN:
            mode = Mode(conservative=True, reason=f"command: {command.rationale or 'no reason given'}", held=True)
        else:
            mode = Mode()
    if decision.source == OPERATOR:
        return mode  # it says nothing about the policy's health
    if decision.source == "fallback":
        return replace(mode, conservative=True, reason=mode.reason or f"policy: {decision.reason}", healthy=0)
    if not mode.conservative or mode.held:
        return mode
    healthy = mode.healthy + 1
    return Mode() if healthy >= healthy_boundaries else replace(mode, healthy=healthy)


def judging_mode(mode: Mode, decision: Decision, breakers: list[BreakerCommand], healthy_boundaries: int) -> Mode:
    """The mode by which the commands of a decision are judged: the stricter of the present one and the next.

    So a reply that enters conservative mode can bring nothing that the mode forbids, in whatever order it names them,
    and one that leaves it cannot act as if it had been left before.
    """
    return mode if mode.conservative else next_mode(mode, decision, breakers, healthy_boundaries)


def refusal(command: Command, mode: Mode) -> tuple[str, str] | None:
    """Why a command cannot be accepted whatever the model's state: (code, reason), or None."""
    unsupported = {
        CommandType.EMERGENCY: "emergencies travel as signals, not as commands; use CIRCUIT_BREAKER OPEN",
        CommandType.STRUCTURAL_PRUNING: "structural pruning is out of Tolaria's scope",
    }
    if command.command_type in unsupported:
        return "unsupported", unsupported[command.command_type]
    if command.command_type == CommandType.SEED and mode.conservative:
        return "conservative", f"no structural change in conservative mode ({mode.reason})"
    if isinstance(command.payload, BreakerCommand) and command.payload.desired_state == CircuitState.HALF_OPEN:
        return "unsupported", "a breaker opens or closes by command; HALF_OPEN is its own business"
    return None
