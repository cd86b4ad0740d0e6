"""The log's records as a story: who, what, why, and what came of it, in the order in which it was written. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tolaria.errors import MessageRejected, WalError
from tolaria.evidence.keys import Proof
from tolaria.leyline.codec import decode_command, decode_decision
from tolaria.leyline.types import Command, Decision
from tolaria.leyline.words import describe
from tolaria.recovery.timeline import Return
from tolaria.recovery.wal import WalKind, WalRecord
from tolaria.telemetry.words import counted


@dataclass(kw_only=True)
class Entry:
    """One thing that happened. ``lsn``: of its record in the log; ``record``: that record.

    ``sort``: start, command, act, return, checkpoint, good, fallback, signal, halt, end. ``proof``: of its signature.
    ``act``: its number, which is given again after a return; ``digest``: of what it led to. ``void``: a return left it.
    """

    lsn: int
    sort: str
    what: str
    step: int | None = None
    boundary: int | None = None
    who: str = ""
    why: str = ""
    effect: str = ""
    command_id: str = ""
    proof: Proof = ""
    act: int = 0
    digest: str = ""
    void: bool = False
    faults: list[str] = field(default_factory=list)


@dataclass
class Trail:
    """Entries in order, what each start said of itself, and what the records contradict each other in."""

    entries: list[Entry] = field(default_factory=list)
    openings: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    acts: list[tuple[WalRecord, Entry]] = field(default_factory=list)
    decisions: list[tuple[WalRecord, Decision]] = field(default_factory=list)
    manifests: dict[int, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    commands: dict[str, Entry] = field(default_factory=dict)
    quiet: int = 0
    _fallback: str = ""
    _boundary: dict[int, list[Entry]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[WalRecord]) -> "Trail":
        """Never raises: what a record says that it cannot say is a fault."""
        found = cls()
        for record in records:
            try:
                found._take(record)
            except (WalError, MessageRejected, KeyError, TypeError, ValueError) as error:
                found.faults.append(f"record {record.lsn} ({record.kind.name}) is malformed: {error}")
        return found

    def _take(self, record: WalRecord) -> None:
        if record.kind == WalKind.DECISION:
            self._decided(record)
            return
        body = record.document
        match record.kind:
            case WalKind.OPEN:
                self.openings.setdefault(record.start, body)
            case WalKind.START:
                step = int(body["step"])
                begun = f"start {record.start}" + (f" goes on from step {step:,}" if step else " begins")
                self._add(record, "start", begun, step=step)
            case WalKind.ACT:
                self._acted(record, body)
            case WalKind.APPLIED | WalKind.ABORTED:
                self._outcome(
                    record, body, self._boundary.get(int(body["boundary"]), []), f"boundary {body['boundary']}"
                )
            case WalKind.ACTED:
                asked = [entry for _, entry in self.acts if entry.act == int(body["act"])][-1:]
                self._outcome(record, body, asked, f"act {body['act']}")
                for entry in asked:
                    entry.digest = str(body["digest"])
            case WalKind.VOID:
                self._went_back(record, Return.from_json(body))
            case _:
                self._noted(record, body)

    def _noted(self, record: WalRecord, body: Mapping[str, Any]) -> None:
        if record.kind == WalKind.CHECKPOINT:
            name = f"c{int(body['seq'])}-s{int(body['step'])}"
            self.manifests[int(body["seq"])] = str(body["manifest_sha256"])
            self._add(record, "checkpoint", f"checkpoint {name}", step=int(body["step"]))
        elif record.kind == WalKind.GOOD:
            self._add(record, "good", f"checkpoint c{int(body['seq'])}-s{int(body['step'])} is good")
        elif record.kind == WalKind.SIGNAL:
            self._add(
                record, "signal", f"emergencies of the policy up to number {int(body['mark'])} taken in", who="policy"
            )
        elif record.kind == WalKind.HALT:
            self._add(record, "halt", "halted by an emergency", why=str(body["reason"]))
        elif record.kind == WalKind.CLOSE:
            self._add(record, "end", "ended in order")

    def _add(self, record: WalRecord, sort: str, what: str, **facts: Any) -> Entry:
        entry = Entry(lsn=record.lsn, sort=sort, what=what, **facts)
        self.entries.append(entry)
        return entry

    def _decided(self, record: WalRecord) -> None:
        decision = decode_decision(record.body)
        self.decisions.append((record, decision))
        told = self._boundary[decision.boundary] = []
        for raw in decision.commands:
            command = _command(raw)
            entry = self._add(
                record, "command", describe(command) if command is not None else "unreadable command",
                step=decision.step_effective, boundary=decision.boundary, who="policy",
                why=command.reason if command is not None else "",
                command_id=command.command_id if command is not None else "",
            )  # fmt: skip
            told.append(entry)
            self.commands[entry.command_id] = entry
        if decision.source == "fallback" and decision.reason != self._fallback:
            self._add(
                record, "fallback", f"no answer of the policy ({decision.reason}): conservative, nothing changed",
                step=decision.step_effective, boundary=decision.boundary,
            )  # fmt: skip
        elif not decision.commands:
            self.quiet += 1
        self._fallback = decision.reason if decision.source == "fallback" else ""

    def _acted(self, record: WalRecord, body: Mapping[str, Any]) -> None:
        action, raw = str(body["action"]), bytes.fromhex(str(body["command"]))
        command = _command(raw) if raw else None
        what = describe(command) if command is not None else "unreadable command" if raw else action
        if body.get("undoes"):
            what = f"undo act {int(body['undoes'])}" + (" with the weights" if action == "back" else f" ({what})")
        entry = self._add(
            record, "act", f"{what}", step=int(body["step"]), who=str(body["operator"]) or "operator",
            why=str(body["reason"]), command_id=command.command_id if command is not None else str(body["order_id"]),
        )  # fmt: skip
        entry.act = int(body["act"])
        self.acts.append((record, entry))
        self.commands[entry.command_id] = entry

    def _outcome(self, record: WalRecord, body: Mapping[str, Any], asked: list[Entry], where: str) -> None:
        applied, refused = {str(name) for name in body["applied"]}, {str(k): str(v) for k, v in body["refused"].items()}
        # Beside what a policy named itself: what could not be read has a name made up by the run.
        known = {entry.command_id for entry in asked}
        unreadable = any(not entry.command_id for entry in asked)
        for name in (applied | refused.keys()) - known:
            if not unreadable:
                self.faults.append(
                    f"record {record.lsn}: {name} took effect or was refused at {where}, nobody decided it"
                )
        for entry in asked:
            if entry.command_id in applied:
                entry.effect = f"applied at step {entry.step:,}" if entry.step is not None else "applied"
            elif entry.command_id in refused:
                entry.effect = f"refused: {refused[entry.command_id]}"

    def _went_back(self, record: WalRecord, taken: Return) -> None:
        for entry in self.entries:
            later = entry.act > taken.to_acts if entry.sort == "act" else (entry.boundary or 0) > taken.to_boundary
            if entry.sort in ("command", "act") and later and not entry.void:
                entry.void = True
                entry.effect += f"; void since the return to step {taken.to_step:,}"
        left = sum(end - start for _, start, end in taken.skip)
        also = [f"{counted(left, 'sample')} left out so far"] if left else []
        also += ["conservative"] if taken.conservative else []
        self._add(
            record, "return", f"went back from step {taken.from_step:,} to step {taken.to_step:,}",
            step=taken.from_step, boundary=taken.at_boundary, why=f"{taken.cause.replace('_', ' ')}: {taken.reason}",
            effect=", ".join(also),
        )  # fmt: skip


def _command(raw: bytes) -> Command | None:
    try:
        return decode_command(raw)
    except MessageRejected:
        return None
