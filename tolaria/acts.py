"""An operator's orders, carried out by all ranks between two steps: all of them, or none.

    order -> desk (rank 0) -> fence: all ranks know that one waits -> after that step:
    rank 0   screen, number, write to the log ---+
    all      <- the act, broadcast <-------------+
    all      snapshot, so that it can be undone; plan, vote, apply, compare   (tolaria/coordinator/)
    rank 0   log what became of it, answer

Acts are numbered over the life of a run, and a state knows how many it has seen. A start that comes by the step of a
logged act again makes it again, without an order; a return voids the acts behind its target.
"""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tolaria.alarm import ELEVATED, HALT
from tolaria.coordinator.decision import OPERATOR
from tolaria.coordinator.plan import Outcome as Fate
from tolaria.coordinator.plan import make_plan
from tolaria.docket import BACK, Docket
from tolaria.errors import CommandRefused
from tolaria.fence import Verdict
from tolaria.leyline.codec import decode_command, encode_decision
from tolaria.leyline.types import Command, Decision
from tolaria.leyline.words import describe
from tolaria.orders.words import CHECKPOINT, COMMAND, EMERGENCY, PAUSE, RESUME, STOP, TRY, Outcome
from tolaria.parts import Parts
from tolaria.recovery.autopilot import Incident
from tolaria.recovery.checkpoint import Payload
from tolaria.recovery.page import Phase
from tolaria.rehearsal.arms import Interrupted, Rehearsal

POLL_S = 0.05


class Effect(NamedTuple):
    """What the loop has to do after acts. ``stop_signal``: a signal came while the run stood still."""

    go_back: Incident | None = None
    stop: bool = False
    stop_signal: int = 0
    halt: bool = False


class Acts:
    """One per rank, used by the loop. Every rank calls `make` and `settled` at the same steps."""

    def __init__(self, parts: Parts, payload: Callable[[], Payload]) -> None:
        self.parts = parts
        self.state = parts.state
        self.docket = Docket(parts)
        self._payload = payload
        self._open: dict[str, Any] | None = None
        self._told_paused = -1

    def make(self, *, asked: bool) -> Effect | None:
        """All acts that are due after this step, and standing still as long as the run is paused.

        ``asked``: the fence said that an order waits. Collective; None when there is nothing left to do. Raises
        PeerLost, WalError.
        """
        if not (asked or self.state.hand.paused is not None or self.docket.again):
            return None
        while True:
            told = self.docket.next()
            if told is not None:
                if told["dry_run"]:
                    self._check(told)
                elif (effect := self._carry_out(told)) is not None:
                    return effect
            elif self.state.hand.paused is None or self.parts.comeback.returning is not None or self.docket.overtaken:
                return None
            else:
                with self.parts.step.phases("paused"):
                    effect = self._stand_still()
                if effect is not None:
                    return effect

    def settled(self, *, went: bool) -> None:
        """The return that an act asked for has been made, or could not be: say so. Local."""
        told, self._open = self._open, None
        if told is None:
            return
        outcome = Outcome(
            order_id=told["order_id"], state="refused", act=told["act"], step=told["step"], ranks=self._ranks
        )  # fmt: skip
        if told["refused"]:
            # Nothing of it has happened: the return to before it voids its number.
            self.docket.answer(replace(outcome, act=0, code="drift", reason=told["refused"]))
        elif went:
            reason, details = f"the run went back to step {self.state.step}", {"to_step": self.state.step}
            self.docket.answer(replace(outcome, state="applied", reason=reason, digest=told["digest"],
                                       details={"what": told["what"], **details}))  # fmt: skip
        else:
            reason = "the state to go back to is damaged or gone; the run goes on from where it was"
            if self.parts.world.is_coordinator:
                # Said of it once more, that counts: a start that comes by here again must not go back either.
                body = {told["command_id"]: "return_failed"}
                self.parts.guard.journal.acted(told["act"], self.state.boundary, (), body, told["digest"])
                self.parts.progress.note(f"{told['what']}: {reason}", label="refused", level="warning")
            self.parts.events.emit(
                "act_refused", "warning", act=told["act"], order_id=told["order_id"], command_id=told["command_id"],
                what=told["what"], who=told["operator"], why=told["reason"], code="return_failed", reason=reason,
                digest=told["digest"], again=told["again"],
            )  # fmt: skip
            self.docket.answer(replace(outcome, code="return_failed", reason=reason))

    # What is done

    def _check(self, told: Mapping[str, Any]) -> None:
        """A dry run: all ranks plan, nothing is changed. Collective."""
        plan = make_plan(self._decision(told), self.state, self._healthy_boundaries)
        alike = len(set(self.parts.world.peers.gather_digests(plan.digest()))) == 1
        refused = next(iter(plan.refused), None)
        outcome = Outcome(order_id=told["order_id"], state="checked", step=self.state.step, ranks=self._ranks)
        if not alike:
            outcome = replace(outcome, state="refused", code="vote", reason="the ranks do not plan the same")
        elif refused is not None:
            outcome = replace(outcome, state="refused", code=refused.code, reason=refused.reason)
        self.docket.answer(outcome)

    def _carry_out(self, told: Mapping[str, Any]) -> Effect | None:
        """One act of the log, on all ranks. Collective."""
        parts, state, action = self.parts, self.state, told["action"]
        parts.alarm.page.enter(Phase.BOUNDARY, state.step)
        if told["refused"]:
            # Why it was need not be so again: what the log says became of it is what becomes of it.
            state.hand = replace(state.hand, acts=state.hand.acts + 1)
            self._finish(told, Fate(_id_of(told), _command_of(told), False, told["refused"], "refused when it came"))
            return None
        if action == COMMAND and parts.config.recovery.snapshot_steps:
            incident = parts.guard.snapshot(self._payload(), apart=True)
            if incident is not None:
                self._open = {**told, "act": 0, "step": state.step, "refused": incident.reason}
                return Effect(go_back=incident)
        state.hand = replace(state.hand, acts=state.hand.acts + 1)
        if action == COMMAND:
            return self._command(told)
        if action == BACK:
            self._finish(told, Fate(_id_of(told), None, True, "", ""), answer=False)
            act = int(told["undoes"])
            return Effect(go_back=self.docket.before(act, told["reason"]))
        if action == TRY and not told["again"]:
            with parts.step.phases("rehearsal"):
                self._rehearse(told)
            return None
        return self._own_word(told)

    def _own_word(self, told: Mapping[str, Any]) -> Effect | None:
        """What needs no command. Of an act that is made again only what is left of it in the state."""
        parts, state, action = self.parts, self.state, told["action"]
        reason, details, effect = "", {}, None
        if action == PAUSE:
            state.hand = replace(state.hand, paused=told["reason"] or f"by {told['operator'] or 'an operator'}")
        elif action == RESUME:
            state.hand = replace(state.hand, paused=None)
        elif action == CHECKPOINT and told["live"]:
            reason = parts.saver.save_asked(self._payload) or ""
            details = {"checkpoint": str(parts.record.checkpoint)}
        elif action == EMERGENCY and told["live"] and parts.world.is_coordinator:
            parts.alarm.page.raise_level(int(told["arguments"]["level"]), f"operator: {told['reason']}")
        elif action == STOP and told["live"]:
            effect = Effect(stop=True)
        fate = Fate(_id_of(told), None, not reason, "save_failed" if reason else "", reason)
        self._finish(told, fate, details=details)
        return effect

    def _command(self, told: Mapping[str, Any]) -> Effect | None:
        parts, state = self.parts, self.state
        before = state.mode.conservative
        frame = encode_decision(self._decision(told)) if parts.world.is_coordinator else None
        applied = parts.coordinator.act(frame)
        fate, back = applied.outcomes[0], applied.go_back
        if applied.structure_changed:
            parts.guard.structure_changed()
        parts.saver.changed |= fate.applied
        if fate.applied and fate.command is not None and back is None:
            self.docket.remember(told, fate.command, conservative=before)
        self._finish(told, fate, answer=back is None)
        return None if back is None else Effect(go_back=parts.guard.commanded(back, why=told["reason"]))

    def _rehearse(self, told: Mapping[str, Any]) -> None:
        """Try a change; the run goes on from where it is. Collective; blocks for all of it."""
        parts, asked = self.parts, told["arguments"]
        parts.progress.note(f"{_in_words(told)}, beside as many without it", label="trying")
        rehearsal = Rehearsal(parts, self._urgent)
        fate, details = Fate(told["order_id"], None, True, "", ""), dict[str, Any]()
        try:
            with parts.step.phases("rehearsal"), parts.status.ledger.undivided():
                effect = rehearsal.run(str(asked["change"]), int(asked["steps"]), f"try-{told['order_id']}")
        except CommandRefused as error:
            fate = replace(fate, applied=False, code=error.code, reason=str(error))
        except Interrupted as error:
            fate = replace(fate, applied=False, code="interrupted", reason=f"{error}; it was taken back half done")
        else:
            details = effect.to_json()
            parts.events.emit("rehearsed", act=self.state.hand.acts, order_id=told["order_id"], **details)
            fate = replace(fate, reason=effect.verdict)
        self._finish(told, fate, details=details)

    def _finish(
        self, told: Mapping[str, Any], fate: Fate, *, answer: bool = True, details: Mapping[str, Any] | None = None
    ) -> None:
        """Say what became of an act: log, events of every rank, ledger, terminal, and who asked. Collective."""
        parts, state = self.parts, self.state
        digest = state.structure_digest()
        parts.world.peers.require_equal(digest, f"the state after act {state.hand.acts}")
        what = describe(fate.command) if fate.command is not None else _in_words(told)
        parts.events.emit(
            "act_applied" if fate.applied else "act_refused", "info" if fate.applied else "warning",
            act=state.hand.acts, order_id=told["order_id"], command_id=fate.command_id, what=what, who=told["operator"],
            why=told["reason"], code=fate.code, reason=fate.reason, digest=digest.hex(), again=told["again"],
        )  # fmt: skip
        if not answer:
            self._open = {**told, "act": state.hand.acts, "step": state.step, "digest": digest.hex(), "what": what,
                          "command_id": fate.command_id}  # fmt: skip
        if not parts.world.is_coordinator:
            return
        if not told["ended"]:
            ids = [fate.command_id] if fate.applied else []
            refused = {} if fate.applied else {fate.command_id: fate.code}
            parts.guard.journal.acted(state.hand.acts, state.boundary, ids, refused, digest.hex())
        parts.coordinator.enter_act(fate, what=what, by=told["operator"] or "operator", why=told["reason"])
        text = f"{what}: {fate.reason or told['reason']}".removesuffix(": ")
        parts.progress.note(text, label="operator" if fate.applied else "refused",
                            level="info" if fate.applied else "warning")  # fmt: skip
        outcome = Outcome(
            order_id=told["order_id"], state="applied" if fate.applied else "refused", act=state.hand.acts,
            step=state.step, ranks=self._ranks, code=fate.code, reason=fate.reason, digest=digest.hex(),
            details={"what": what, **(details or {})},
        )  # fmt: skip
        if answer:
            self.docket.answer(outcome)

    # Standing still

    def _stand_still(self) -> Effect | None:
        """Wait, all ranks together, for an order, a signal or an emergency; None for an order. Collective."""
        alarm, stop, peers = self.parts.alarm, self.parts.stop, self.parts.world.peers
        alarm.page.enter(Phase.PAUSED, self.state.step)
        if self._told_paused != self.state.hand.acts:
            self._told_paused = self.state.hand.acts
            self.parts.events.emit("paused", reason=self.state.hand.paused)
            self.parts.progress.note(f"{self.state.hand.paused}; waiting for a resume", label="paused")
        while True:
            # A log that lives on its reserve: save and stop while that is possible.
            number = stop.number or (signal.SIGTERM if self.parts.guard.journal.low_space else 0)
            rows = peers.gather([int(self.docket.waiting), number, alarm.level()])
            level, signal_number = max(row[2] for row in rows), max(row[1] for row in rows)
            if signal_number:
                return Effect(stop_signal=signal_number)
            if level == HALT:
                return Effect(halt=True)
            if level >= ELEVATED and (incident := self.parts.guard.judge(Verdict(level=level))) is not None:
                return Effect(go_back=incident)
            if any(row[0] for row in rows):
                return None
            time.sleep(POLL_S)

    # Helpers

    def _urgent(self) -> str:
        desk = self.parts.desk
        return f"an order to {desk.urgent} came" if desk is not None and desk.urgent else ""

    @property
    def _ranks(self) -> int:
        return self.parts.world.world_size

    @property
    def _healthy_boundaries(self) -> int:
        return self.parts.config.tamiyo.healthy_boundaries

    def _decision(self, told: Mapping[str, Any]) -> Decision:
        return Decision(
            boundary=self.state.boundary, step_effective=self.state.step, source=OPERATOR, reason=OPERATOR,
            conservative=self.state.mode.conservative, commands=(bytes.fromhex(told["command"]),),
        )  # fmt: skip


def _id_of(told: Mapping[str, Any]) -> str:
    command = _command_of(told)
    return command.command_id if command is not None else str(told["order_id"])


def _command_of(told: Mapping[str, Any]) -> Command | None:
    return decode_command(bytes.fromhex(told["command"])) if told["action"] == COMMAND else None


def _in_words(told: Mapping[str, Any]) -> str:
    if told["action"] == EMERGENCY:
        return f"emergency level {told['arguments'].get('level')}"
    if told["action"] == BACK:
        return f"undo act {told['undoes']} with the weights"
    if told["action"] == TRY:
        return f"try {told['arguments'].get('change')} for {told['arguments'].get('steps')} steps"
    return str(told["action"])
