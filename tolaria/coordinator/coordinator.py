"""The boundary's conversation: rank 0 asks the policy, every rank obeys the same decision.

rank 0   state packet -> policy (deadline, breaker) -> decision ----+
all      <- fixed-size broadcast of the exact bytes <---------------+
all      plan, vote, apply, vote, compare   (tolaria/coordinator/apply.py)
rank 0   field reports for the next packet
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tolaria.config_tamiyo import TamiyoConfig
from tolaria.coordinator.apply import Applied
from tolaria.coordinator.decision import ANSWERED, NO_POLICY, NOT_ASKED, Answer, decide
from tolaria.coordinator.delivery import NO_DECISION, obey
from tolaria.coordinator.ledger import Ledger
from tolaria.coordinator.packet import RunFacts, build_packet
from tolaria.coordinator.plan import Outcome
from tolaria.dist import World
from tolaria.errors import MessageRejected, PolicyUnavailable, WalError
from tolaria.leyline.codec import decode_command, encode_decision
from tolaria.leyline.types import (
    Command,
    CommandType,
    Decision,
    EmergencySignal,
    PolicyRequest,
    RollbackCommand,
)
from tolaria.measure import Report
from tolaria.objective import Batch
from tolaria.recovery.journal import Journal
from tolaria.replica import Replica
from tolaria.state import TrainState
from tolaria.tamiyo.breaker import CircuitBreaker
from tolaria.tamiyo.client import PolicyClient
from tolaria.tamiyo.shadow import Shadow
from tolaria.telemetry.events import EventLog, Level
from tolaria.telemetry.split import Split

LOSS_HISTORY = 16
"""Validation losses of so many boundaries travel with every packet."""


class Coordinator:
    """Runs the handshake and carries its decision to all ranks. One per rank; the policy is asked by rank 0 only.

    The decision is in the log before it is broadcast. A boundary that the run goes through again, after a restart,
    takes its decision from the log; the policy is not asked a second time. ``shadow``, where one is set, is asked what
    the policy is asked.
    """

    def __init__(
        self,
        state: TrainState,
        replica: Replica,
        world: World,
        config: TamiyoConfig,
        events: EventLog,
        *,
        facts: RunFacts,
        journal: Journal,
        client: PolicyClient | None,
        revive: Callable[[], bool] | None,
        sample: Callable[[int], Batch],
        rest_boundaries: int,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.state = state
        self.replica = replica
        self.world = world
        self.config = config
        self.events = events
        self.ledger = Ledger(facts.run_id, config.observation_boundaries, wall_ns)
        self.breaker = CircuitBreaker(config)
        self._journal = journal
        self._client = client
        self._revive = revive
        self.shadow: Shadow | None = None
        self._facts = facts
        self._losses: deque[float] = deque(maxlen=LOSS_HISTORY)
        self._sample = sample
        self._rest_boundaries = rest_boundaries
        self._wall_ns = wall_ns

    def exchange(self, report: Report) -> Applied:
        """One boundary. Collective; blocks for the policy's deadline at most, plus a few small collectives.

        Afterwards every rank has applied the same commands, or none. Raises PeerLost.
        """
        frame = None
        split = Split()
        screened: list[Outcome] = []
        failure: WalError | None = None
        if self.world.is_coordinator:
            try:
                frame, screened = self._decide(report, split)
            except WalError as error:
                frame, failure = NO_DECISION, error
        applied = obey(
            frame, self.state, self.replica, self.world.peers,
            healthy_boundaries=self.config.healthy_boundaries, sample=self._sample, split=split,
        )  # fmt: skip
        if applied is None:
            raise failure or WalError("rank 0 cannot write its log of decisions; its own output says why")
        applied.outcomes += screened
        with split.timed("telemetry"):
            self._tell(applied, report)
            if self.shadow is not None:
                self.shadow.ask()
        return applied

    def act(self, frame: bytes | None) -> Applied:
        """Carry out an operator's decision, which rank 0 passes encoded, between two boundaries. Collective.

        As `exchange` does it, with nobody asked. Raises PeerLost.
        """
        applied = obey(
            frame, self.state, self.replica, self.world.peers,
            healthy_boundaries=self.config.healthy_boundaries, sample=self._sample, split=Split(),
        )  # fmt: skip
        if applied is None:
            raise RuntimeError("rank 0 passed no decision")
        self._tell_mode(applied)
        return applied

    def enter_act(self, fate: Outcome, *, what: str, by: str, why: str) -> None:
        """Keep an operator's act among the run's commands. Rank 0, local."""
        loss = self._losses[0] if self._losses else math.nan
        self.ledger.enter(
            fate, boundary=self.state.boundary, step=self.state.step, loss=loss, accuracy=math.nan, what=what, by=by,
            why=why,
        )  # fmt: skip

    def _decide(self, report: Report, split: Split) -> tuple[bytes, list[Outcome]]:
        """Rank 0: the decision's bytes, from the log or new and then in the log, and what was refused beforehand."""
        for record in self.ledger.observe(self.state.boundary, report.val_loss, report.val_accuracy):
            self.events.emit("command_judged", command_id=record.command_id, outcome=record.outcome,
                             effect=record.effect)  # fmt: skip
        with split.timed("packet"):
            request = PolicyRequest(
                state=build_packet(report, self.state, self._facts, self._losses, self._wall_ns()),
                field_reports=self.ledger.pending,
            )
        self._losses.appendleft(report.val_loss)
        logged = self._journal.logged(self.state.boundary)
        screened: list[Outcome] = []
        if logged is None:
            answer = self._ask(request, split)
            if self.shadow is not None:
                new = self._client is not None and answer.code not in (NO_POLICY, NOT_ASKED)
                payload = self._client.payload if self._client is not None and new else b""
                commanded = answer.commands if answer.code == ANSWERED else None
                self.shadow.hold(self.state.boundary, request, payload, commanded)
            with split.timed("decision"):
                answer, screened = self._screen(answer)
                logged = self._record(answer)
        else:
            self._repeat(logged, request)
        return encode_decision(logged), screened

    def _screen(self, answer: Answer) -> tuple[Answer, list[Outcome]]:
        """Take out what only rank 0 can judge: commands that took effect before, returns that can not be made."""
        kept, refused = [], []
        for position, raw in enumerate(answer.commands):
            try:
                reason = self._refuse_beforehand(decode_command(raw))
            except MessageRejected:
                reason = None  # every rank refuses it, with the reason
            if reason is None:
                kept.append(raw)
            else:
                refused.append(Outcome(f"boundary-{self.state.boundary}-{position}", None, False, *reason))
        return replace(answer, commands=tuple(kept)), refused

    def _refuse_beforehand(self, command: Command) -> tuple[str, str] | None:
        if self._journal.applied_before(command.command_id):
            return "already_applied", f"command {command.command_id} has taken effect before; an id is used once"
        if command.command_type == CommandType.PAUSE and not self.config.may_pause:
            return "pause_not_allowed", "the policy may not pause this run (tamiyo.may_pause)"
        if isinstance(command.payload, RollbackCommand):
            return self._journal.refuses_return(command.payload, self.state.boundary, self._rest_boundaries)
        return None

    def _repeat(self, logged: Decision, request: PolicyRequest) -> None:
        """Go through a boundary again as it went before, without asking anybody."""
        if logged.step_effective != self.state.step:
            raise WalError(
                f"the log has boundary {logged.boundary} at step {logged.step_effective}, the run at {self.state.step}"
            )
        if logged.source == "fallback" and logged.reason != NOT_ASKED:
            self.breaker.failure(logged.reason)
        elif logged.reason == ANSWERED:
            self.breaker.success()
            self.ledger.delivered(request.field_reports)
        self.events.emit("decision_repeated", boundary=logged.boundary, source=logged.source, reason=logged.reason)

    def _ask(self, request: PolicyRequest, split: Split) -> Answer:
        if self._client is None:
            return Answer(NO_POLICY)
        deadline_ms = self.breaker.allow(self.state.boundary)
        if deadline_ms is None:
            return Answer(NOT_ASKED)
        if self._revive is not None and self._revive():
            self.events.emit("policy_restarted", "warning", reason="the embedded policy had died")
        try:
            reply = self._client.ask(request, boundary=self.state.boundary, deadline_ms=deadline_ms, split=split)
        except PolicyUnavailable as error:
            self.breaker.failure(error.code)
            self.events.emit("policy_failed", "warning", code=error.code, reason=str(error),
                             breaker=self.breaker.state.name, rejected=dict(self._client.rejected))  # fmt: skip
            return Answer(error.code)
        self.breaker.success()
        self.ledger.delivered(request.field_reports)
        return Answer(ANSWERED, reply.commands)

    def _record(self, answer: Answer) -> Decision:
        decision = decide(answer, boundary=self.state.boundary, step=self.state.step, mode=self.state.mode)
        self._journal.decided(decision)
        self.events.note(
            "decision", boundary=decision.boundary, source=decision.source, reason=decision.reason,
            conservative=decision.conservative, commands=[raw.hex() for raw in decision.commands],
        )  # fmt: skip
        return decision

    def _tell(self, applied: Applied, report: Report) -> None:
        if self.world.is_coordinator and applied.outcomes:
            done = [o.command_id for o in applied.outcomes if o.applied]
            refused = {o.command_id: o.code for o in applied.outcomes if not o.applied}
            self._journal.applied(self.state.boundary, done, refused, applied.digest)
        for outcome in applied.outcomes:
            if self.world.is_coordinator:
                self.ledger.enter(outcome, boundary=self.state.boundary, step=self.state.step,
                                  loss=report.val_loss, accuracy=report.val_accuracy)  # fmt: skip
                record = self.ledger.records[outcome.command_id]
                kind = "command_applied" if outcome.applied else "command_refused"
                self.events.emit(kind, "info" if outcome.applied else "warning", command_id=outcome.command_id,
                                 what=record.what, code=outcome.code, reason=outcome.reason)  # fmt: skip
        self._tell_mode(applied)

    def _tell_mode(self, applied: Applied) -> None:
        before, after = applied.mode_before, self.state.mode
        if self.world.is_coordinator and before.conservative != after.conservative:
            level: Level = "warning" if after.conservative else "info"
            self.events.emit("mode_changed", level, mode=after.name, reason=after.reason or "healthy again")

    def signals(self) -> list[EmergencySignal]:
        """Emergencies that the policy has raised since the last call; nothing on other ranks than 0. Local."""
        return self._client.signals() if self._client is not None else []

    def state_dict(self) -> dict[str, Any]:
        """Rank 0's own memory (breaker, ledger); empty on other ranks."""
        if not self.world.is_coordinator:
            return {}
        losses = [loss.hex() for loss in self._losses]
        return {"breaker": self.breaker.state_dict(), "ledger": self.ledger.state_dict(), "losses": losses}

    def went_back(self, state: Mapping[str, Any], reason: str) -> None:
        """Take over what rank 0 knew at the state that the run went back to; commands since then count as undone.
        What is known of the policy's health stays."""
        if self.world.is_coordinator:
            former, breaker = dict(self.ledger.records), self.breaker.state_dict()
            self.load_state_dict(state)
            self.breaker.load_state_dict(breaker)
            self.ledger.undone(former, reason)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on rank 0."""
        if self.world.is_coordinator and state:
            self.breaker.load_state_dict(state["breaker"])
            self.ledger.load_state_dict(state["ledger"])
            self._losses = deque(map(float.fromhex, state["losses"]), maxlen=LOSS_HISTORY)
