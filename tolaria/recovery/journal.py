"""The run's decisions and returns, in memory and in the log: what was decided, what is good, where the run went back.

Rank 0 writes the log before anything takes effect. The other ranks hold no log; they know the returns, which rank 0
tells them at the start, and which all ranks then make together.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from tolaria.leyline.codec import decode_decision, encode_decision
from tolaria.leyline.types import Decision, RollbackCommand
from tolaria.recovery.ladder import Ladder, Rung
from tolaria.recovery.retain import Retention
from tolaria.recovery.timeline import LoggedAct, Return, Timeline, ahead, on_timeline
from tolaria.recovery.wal import Wal, WalKind


class Journal:
    """Facts of the run so far. Every writing method is for rank 0's training thread; on other ranks it only remembers.

    Each write is durable when the method returns. Raises WalError when the log cannot be written: then nothing may
    take effect any more, and the run has to stop.
    """

    def __init__(self, timeline: Timeline, *, wal: Wal | None, good_after: int) -> None:
        self.ladder = Ladder(good_after)
        self.wal = wal
        self._timeline = timeline
        self._good_after = good_after
        self.void: set[int] = set()
        self.restarted = False
        for seq, known in sorted(timeline.checkpoints.items()):
            self.committed(seq, known.step, known.branch, known.acts, good=seq in timeline.good)

    @property
    def returns(self) -> list[Return]:
        """Every return of the run so far, oldest first."""
        return self._timeline.returns

    @property
    def low_space(self) -> bool:
        """Whether the log lives on its reserve: the run should save and stop."""
        return self.wal is not None and self.wal.low_space

    @property
    def branch(self) -> int:
        """The highest branch there was."""
        return self._timeline.branch

    @property
    def last_lsn(self) -> int:
        """Number of the last record that was in the log when it was opened."""
        return self._timeline.last_lsn

    @property
    def known_manifests(self) -> dict[int, str]:
        """sha256 of the manifest of every checkpoint in the log."""
        return {seq: known.manifest_sha256 for seq, known in self._timeline.checkpoints.items()}

    @property
    def halted_reason(self) -> str | None:
        """Why an emergency halted the run, None unless that was the last that happened."""
        return self._timeline.halted

    @property
    def last_signal_mark(self) -> int:
        """Number of the last signal of the policy that was seen."""
        return self._timeline.signal_mark

    def fruitless_starts(self, step: int, branch: int, agent: str | None) -> int:
        """How many starts by this torchrun agent, without a pause, began at this very point and got no further."""
        return self._timeline.fruitless_starts(step, branch, agent)

    # Decisions

    def logged(self, boundary: int) -> Decision | None:
        """The decision that was taken at this boundary before the run had to go through it again."""
        raw = self._timeline.decisions.get(boundary)
        return decode_decision(raw) if raw is not None else None

    def applied_before(self, command_id: str) -> bool:
        """Whether a command of this id has taken effect on the present course of the run."""
        return command_id in self._timeline.applied or command_id in self._timeline.applied_by_act

    def decided(self, decision: Decision) -> None:
        """Write a decision down, before any rank hears of it."""
        raw = encode_decision(decision)
        self._append(WalKind.DECISION, raw)
        self._timeline.decisions[decision.boundary] = raw

    def applied(self, boundary: int, applied: Iterable[str], refused: Mapping[str, str], digest: str) -> None:
        """Write down what became of a decision's commands. ``digest``: of the structure they led to."""
        names = list(applied)
        body = {"boundary": boundary, "applied": names, "refused": dict(refused), "digest": digest}
        self._append(WalKind.APPLIED if names else WalKind.ABORTED, body)
        self._timeline.applied.update(dict.fromkeys(names, boundary))

    # Acts of an operator

    @property
    def orders(self) -> set[str]:
        """Ids of all orders that were ever carried out or tried; rank 0 only."""
        return self._timeline.orders

    def next_act(self, done: int) -> LoggedAct | None:
        """The act that comes after the first ``done``, when the run has to go through it again. On all ranks."""
        return self._timeline.acts.get(done + 1)

    def act(self, number: int, step: int, body: Mapping[str, Any]) -> None:
        """Write an act down, before any rank hears of it. ``body`` has at least "order_id"."""
        self._append(WalKind.ACT, {**body, "act": number, "step": step})
        self._timeline.act(LoggedAct(number=number, step=step, body={"order_id": body["order_id"]}))

    def acted(
        self, number: int, boundary: int, applied: Iterable[str], refused: Mapping[str, str], digest: str
    ) -> None:
        """Write down what became of an act: ids of commands that took effect, and codes of those that did not."""
        names = list(applied)
        body = {"act": number, "boundary": boundary, "applied": names, "refused": dict(refused), "digest": digest}
        self._append(WalKind.ACTED, body)
        self._timeline.acted(number, names, refused)

    def seen(self, acts: int, boundary: int) -> None:
        """A start goes on from a state that has seen so many acts: what a crash kept from being said of them."""
        if self.wal is not None:
            for act in [act for act in self._timeline.acts.values() if act.number <= acts and not act.ended]:
                self.acted(act.number, boundary, [str((act.body or {})["order_id"])], {}, "")

    # Checkpoints

    def committed(self, seq: int, step: int, branch: int, acts: int = 0, *, good: bool = False) -> None:
        """A checkpoint is durable; the one who wrote it has logged it. It may be void already, by a return since."""
        if on_timeline(self.returns, branch, step, acts):
            self.ladder.add(seq, step, branch, acts, good=good or self._good_after == 0)
        else:
            self.void.add(seq)

    def adopt(self, seq: int, step: int, branch: int, manifest_sha256: str, acts: int = 0) -> None:
        """A checkpoint whose commit the log does not have, because the run died right after it, is one like others."""
        if seq not in self.ladder.rungs:
            body = {"seq": seq, "step": step, "branch": branch, "acts": acts, "manifest_sha256": manifest_sha256}
            self._append(WalKind.CHECKPOINT, body)
            self.committed(seq, step, branch, acts)

    def healthy_boundary(self) -> list[Rung]:
        """One more boundary without an incident; the checkpoints that are good from now on."""
        promoted = [self.ladder.rungs[seq] for seq in self.ladder.healthy_boundary()]
        for rung in promoted:
            self._append(WalKind.GOOD, {"seq": rung.seq, "step": rung.step})
        return promoted

    def retention(self) -> Retention:
        """The newest good checkpoint must not be deleted whatever its age; those off the course may be at any time."""
        best = self.ladder.newest_good
        return Retention(frozenset({best.seq} if best is not None else ()), frozenset(self.void))

    def accepts(self, seq: int, step: int, branch: int | None) -> bool:
        """Whether a checkpoint may be gone back to or resumed from: it is part of the run's course.

        ``branch``: None as long as nobody has read it.
        """
        return seq not in self.void and (branch is None or on_timeline(self.returns, branch, step))

    # Returns and the end

    def went_back(self, taken: Return) -> None:
        """Write a return down, before anything is restored."""
        self._append(WalKind.VOID, taken.to_json())
        self._timeline.went_back(taken)
        self.ladder.sick()
        self.void |= self.ladder.take_off(lambda rung: not on_timeline(self.returns, rung.branch, rung.step, rung.acts))

    def refuses_return(self, command: RollbackCommand, boundary: int, rest: int) -> tuple[str, str] | None:
        """Why the policy can not have this return: (code, reason), None if it can. ``rest``: boundaries between two."""
        last = max((r.at_boundary for r in self.returns if r.cause == "command"), default=None)
        if last is not None and boundary - last < rest:
            return "rate_limit", (
                f"the run went back by command at boundary {last}; again from boundary {last + rest} on "
                "(recovery.command_boundaries)"
            )
        if self.target_of(command) is None:
            found = ", ".join(f"c{r.seq} (step {r.step})" for r in self.ladder.rungs.values()) or "none"
            wanted = "a good checkpoint" if command.target == "good" else f"a checkpoint of step {command.step}"
            return "no_checkpoint", f"there is no {wanted.removeprefix('a ')}; checkpoints: {found}"
        return None

    def target_of(self, command: RollbackCommand) -> int | None:
        """The number of the checkpoint that a command asks for, None when there is none."""
        if command.target == "good":
            rung = self.ladder.newest_good
            return rung.seq if rung is not None else None
        return max((r.seq for r in self.ladder.rungs.values() if r.step == command.step), default=None)

    def ahead(self, branch: int, step: int) -> list[Return]:
        """The returns whose effects the run still has to take when it goes on from this point, in order."""
        return ahead(self.returns, branch, step)

    def started(self, step: int, branch: int, agent: str | None) -> None:
        """A start goes on from this point."""
        self._append(WalKind.START, {"step": step, "branch": branch, "agent": agent})

    def signal_mark(self, mark: int) -> None:
        """Signals of the policy up to this number were seen."""
        self._append(WalKind.SIGNAL, {"mark": mark})

    def halted(self, reason: str) -> None:
        """An emergency stopped the run; a restart by itself must not go on."""
        self._append(WalKind.HALT, {"reason": reason})

    def ended(self) -> None:
        """The run ended as it should."""
        self._append(WalKind.CLOSE, {})

    def close(self) -> None:
        """Close the log's files."""
        if self.wal is not None:
            self.wal.close()

    def _append(self, kind: WalKind, body: bytes | Mapping[str, Any]) -> None:
        if self.wal is not None:
            self.wal.append(kind, body)
