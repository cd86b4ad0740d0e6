"""What the log says about the course of a run. Pure: from records to facts.

    branch 0   ---o-----o---X          X: an incident; the run went back to the snapshot at S
    branch 1      S-----o-----o---     from there it took another course

Steps repeat after a return, and an operator acts between two steps, so a point is (branch, step, acts seen). A state
lies on the timeline if no later return went back to before it. Decisions behind a return's target are void; all others
are taken from the log when a start has to go through their boundaries again, and the policy is not asked.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from tolaria.errors import WalError
from tolaria.leyline.codec import decode_decision
from tolaria.recovery.wal import WalKind, WalRecord

Window = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Return:
    """A return to an earlier state, which is itself a decision with effect at ``to_step``.

    ``branch``: the number of the course that begins. ``at_boundary``: how many boundaries had passed when it was made.
    ``skip``: all windows of samples left out so far in the run.
    ``held``: the conservative mode ends by command only. ``instead_of``: the branch of the return that failed before
    this one, 0 for none. ``to_acts``: how many acts the state it goes back to had seen. ``paused``: why the run stands
    still there, None if it does not: an operator's pause is no part of what is gone back on.
    """

    branch: int
    to_step: int
    to_boundary: int
    from_step: int
    at_boundary: int
    level: int
    cause: str
    reason: str
    skip: tuple[Window, ...] = ()
    conservative: bool = False
    held: bool = False
    rewarm: int = 0
    instead_of: int = 0
    to_acts: int = 0
    paused: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The body of its record in the log."""
        return {**asdict(self), "skip": [list(window) for window in self.skip]}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Raises WalError when ``body`` is not what `to_json` gave."""
        try:
            skip = tuple((int(e), int(a), int(b)) for e, a, b in body["skip"])
            return cls(**{**body, "skip": skip})
        except (KeyError, TypeError, ValueError) as error:
            raise WalError(f"the log's record of a return is malformed: {error!r}") from error


def made(returns: Sequence[Return]) -> list[Return]:
    """The returns without those that failed, for which another was made instead."""
    failed = {r.instead_of for r in returns}
    return [r for r in returns if r.branch not in failed]


def on_timeline(returns: Iterable[Return], branch: int, step: int, acts: int = 0) -> bool:
    """Whether the state after ``step`` steps of ``branch``, that has seen ``acts``, is part of the run's course."""
    return all((step, acts) <= (r.to_step, r.to_acts) for r in returns if r.branch > branch)


def ahead(returns: Iterable[Return], branch: int, step: int) -> list[Return]:
    """The returns whose effects a run that goes on from this point of the timeline still has to take, in order."""
    listed = list(returns)
    later = [r for r in listed if r.branch > branch and r.to_step >= step]
    return [r for r in later if on_timeline(listed, r.branch, r.to_step, r.to_acts)]


@dataclass(frozen=True)
class LoggedCheckpoint:
    """A committed checkpoint as the log has it."""

    seq: int
    step: int
    branch: int
    manifest_sha256: str
    acts: int = 0


@dataclass(frozen=True)
class LoggedStart:
    """A start that loaded or made a state: where it began, and under which torchrun agent."""

    step: int
    branch: int
    agent: str | None


@dataclass(frozen=True, kw_only=True)
class LoggedAct:
    """One act of an operator: done by all ranks after ``step`` steps. ``body``: the record of it, rank 0 only.

    ``ended``: what became of it is in the log; ``refused``: with which code, "" if it took effect. ``over``: the run
    ended after it as it should.
    """

    number: int
    step: int
    body: Mapping[str, Any] | None = None
    ended: bool = False
    refused: str = ""
    over: bool = False


@dataclass
class Timeline:
    """The facts that a start needs, gathered from the records in their order."""

    returns: list[Return] = field(default_factory=list)
    decisions: dict[int, bytes] = field(default_factory=dict)
    applied: dict[str, int] = field(default_factory=dict)
    applied_by_act: dict[str, int] = field(default_factory=dict)
    acts: dict[int, LoggedAct] = field(default_factory=dict)
    orders: set[str] = field(default_factory=set)
    checkpoints: dict[int, LoggedCheckpoint] = field(default_factory=dict)
    good: set[int] = field(default_factory=set)
    starts: list[LoggedStart] = field(default_factory=list)
    closed: bool = False
    halted: str | None = None
    signal_mark: int = 0
    last_lsn: int = 0

    @classmethod
    def of(cls, records: Iterable[WalRecord]) -> Self:
        """Raises WalError for a record that says what no record can say."""
        found = cls()
        for record in records:
            try:
                found._take(record)
            except (KeyError, TypeError, ValueError) as error:
                raise WalError(f"the log's record {record.lsn} ({record.kind.name}) is malformed: {error!r}") from error
            found.last_lsn = record.lsn
        return found

    @property
    def branch(self) -> int:
        """The highest branch there was."""
        return max((r.branch for r in self.returns), default=0)

    def _take(self, record: WalRecord) -> None:
        if record.kind == WalKind.DECISION:
            self.decisions[decode_decision(record.body).boundary] = record.body
        elif record.kind in (WalKind.ACT, WalKind.ACTED, WalKind.APPLIED):
            self._take_command(record.kind, record.document)
        else:
            self._take_point(record.kind, record.document)

    def _take_command(self, kind: WalKind, body: Mapping[str, Any]) -> None:
        if kind == WalKind.ACT:
            self.act(LoggedAct(number=int(body["act"]), step=int(body["step"]), body=body))
        elif kind == WalKind.ACTED:
            self.acted(int(body["act"]), body["applied"], body["refused"])
        else:
            self.applied.update({str(name): int(body["boundary"]) for name in body["applied"]})

    def _take_point(self, kind: WalKind, body: Mapping[str, Any]) -> None:
        match kind:
            case WalKind.VOID:
                self.went_back(Return.from_json(body))
            case WalKind.CHECKPOINT:
                seq, acts = int(body["seq"]), int(body.get("acts", 0))
                sha = str(body["manifest_sha256"])
                self.checkpoints[seq] = LoggedCheckpoint(seq, int(body["step"]), int(body["branch"]), sha, acts)
            case WalKind.GOOD:
                self.good.add(int(body["seq"]))
            case WalKind.START:
                self.starts.append(LoggedStart(int(body["step"]), int(body["branch"]), body["agent"]))
                self.closed, self.halted = False, None
            case WalKind.SIGNAL:
                self.signal_mark = max(self.signal_mark, int(body["mark"]))
            case WalKind.HALT:
                self.halted = str(body["reason"])
            case WalKind.CLOSE:
                self.closed = True
                self.acts = {number: replace(act, over=True) for number, act in self.acts.items()}
            case _:
                pass

    def act(self, act: LoggedAct) -> None:
        """One more act of an operator."""
        self.acts[act.number] = act
        self.orders.add(str((act.body or {})["order_id"]))

    def acted(self, number: int, applied: Iterable[str], refused: Mapping[str, str]) -> None:
        """What became of an act; said of it once more, that counts."""
        self.applied_by_act.update({str(name): number for name in applied})
        for name in refused:
            self.applied_by_act.pop(str(name), None)
        known = self.acts.get(number)
        if known is not None:
            self.acts[number] = replace(known, ended=True, refused=next(iter(map(str, refused.values())), ""))

    def went_back(self, taken: Return) -> None:
        """One more return: what was decided behind its target is void."""
        self.returns.append(taken)
        self.decisions = {b: raw for b, raw in self.decisions.items() if b <= taken.to_boundary}
        self.applied = {name: b for name, b in self.applied.items() if b <= taken.to_boundary}
        self.acts = {number: act for number, act in self.acts.items() if number <= taken.to_acts}
        self.applied_by_act = {name: n for name, n in self.applied_by_act.items() if n <= taken.to_acts}

    def fruitless_starts(self, step: int, branch: int, agent: str | None) -> int:
        """How many starts by this torchrun agent, without a pause, began at this very point and got no further."""
        count = 0
        for start in reversed(self.starts):
            if self.closed or agent is None or (start.step, start.branch, start.agent) != (step, branch, agent):
                break
            count += 1
        return count
