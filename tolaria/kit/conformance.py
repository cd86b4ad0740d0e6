"""`tolaria policy test`: does a policy keep what trainers rely on? One check a line, with the state that broke it.

    loads -> version -> the simulated run -> odd states -> the same question again -> junk -> a second process, the same
    run -> single boundaries alone

A policy that does not answer ends the test: what could not be asked any more is "not run".
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from tolaria.errors import ConfigError, PolicyUnavailable
from tolaria.kit import judge
from tolaria.kit.course import BOUNDARIES, SimulatedRun
from tolaria.kit.odd import odd_questions
from tolaria.kit.subject import Answer, Subject, started
from tolaria.leyline.codec import decode_command
from tolaria.leyline.limits import MAX_STRING_CHARS
from tolaria.leyline.types import PolicyRequest
from tolaria.leyline.words import essence, in_words

PASS, FAIL, NOT_RUN, SKIPPED = "pass", "FAIL", "not run", "skipped"
CHECKS = {
    "loads": "the policy is imported and made",
    "version": f"its version is a text of 1 to {MAX_STRING_CHARS} printable characters",
    "answers": "every answer comes within the deadline",
    "decides": "no exception on the boundaries of a usual run",
    "odd states": "no exception on states that are seldom seen",
    "messages": "every command can be sent",
    "legal": "every command is legal for its slot, group or run as the state shows it",
    "bounds": "every number is within the default bounds of [tuning]",
    "conservative": "nothing is asked for that conservative mode forbids",
    "emergency": "emergency() returns at once, without an exception",
    "idempotent": "the same question again gets the same bytes",
    "junk": "frames that are no question are not answered, and do no harm",
    "deterministic": "another process answers the same run with the same commands",
    "restart": "a new instance, asked at one boundary alone, answers as the one that saw all before",
}
INSIDE = ("emergency", "deterministic", "restart")
"""Checks that need the policy's process: of a service that runs elsewhere they are skipped."""
EMERGENCY_MS = 50.0
"""How long emergency() may take: it is asked about 20 times a second."""
RUN = "course"


@dataclass(frozen=True)
class Check:
    """One line of the result. ``where``: the state that broke it, empty for a pass."""

    name: str
    status: str
    text: str
    where: str = ""


@dataclass
class Result:
    """All checks, in the order of CHECKS."""

    policy: str
    version: str = ""
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check passed that can be made of such a policy."""
        return all(check.status in (PASS, SKIPPED) for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "policy": self.policy, "version": self.version, "passed": self.passed,
            "checks": [vars(check) for check in self.checks],
        }  # fmt: skip


def check_policy(spec: str, args: Mapping[str, Any], *, deadline_ms: float) -> Result:
    """Test the policy ``spec`` in processes of its own. Blocks for some seconds; raises nothing of the policy's."""

    def start() -> AbstractContextManager[Subject]:
        return started(spec, args, deadline_ms=deadline_ms, probed=True)

    return _Examination(spec, start, deadline_ms, own_process=True).run()


def check_service(
    name: str, connect: Callable[[], AbstractContextManager[Subject]], *, deadline_ms: float
) -> Result:  # fmt: skip
    """Test a policy that runs elsewhere; what needs its process (`INSIDE`) is skipped."""
    return _Examination(name, connect, deadline_ms, own_process=False).run()


class _Examination:
    """Finds at most one fault for each check, the first."""

    def __init__(
        self, name: str, start: Callable[[], AbstractContextManager[Subject]], deadline_ms: float, *, own_process: bool
    ) -> None:
        self._result = Result(name)
        self._start = start
        self._deadline_ms = deadline_ms
        self._own_process = own_process
        self._faults: dict[str, tuple[str, str]] = {}
        self._seen: dict[str, str] = {}
        self._course: list[tuple[PolicyRequest, Answer]] = []
        self._read = 0
        self._slowest_ms = 0.0
        self._slowest_emergency_ms = 0.0
        self._questions = 0
        self._commands = 0

    def run(self) -> Result:
        begun = time.monotonic()
        try:
            with self._start() as subject:
                self._seen["loads"] = f"in {time.monotonic() - begun:.1f} s"
                self._first_process(subject)
            if self._own_process:
                with self._start() as subject:
                    self._second_process(subject)
        except ConfigError as error:
            self._fail("loads", "", str(error))
        except PolicyUnavailable as error:
            if "loads" in self._seen:
                self._fail(*self._silence, str(error))
            else:
                self._fail("loads", "", str(error))
        self._result.checks = [self._line(name) for name in CHECKS]
        return self._result

    def _line(self, name: str) -> Check:
        if name in self._faults:
            where, text = self._faults[name]
            return Check(name, FAIL, text, where)
        if name in self._seen:
            return Check(name, PASS, self._seen[name] or CHECKS[name])
        if name in INSIDE and not self._own_process:
            return Check(name, SKIPPED, "needs the policy's own process")
        return Check(name, NOT_RUN, CHECKS[name])

    def _fail(self, check: str, where: str, text: str) -> None:
        self._faults.setdefault(check, (where, text))

    # One question

    _silence = ("answers", "")

    def _ask(self, subject: Subject, run: str, boundary: int, asked: PolicyRequest, where: str, usual: bool) -> Answer:
        self._silence = ("answers", where)
        try:
            answer = subject.ask(run, boundary, asked)
        except PolicyUnavailable:
            self._read_notes(subject, where, usual=usual)
            raise
        self._questions += 1
        self._slowest_ms = max(self._slowest_ms, answer.ms)
        explained = self._read_notes(subject, where, usual=usual)
        if answer.reply.policy_version.startswith("error:") and not explained:
            # Each command can be sent, and all of them together can not; of a service no more is known than that.
            check = "messages" if self._own_process else "decides" if usual else "odd states"
            self._fail(check, where, f"{answer.reply.policy_version} (its log says more)")
        for _, fault in judge.judge(asked.state, answer.reply.commands):
            self._commands += 1
            if fault is not None:
                self._fail(fault.check, where, str(fault))
        return answer

    def _read_notes(self, subject: Subject, where: str, *, usual: bool) -> bool:
        """What the probe noted since the last time; whether that explains an answer without commands."""
        notes = subject.notes()
        inside, explained = "", False
        for note in notes[self._read :]:
            inside = note.get("enter", "")
            explained = explained or "error" in note or bool(note.get("bad"))
            if note.get("left") == "decide" and "error" in note:
                self._fail("decides" if usual else "odd states", where, f"{note['error']} ({note['where']})")
            elif note.get("left") == "decide" and note["bad"]:
                self._fail("messages", where, note["bad"][0])
            elif note.get("left") == "emergency":
                self._emergency(note, where)
            elif "version" in note and not self._result.version:
                self._version(note["version"], is_text=note["is_text"])
        self._read = len(notes)
        if inside == "emergency":
            self._silence = ("emergency", where)
        return explained

    def _emergency(self, note: Mapping[str, Any], where: str) -> None:
        self._slowest_emergency_ms = max(self._slowest_emergency_ms, note["ms"])
        if "error" in note:
            self._fail("emergency", where, f"{note['error']} ({note['where']})")
        elif note["ms"] > EMERGENCY_MS:
            self._fail("emergency", where, f"took {note['ms']:,.0f} ms; at most {EMERGENCY_MS:g} ms are there for it")

    def _version(self, version: str, *, is_text: bool) -> None:
        self._result.version = version[:MAX_STRING_CHARS]
        if is_text and 0 < len(version) <= MAX_STRING_CHARS and version.isprintable():
            self._seen["version"] = version
        else:
            self._fail("version", "", f"{version[:40]!r}: expected {CHECKS['version'].removeprefix('its version is ')}")

    # The parts

    def _first_process(self, subject: Subject) -> None:
        run = SimulatedRun()
        for boundary in range(1, BOUNDARIES + 1):
            asked = run.question()
            answer = self._ask(subject, RUN, boundary, asked, f"boundary {boundary}", usual=True)
            run.answer(asked.state, answer.reply.commands)
            self._course.append((asked, answer))
        if not self._own_process:
            self._version(answer.reply.policy_version, is_text=True)
        self._seen["decides"] = f"{BOUNDARIES} boundaries of a simulated run"
        self._same_again(subject)
        self._junk(subject)
        odd = odd_questions()
        for number, (name, asked) in enumerate(odd.items()):
            self._ask(subject, f"odd-{number}", 20, asked, name, usual=False)
        self._seen["odd states"] = f"{len(odd)} of them"
        told = f"{self._commands} commands" if self._commands else "it commanded nothing"
        self._seen |= dict.fromkeys(("messages", "legal", "bounds", "conservative"), told)
        self._seen["answers"] = (
            f"{self._questions} questions, slowest {self._slowest_ms:,.0f} ms of {self._deadline_ms:,.0f}"
        )
        if self._own_process:
            self._seen["emergency"] = f"slowest {self._slowest_emergency_ms:.1f} ms"

    def _same_again(self, subject: Subject) -> None:
        for asked, answer in self._course[-3:]:
            where = f"boundary {answer.header.boundary}"
            self._silence = ("idempotent", where)
            if subject.again(answer).frame != answer.frame:
                self._fail("idempotent", where, f"packet {asked.state.packet_id} asked again got other bytes")
        self._seen["idempotent"] = "3 questions put again"

    def _junk(self, subject: Subject) -> None:
        asked, answer = self._course[-1]
        altered = bytearray(answer.question)
        altered[-1] ^= 1
        for raw in (b"", b"junk", bytes(200), bytes(altered), answer.question[:-1], answer.frame):
            subject.send(raw)
        self._silence = ("junk", "after junk")
        subject.ask(RUN, BOUNDARIES + 1, asked)
        self._seen["junk"] = "6 frames"

    def _second_process(self, subject: Subject) -> None:
        self._read = 0
        for asked, answer in self._course:
            boundary = answer.header.boundary
            other = self._ask(subject, RUN, boundary, asked, f"boundary {boundary}, in a second process", usual=True)
            if (differs := _difference(answer, other, ids=True)) is not None:
                self._fail("deterministic", f"boundary {boundary}", differs)
                return  # then a restart cannot be told from chance
        self._seen["deterministic"] = f"{BOUNDARIES} boundaries in two processes"
        for asked, answer in self._chosen():
            boundary = answer.header.boundary
            where = f"boundary {boundary} alone"
            other = self._ask(subject, f"restart-{boundary}", boundary, asked, where, usual=True)
            if (differs := _difference(answer, other, ids=False)) is not None:
                self._fail("restart", where, differs)
                return
        self._seen["restart"] = f"{len(list(self._chosen()))} boundaries, each asked of a new instance"

    def _chosen(self) -> Iterator[tuple[PolicyRequest, Answer]]:
        """Boundaries for a restart: all that brought commands, and every fifth."""
        return (pair for pair in self._course if pair[1].reply.commands or pair[1].header.boundary % 5 == 0)


def _difference(one: Answer, other: Answer, *, ids: bool) -> str | None:
    first, second = one.reply.commands, other.reply.commands
    if [*map(essence, first)] != [*map(essence, second)]:
        return f"first {_list(first)}, then {_list(second)}"
    if ids and (names := [_ids(first), _ids(second)])[0] != names[1]:
        return f"command ids {', '.join(names[0])}, then {', '.join(names[1])}"
    return None


def _ids(commands: tuple[bytes, ...]) -> list[str]:
    return [command.command_id for command in map(decode_command, commands)]


def _list(commands: tuple[bytes, ...]) -> str:
    return "; ".join(map(in_words, commands)) or "nothing"
