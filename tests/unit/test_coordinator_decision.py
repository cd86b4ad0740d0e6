"""Decisions as tables: what an answer makes of a boundary, a decision of the mode, and what is never accepted."""

import pytest

from tolaria.coordinator.decision import ANSWERED, NO_POLICY, NOT_ASKED, Answer, decide, next_mode, refusal
from tolaria.leyline.codec import decode_decision, encode_decision
from tolaria.leyline.types import BreakerCommand, CircuitState, Command, CommandType, Decision, SeedCommand, SeedOp
from tolaria.mode import Mode
from tolaria.tamiyo import policy as do

NORMAL = Mode()
CONSERVATIVE = Mode(conservative=True, reason="policy: timeout")
HELD = Mode(conservative=True, reason="command: by hand", held=True)
FAILURES = ("timeout", "auth", "schema", "flood", "transport", "request", NOT_ASKED)


@pytest.mark.parametrize(
    ("answer", "mode", "source", "conservative", "commands"),
    [
        (Answer(ANSWERED, (b"a", b"b")), NORMAL, "policy", False, (b"a", b"b")),
        (Answer(ANSWERED), NORMAL, "policy", False, ()),
        (Answer(ANSWERED, (b"a",)), CONSERVATIVE, "policy", True, (b"a",)),
        (Answer(NO_POLICY), NORMAL, "policy", False, ()),
        *[(Answer(code), NORMAL, "fallback", True, ()) for code in FAILURES],
        *[(Answer(code), CONSERVATIVE, "fallback", True, ()) for code in FAILURES],
        # What came with a failure is not carried further, whoever put it there.
        (Answer("timeout", (b"a",)), NORMAL, "fallback", True, ()),
    ],
)
def test_an_answer_is_carried_and_a_failure_decides_no_change(
    answer: Answer, mode: Mode, source: str, conservative: bool, commands: tuple[bytes, ...]
) -> None:
    decision = decide(answer, boundary=7, step=70, mode=mode)
    assert decision == Decision(
        boundary=7, step_effective=70, source=source, reason=answer.code, conservative=conservative, commands=commands
    )
    assert decode_decision(encode_decision(decision)) == decision


def breaker(desired: CircuitState, rationale: str = "by hand") -> BreakerCommand:
    return BreakerCommand(desired_state=desired, rationale=rationale)


OPEN, CLOSED = breaker(CircuitState.OPEN), breaker(CircuitState.CLOSED)


@pytest.mark.parametrize(
    ("mode", "code", "breakers", "expected"),
    [
        # entered
        (NORMAL, ANSWERED, [], NORMAL),
        (NORMAL, NO_POLICY, [], NORMAL),
        (NORMAL, "timeout", [], CONSERVATIVE),
        (NORMAL, ANSWERED, [OPEN], HELD),
        (NORMAL, ANSWERED, [breaker(CircuitState.OPEN, "")],
         Mode(conservative=True, reason="command: no reason given", held=True)),
        # stays, with the first reason, and starts counting anew
        (CONSERVATIVE, "auth", [], CONSERVATIVE),
        (Mode(conservative=True, reason="policy: timeout", healthy=1), NOT_ASKED, [], CONSERVATIVE),
        (CONSERVATIVE, ANSWERED, [], Mode(conservative=True, reason="policy: timeout", healthy=1)),
        # left
        (Mode(conservative=True, reason="policy: timeout", healthy=1), ANSWERED, [], NORMAL),
        (CONSERVATIVE, ANSWERED, [CLOSED], NORMAL),
        (HELD, ANSWERED, [CLOSED], NORMAL),
        (NORMAL, ANSWERED, [CLOSED], NORMAL),
        # held by command: no number of healthy boundaries ends it, nor does a failure
        (HELD, ANSWERED, [], HELD),
        (HELD, "timeout", [], HELD),
        (CONSERVATIVE, ANSWERED, [OPEN], HELD),
        # the last word counts
        (NORMAL, ANSWERED, [OPEN, CLOSED], NORMAL),
        (NORMAL, ANSWERED, [CLOSED, OPEN], HELD),
    ],
)  # fmt: skip
def test_the_mode_after_a_decision(mode: Mode, code: str, breakers: list[BreakerCommand], expected: Mode) -> None:
    decision = decide(Answer(code), boundary=1, step=1, mode=mode)
    assert next_mode(mode, decision, breakers, healthy_boundaries=2) == expected


@pytest.mark.parametrize("healthy_boundaries", [1, 2, 5])
def test_conservative_mode_ends_after_that_many_healthy_boundaries_in_a_row(healthy_boundaries: int) -> None:
    course = ["timeout", *[ANSWERED] * (healthy_boundaries - 1), "timeout", *[ANSWERED] * healthy_boundaries]
    mode, seen = NORMAL, []
    for code in course:
        mode = next_mode(mode, decide(Answer(code), boundary=1, step=1, mode=mode), [], healthy_boundaries)
        seen.append(mode.conservative)
    assert seen == [True] * (len(course) - 1) + [False]


def bare(kind: CommandType) -> Command:
    return Command(command_id="c", command_type=kind)


SEED_OPERATIONS = [
    Command(
        command_id="c", command_type=CommandType.SEED, target_seed_id="s",
        payload=SeedCommand(operation=operation, blueprint_id="identity"),
    )
    for operation in SeedOp
]  # fmt: skip


@pytest.mark.parametrize("mode", [NORMAL, CONSERVATIVE, HELD])
@pytest.mark.parametrize(
    "command",
    [
        bare(CommandType.EMERGENCY), bare(CommandType.STRUCTURAL_PRUNING),
        Command(command_id="c", command_type=CommandType.CIRCUIT_BREAKER, payload=breaker(CircuitState.HALF_OPEN)),
    ],
    ids=lambda command: command.command_type.name,
)  # fmt: skip
def test_what_this_version_does_not_do_is_refused_in_every_mode(command: Command, mode: Mode) -> None:
    refused = refusal(command, mode)
    assert refused is not None
    assert refused[0] == "unsupported"
    assert len(refused[1]) > 20


@pytest.mark.parametrize("command", SEED_OPERATIONS, ids=lambda c: c.payload.operation.name)
def test_no_structural_change_in_conservative_mode(command: Command) -> None:
    assert refusal(command, NORMAL) is None
    for mode in (CONSERVATIVE, HELD):
        refused = refusal(command, mode)
        assert refused is not None
        assert refused[0] == "conservative"
        assert mode.reason in refused[1]


@pytest.mark.parametrize("command", [do.scale_lr("host", 0.5), do.conservative(True), do.conservative(False)])
@pytest.mark.parametrize("mode", [NORMAL, CONSERVATIVE, HELD])
def test_what_concerns_the_rate_or_the_mode_is_left_to_its_owner(command: Command, mode: Mode) -> None:
    assert refusal(command, mode) is None
