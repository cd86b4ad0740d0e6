"""How a decision takes effect: on all ranks at one step, or on none.

plan      each rank checks every command against its own state and the stricter of the mode before and after; refused
          ones fall out, with the reason
vote      do all ranks plan the same?                      no -> nothing is applied
apply     structure, optimizer groups, LR, DDP wrapper
vote      did it work everywhere?                          no -> every rank returns to the state before
compare   digest of names, shapes, new weights, groups, LR no -> every rank returns to the state before
warm up   compile the new structure, check its gradients   no -> every rank returns to the state before
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeAlias

from tolaria.coordinator.decision import judging_mode, next_mode, refusal
from tolaria.coordinator.optimizer_class import change_class, check_class, check_seed, names_class
from tolaria.dist import Peers
from tolaria.errors import CommandRefused, MessageRejected, PeerLost, TolariaError
from tolaria.kasmina.host import PlannedMove
from tolaria.leyline.codec import decode_command, encode_decision
from tolaria.leyline.types import (
    BreakerCommand,
    Command,
    CommandType,
    Decision,
    OptimizerCommand,
    RollbackCommand,
    SeedOp,
)
from tolaria.objective import Batch
from tolaria.optim.tuning import Tuning
from tolaria.replica import Replica
from tolaria.state import Memento, Mode, TrainState


@dataclass(frozen=True)
class Outcome:
    """What became of one command: applied, or refused with a stable code and the reason in words."""

    command_id: str
    command: Command | None
    applied: bool
    code: str
    reason: str


@dataclass
class Applied:
    """A decision after `apply_decision`, with the time each part took in milliseconds.

    ``go_back``: the return that was asked for and is still to be made. ``digest``: of the structure that the commands
    led to, equal on all ranks; empty when nothing changed.
    """

    decision: Decision
    outcomes: list[Outcome] = field(default_factory=list)
    mode_before: Mode = field(default_factory=Mode)
    structure_changed: bool = False
    latency_ms: dict[str, float] = field(default_factory=dict)
    go_back: RollbackCommand | None = None
    digest: str = ""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``latency_ms[part]``."""
        start = perf_counter()
        try:
            yield
        finally:
            self.latency_ms[part] = self.latency_ms.get(part, 0.0) + (perf_counter() - start) * 1e3


@dataclass(frozen=True)
class _Plan:
    seed_moves: tuple[PlannedMove, ...]
    tunings: tuple[Tuning, ...]
    classes: tuple[OptimizerCommand, ...]
    breakers: tuple[BreakerCommand, ...]
    accepted: tuple[Command, ...]
    go_back: RollbackCommand | None = None


def apply_decision(
    decision: Decision,
    state: TrainState,
    replica: Replica,
    peers: Peers,
    *,
    healthy_boundaries: int,
    sample: Callable[[int], Batch],
) -> Applied:
    """Carry out a broadcast decision. Collective: every rank calls it with the same decision.

    Blocks for a few small collectives, and for the compile of a structure not seen before. If anything fails on any
    rank, every rank is back in the state before, its commands refused with code "vote", "apply_failed",
    "digest_mismatch" or "warm_up". Raises PeerLost only.
    """
    result = Applied(decision, mode_before=state.mode)
    with result.timed("check"):
        plan = _make_plan(decision, state, result, healthy_boundaries)
        # Not the verdict alone is compared but what led to it: two ranks may accept different commands.
        same = len(set(peers.gather_digests(_plan_digest(decision, result)))) == 1
    if not same:
        _refuse(result, plan.accepted, "vote", "the ranks did not plan the same change")
        plan = _Plan((), (), (), (), ())
    memento = state.memento()
    _enter_mode(state, decision, plan.breakers, healthy_boundaries)
    if plan.seed_moves or plan.tunings or plan.classes:
        failure = _carry_out(plan, state, replica, peers, result, sample)
        if failure is not None:
            _go_back(memento, state, replica)
            # What the answer itself says about the policy's health stands; the commands that came with it do not.
            _enter_mode(state, decision, (), healthy_boundaries)
            _refuse(result, plan.accepted, *failure)
            return result
    result.structure_changed = bool(plan.seed_moves)
    result.go_back = plan.go_back
    result.outcomes += [Outcome(c.command_id, c, True, "applied", c.reason) for c in plan.accepted]
    return result


def _enter_mode(
    state: TrainState, decision: Decision, breakers: Sequence[BreakerCommand], healthy_boundaries: int
) -> None:  # fmt: skip
    state.mode = next_mode(state.mode, decision, list(breakers), healthy_boundaries)
    if state.lr.tampered and not state.mode.conservative:
        state.lr.reset_integrity()


def _make_plan(decision: Decision, state: TrainState, result: Applied, healthy_boundaries: int) -> _Plan:
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
            result.outcomes.append(Outcome(name, known, False, error.code, str(error)))
    returns = [c for c in accepted if isinstance(c.payload, RollbackCommand)]
    if returns:
        # What else the decision asks for would be undone by the return.
        others = tuple(c for c in accepted if c is not returns[0])
        _refuse(result, others, "going_back", "the decision asks to go back to an earlier state")
        return _Plan((), (), (), (), (returns[0],), returns[0].payload)  # type: ignore[arg-type]
    return _Plan(tuple(moves), tuple(tunings), tuple(classes), tuple(breakers), tuple(accepted))


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


def _carry_out(
    plan: _Plan,
    state: TrainState,
    replica: Replica,
    peers: Peers,
    result: Applied,
    sample: Callable[[int], Batch],
) -> tuple[str, str] | None:
    """None if the plan is in force on every rank, else (code, reason) of what to report after going back."""
    error = ""
    with result.timed("apply"):
        try:
            _change(plan, state, replica)
        except PeerLost:
            raise
        except (TolariaError, RuntimeError, ValueError, MemoryError) as cause:
            error = f"{type(cause).__name__}: {cause}"
        if not peers.agree(not error):
            return "apply_failed", error or "another rank could not apply it"
    with result.timed("digest"):
        digests = peers.gather_digests(state.structure_digest())
        if len(set(digests)) > 1:
            return "digest_mismatch", "the ranks differ after the change"
        result.digest = digests[0].hex()
    with result.timed("warm_up"):
        try:
            replica.warm_up(sample)
        except PeerLost:
            raise
        except TolariaError as cause:
            error = str(cause)
        if not peers.agree(not error):
            return "warm_up", error or "the new structure failed on another rank"
    return None


def _change(plan: _Plan, state: TrainState, replica: Replica) -> None:
    # Before the seeds move: a group that a command names may be culled by the next one.
    for tuning in plan.tunings:
        state.tuner.commit(tuning, state.optimizer, state.lr, state.step)
    for move in plan.seed_moves:
        state.kasmina.apply(move)
    state.regroup()
    for move in plan.seed_moves:
        group = state.kasmina.seeds[move.command.target_seed_id].group
        if move.seed_command.operation == SeedOp.START_TRAINING:
            state.restart_warmup(group)
        elif move.seed_command.operation == SeedOp.FOSSILIZE:
            state.lr.follow_host(group)
    for payload in plan.classes:
        change_class(payload, state)
    replica.rebuild()


def _go_back(memento: Memento, state: TrainState, replica: Replica) -> None:
    state.restore(memento)
    # A rank that failed early still has its old wrapper, the others have made new ones.
    replica.rebuild(afresh=True)


def _refuse(result: Applied, commands: Sequence[Command], code: str, reason: str) -> None:
    result.outcomes += [Outcome(c.command_id, c, False, code, reason) for c in commands]


def _plan_digest(decision: Decision, result: Applied) -> bytes:
    verdicts: Sequence[str] = [f"{o.command_id}:{o.code}" for o in result.outcomes]
    return hashlib.sha256(encode_decision(decision) + "|".join(verdicts).encode()).digest()
