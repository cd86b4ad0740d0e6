"""What the operator asks for, as acts in their order: rank 0's screening and numbering, and what can still be undone.

the log's next act, if the run comes by its step again
else the oldest order that waits: screened, an undo turned into the command that it comes to, numbered, logged
-> told to all ranks
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from tolaria.alarm import ELEVATED
from tolaria.errors import CommandRefused, ConfigError, MessageRejected, WalError
from tolaria.leyline.codec import decode_command, encode_command
from tolaria.leyline.types import Command, CommandType, EmergencyLevel, RollbackCommand
from tolaria.leyline.words import describe
from tolaria.orders.desk import Waiting
from tolaria.orders.words import COMMAND, EMERGENCY, PAUSE, RESUME, STOP, TRY, UNDO, Order, Outcome
from tolaria.parts import Parts
from tolaria.recovery.autopilot import Incident
from tolaria.recovery.timeline import LoggedAct
from tolaria.rehearsal.change import parse_change
from tolaria.tamiyo.policy import with_identity
from tolaria.undo import Done, inverse

BACK = "back"
"""What an undo with the weights becomes."""
MAX_DONE = 32
_NOT_LOGGED = frozenset({"dry_run", "act", "again", "live", "ended", "refused"})


class Docket:
    """One per rank, used by `Acts`; only rank 0's has a desk."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.state = parts.state
        self._done: list[Done] = []

    @property
    def waiting(self) -> bool:
        """Whether there is an order that can be carried out now: not while what is logged is still to come. Local."""
        desk = self.parts.desk
        return (
            desk is not None and desk.waiting and self.parts.comeback.returning is None
            and self.parts.guard.journal.next_act(self.state.hand.acts) is None
        )  # fmt: skip

    @property
    def again(self) -> bool:
        """Whether the log has an act at this very step that this state has not seen. Equal on all ranks."""
        logged = self._due
        return logged is not None and logged.step == self.state.step

    @property
    def overtaken(self) -> bool:
        """Whether the log has a later act, so that the run went on from here. Equal on all ranks."""
        logged = self.parts.guard.journal.next_act(self.state.hand.acts)
        return logged is not None and logged.step > self.state.step

    @property
    def _due(self) -> LoggedAct | None:
        """The log's next act; not one that was made after a return to this step, as long as that is to come."""
        logged, upto = self.parts.guard.journal.next_act(self.state.hand.acts), self.parts.comeback.returning
        return logged if upto is None or logged is None or logged.number <= upto else None

    def next(self) -> dict[str, Any] | None:
        """The next act, told by rank 0 to all; it is in the log by then. None when there is none. Collective."""
        told: dict[str, Any] | None = None
        raw = None
        if self.parts.world.is_coordinator:
            try:
                told = self._logged() or self._new()
            except WalError as error:
                told = {"error": str(error)}
            raw = json.dumps(told).encode()
        told = json.loads(self.parts.world.peers.broadcast(raw))
        if told is not None and "error" in told:
            raise WalError(told["error"])
        return told

    def _logged(self) -> dict[str, Any] | None:
        logged, journal = self._due, self.parts.guard.journal
        if logged is None or logged.body is None or logged.step > self.state.step:
            return None
        if logged.step < self.state.step:
            raise WalError(f"the log has act {logged.number} at step {logged.step}, the run at {self.state.step}")
        # What ended the run is not done once more by one that goes on; what a crash cut off is.
        live = journal.restarted and not logged.over if logged.body["action"] == STOP else not logged.ended
        return {
            **logged.body, "frame": "", "dry_run": False, "again": True, "live": live, "ended": logged.ended,
            "refused": logged.refused,
        }  # fmt: skip

    def _new(self) -> dict[str, Any] | None:
        desk = self.parts.desk
        while desk is not None and self.waiting and (waiting := desk.take()) is not None:
            try:
                told = self._screen(waiting.order)
            except (CommandRefused, MessageRejected) as error:
                self._refuse(waiting.order, error.code, str(error))
                continue
            if told["dry_run"] and told["action"] != COMMAND:
                self.answer(Outcome(order_id=told["order_id"], state="checked", step=self.state.step))
                continue
            if not told["dry_run"]:
                self._log(told, waiting)
            return told
        return None

    def _log(self, told: dict[str, Any], waiting: Waiting) -> None:
        told["act"] = self.state.hand.acts + 1
        body = {key: value for key, value in told.items() if key not in _NOT_LOGGED}
        self.parts.guard.journal.act(told["act"], self.state.step, {**body, "frame": waiting.frame.hex()})

    def _screen(self, order: Order) -> dict[str, Any]:
        """What only rank 0 can judge, and an undo as the command that it comes to. Raises CommandRefused."""
        journal, paused = self.parts.guard.journal, self.state.hand.paused is not None
        action, raw, undoes = order.action, order.command, 0
        if action == COMMAND:
            command = decode_command(raw)
            if command.command_type == CommandType.PAUSE:
                action, raw = PAUSE, b""
            if journal.applied_before(command.command_id):
                raise CommandRefused("already_applied", f"command {command.command_id} has taken effect before")
            if isinstance(command.payload, RollbackCommand):
                refused = journal.refuses_return(command.payload, self.state.boundary, rest=0)
                if refused is not None:
                    raise CommandRefused(*refused)
        if action == PAUSE and paused:
            raise CommandRefused("paused", f"the run stands still already: {self.state.hand.paused}")
        if action == RESUME and not paused:
            raise CommandRefused("not_paused", "the run is not paused")
        if action == EMERGENCY and order.arguments.get("level") not in [int(level) for level in EmergencyLevel]:
            raise CommandRefused("bad_level", f"level {order.arguments.get('level')!r:.20}: expected 1 to 4")
        _check_try(order)
        if action == UNDO:
            action, raw, undoes = self._undoing(order)
        return {
            "action": action, "order_id": order.order_id, "operator": order.operator, "reason": order.reason,
            "command": raw.hex(), "arguments": dict(order.arguments), "dry_run": order.dry_run, "undoes": undoes,
            "again": False, "live": True, "ended": False, "refused": "",
        }  # fmt: skip

    def _undoing(self, order: Order) -> tuple[str, bytes, int]:
        if not self._done:
            raise CommandRefused("nothing_to_undo", "no operator's command is left to undo")
        last = self._done[-1]
        if order.arguments.get("weights") is True:
            if not self.parts.comeback.reaches(self.before(last.act, "")):
                raise CommandRefused(
                    "no_state", f"neither a snapshot nor a checkpoint from before act {last.act} is left"
                )
            return BACK, b"", last.act
        state = self.state
        command = inverse(
            last, newest=lambda pattern: state.tuner.newest(state.lr.matching(pattern)),
            seed=lambda slot: state.kasmina.seeds[slot],
        )  # fmt: skip
        named = with_identity(
            command, f"undo-{order.order_id}", issued_by=order.operator, issued_at_ns=time.time_ns()
        )  # fmt: skip
        return COMMAND, encode_command(named), last.act

    def remember(self, told: Mapping[str, Any], command: Command, *, conservative: bool) -> None:
        """A command has taken effect, or taken another one back. Local, alike on all ranks."""
        if told["undoes"]:
            self._done = [done for done in self._done if done.act != told["undoes"]]
            return
        act = Done.of(
            self.state.hand.acts, self.state.step, command, describe(command), conservative=conservative
        )  # fmt: skip
        self._done = [*self._done, act][-MAX_DONE:]

    def _refuse(self, order: Order, code: str, reason: str) -> None:
        """Rank 0 alone knows, and says so."""
        self.parts.events.emit("act_refused", "warning", act=0, order_id=order.order_id, what=order.action,
                               who=order.operator, why=order.reason, code=code, reason=reason)  # fmt: skip
        self.parts.progress.note(f"{order.action}: {reason}", label="refused", level="warning")
        self.answer(
            Outcome(order_id=order.order_id, state="refused", step=self.state.step, code=code, reason=reason)
        )  # fmt: skip

    def answer(self, outcome: Outcome) -> None:
        """Tell who asked. Local; nothing on other ranks than 0."""
        if self.parts.desk is not None:
            self.parts.desk.answer(outcome)

    def before(self, act: int, reason: str) -> Incident:
        """The return to the state before an act. Local, equal on all ranks."""
        why = f"undo of act {act}" + (f": {reason}" if reason else "")
        step = next((done.step for done in self._done if done.act == act), self.state.step)
        return Incident(
            cause="undo", level=ELEVATED, reason=why, step=self.state.step, first=step + 1, before_act=act
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What can be undone, as JSON; equal on all ranks."""
        return {"done": [done.to_json() for done in self._done]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, or nothing of a state from before there were acts."""
        self._done = [Done.from_json(body) for body in saved.get("done", ())]


def _check_try(order: Order) -> None:
    """The form of a rehearsal, if it is one; the ranks judge the rest. Raises CommandRefused."""
    if order.action != TRY:
        return
    change, steps = order.arguments.get("change"), order.arguments.get("steps")
    if not isinstance(change, str) or type(steps) is not int:
        raise CommandRefused("bad_change", "expected arguments 'change', a text, and 'steps', a whole number")
    try:
        parse_change(change)
    except ConfigError as error:
        raise CommandRefused("bad_change", str(error)) from error
