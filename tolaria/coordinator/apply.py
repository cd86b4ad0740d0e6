"""How a decision takes effect: on all ranks at one step, or on none.

plan      each rank checks every command against its own state (tolaria/coordinator/plan.py)
vote      do all ranks plan the same?                      no -> nothing is applied
apply     structure, optimizer groups, LR, DDP wrapper
compare   did it work everywhere? digest of names, shapes, new weights, groups, LR
                                                           no -> every rank returns to the state before
warm up   compile the new structure, check its gradients   no -> every rank returns to the state before
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tolaria.coordinator.decision import next_mode
from tolaria.coordinator.optimizer_class import change_class
from tolaria.coordinator.plan import Outcome, Plan, refuse
from tolaria.dist import Peers
from tolaria.errors import PeerLost, TolariaError
from tolaria.leyline.types import BreakerCommand, Decision, RollbackCommand, SeedOp
from tolaria.mode import Mode
from tolaria.objective import Batch
from tolaria.replica import Replica
from tolaria.state import Memento, TrainState
from tolaria.telemetry.split import Split

_FAILED = bytes(32)
"""In place of the digest of a change that a rank could not make."""


@dataclass
class Applied:
    """A decision after it was carried out, with the time each part took in milliseconds.

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


def carry_out(
    plan: Plan,
    state: TrainState,
    replica: Replica,
    peers: Peers,
    *,
    healthy_boundaries: int,
    sample: Callable[[int], Batch],
    split: Split,
) -> Applied:
    """Do what all ranks have planned alike. Collective.

    Blocks for a few small collectives, none when there is nothing to change, and for the compile of a structure not
    seen before. If anything fails on any rank, every rank is back in the state before, its commands refused with code
    "apply_failed", "digest_mismatch" or "warm_up". Raises PeerLost only.
    """
    decision = plan.decision
    result = Applied(decision, list(plan.refused), state.mode, latency_ms=split.ms)
    memento = state.memento() if plan.changes else None
    _enter_mode(state, decision, plan.breakers, healthy_boundaries)
    if memento is not None:
        failure = _change_alike(plan, state, replica, peers, result, sample, split)
        if failure is not None:
            _go_back(memento, state, replica)
            # What the answer itself says about the policy's health stands; the commands that came with it do not.
            _enter_mode(state, decision, (), healthy_boundaries)
            result.outcomes += refuse(plan.accepted, *failure)
            return result
    if plan.pause is not None:
        state.hand = replace(state.hand, paused=plan.pause)
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


def _change_alike(
    plan: Plan,
    state: TrainState,
    replica: Replica,
    peers: Peers,
    result: Applied,
    sample: Callable[[int], Batch],
    split: Split,
) -> tuple[str, str] | None:
    """None if the plan is in force on every rank, else (code, reason) of what to report after going back."""
    error = ""
    with split.timed("apply"):
        try:
            _change(plan, state, replica)
        except PeerLost:
            raise
        except (TolariaError, RuntimeError, ValueError, MemoryError) as cause:
            error = f"{type(cause).__name__}: {cause}"
    with split.timed("digest"):
        # One question for both: a change that failed has no digest to compare.
        digests = peers.gather_digests(_FAILED if error else state.structure_digest())
        if _FAILED in digests:
            return "apply_failed", error or "another rank could not apply it"
        if len(set(digests)) > 1:
            return "digest_mismatch", "the ranks differ after the change"
        result.digest = digests[0].hex()
    with split.timed("warm_up"):
        try:
            replica.warm_up(sample)
        except PeerLost:
            raise
        except TolariaError as cause:
            error = str(cause)
        if not peers.agree(not error):
            return "warm_up", error or "the new structure failed on another rank"
    return None


def _change(plan: Plan, state: TrainState, replica: Replica) -> None:
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
