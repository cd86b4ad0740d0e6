"""The course of a run as its log tells it."""

import json
from typing import Any

import pytest

from tolaria.errors import WalError
from tolaria.leyline.codec import encode_decision
from tolaria.leyline.types import Decision, RollbackCommand
from tolaria.recovery.journal import Journal
from tolaria.recovery.timeline import Return, Timeline, ahead, made, on_timeline
from tolaria.recovery.wal import WalKind, WalRecord


def back(branch: int, to: int, *, boundary: int = 0, **more: Any) -> Return:
    return Return(
        branch=branch, to_step=to, to_boundary=boundary, from_step=to + 5, at_boundary=boundary + 1,
        **{"level": 3, "cause": "loss_spike", "reason": "why", **more},
    )  # fmt: skip


def decision(boundary: int) -> bytes:
    return encode_decision(
        Decision(
            boundary=boundary, step_effective=boundary * 10, source="policy", reason="answered", conservative=False
        )
    )


def log(*entries: tuple[WalKind, bytes | dict[str, Any]]) -> list[WalRecord]:
    bodies = [body if isinstance(body, bytes) else json.dumps(body).encode() for _, body in entries]
    return [WalRecord(lsn, 1, kind, body) for lsn, ((kind, _), body) in enumerate(zip(entries, bodies, strict=True), 1)]


def checkpoint(seq: int, step: int, branch: int = 0) -> tuple[WalKind, dict[str, Any]]:
    return WalKind.CHECKPOINT, {"seq": seq, "step": step, "branch": branch, "manifest_sha256": f"sha{seq}"}


@pytest.mark.parametrize(("branch", "step", "lies_on_it"), [
    (0, 10, True), (0, 20, True), (0, 21, False), (1, 25, True), (1, 40, True), (1, 41, False), (2, 99, True),
])  # fmt: skip
def test_a_state_is_on_the_course_until_a_later_return_went_back_to_before_it(
    branch: int, step: int, lies_on_it: bool
) -> None:
    assert on_timeline([back(1, 20), back(2, 40)], branch, step) is lies_on_it


def test_a_return_to_before_another_undoes_it() -> None:
    returns = [back(1, 20), back(2, 10)]
    assert ahead(returns, 0, 5) == [returns[1]]
    assert ahead(returns, 0, 10) == [returns[1]]
    assert ahead(returns, 2, 10) == []


def test_the_effects_of_returns_that_stand_are_taken_in_order() -> None:
    returns = [back(1, 20), back(2, 40), back(3, 40)]
    assert ahead(returns, 0, 20) == returns
    assert ahead(returns, 1, 30) == returns[1:]
    assert ahead(returns, 2, 40) == returns[2:]


def test_a_failed_return_is_not_counted() -> None:
    failed, instead = back(1, 20), back(2, 10, instead_of=1)
    assert made([failed, instead, back(3, 30)]) == [instead, back(3, 30)]


def test_a_return_comes_back_from_its_record() -> None:
    taken = back(4, 12, boundary=2, skip=((0, 8, 16), (1, 0, 8)), conservative=True, held=True, rewarm=7)
    assert Return.from_json(json.loads(json.dumps(taken.to_json()))) == taken
    with pytest.raises(WalError, match="malformed"):
        Return.from_json({"branch": 1})


def test_a_return_voids_the_decisions_and_commands_behind_its_target() -> None:
    found = Timeline.of(log(
        (WalKind.DECISION, decision(1)), (WalKind.APPLIED, {"boundary": 1, "applied": ["a"], "refused": {}}),
        (WalKind.DECISION, decision(2)), (WalKind.APPLIED, {"boundary": 2, "applied": ["b"], "refused": {}}),
        (WalKind.VOID, back(1, 10, boundary=1).to_json()), (WalKind.DECISION, decision(2)),
    ))  # fmt: skip
    journal = Journal(found, wal=None, good_after=2)
    assert [journal.logged(b) is not None for b in (1, 2, 3)] == [True, True, False]
    assert journal.applied_before("a") and not journal.applied_before("b")


def test_checkpoints_off_the_course_are_void_whatever_was_said_of_them() -> None:
    found = Timeline.of(log(
        checkpoint(0, 10), checkpoint(1, 20), checkpoint(2, 30), (WalKind.GOOD, {"seq": 0}), (WalKind.GOOD, {"seq": 1}),
        (WalKind.VOID, back(1, 15).to_json()), checkpoint(3, 20, branch=1),
    ))  # fmt: skip
    journal = Journal(found, wal=None, good_after=2)
    assert journal.void == {1, 2}
    assert [journal.accepts(seq, 0, None) for seq in range(4)] == [True, False, False, True]
    assert journal.retention().protected == {0} and journal.retention().void == {1, 2}
    assert journal.known_manifests[3] == "sha3"
    assert journal.target_of(RollbackCommand(target="good")) == 0
    assert journal.target_of(RollbackCommand(target="step", step=20)) == 3
    assert journal.target_of(RollbackCommand(target="step", step=30)) is None


def test_a_return_by_command_is_refused_too_soon_and_without_a_checkpoint() -> None:
    journal = Journal(Timeline(), wal=None, good_after=2)
    refused = journal.refuses_return(RollbackCommand(target="good"), 5, 3)
    assert refused is not None and refused[0] == "no_checkpoint" and "checkpoints: none" in refused[1]
    journal.committed(0, 10, 0, good=True)
    assert journal.refuses_return(RollbackCommand(target="good"), 5, 3) is None
    journal.went_back(back(1, 10, boundary=4, cause="command"))
    refused = journal.refuses_return(RollbackCommand(target="good"), 7, 3)
    assert refused is not None and refused[0] == "rate_limit" and "boundary 8 on" in refused[1]
    assert journal.refuses_return(RollbackCommand(target="good"), 8, 3) is None


def start(step: int, agent: str | None = "a") -> tuple[WalKind, dict[str, Any]]:
    return WalKind.START, {"step": step, "branch": 0, "agent": agent}


@pytest.mark.parametrize(("starts", "count"), [
    ([start(5), start(5), start(5)], 3),
    ([start(5), start(7), start(5)], 1),
    ([start(5), start(5, "b")], 0),
    ([start(5), start(5), (WalKind.CLOSE, {})], 0),
    ([], 0),
])  # fmt: skip
def test_fruitless_starts_are_those_of_one_agent_from_one_point(starts: list[Any], count: int) -> None:
    assert Timeline.of(log(*starts)).fruitless_starts(5, 0, "a") == count


def test_a_start_by_hand_is_never_fruitless() -> None:
    assert Timeline.of(log(start(5, None), start(5, None))).fruitless_starts(5, 0, None) == 0


def test_a_halt_is_remembered_until_somebody_starts_the_run_again() -> None:
    assert Timeline.of(log(start(5), (WalKind.HALT, {"reason": "stop it"}))).halted == "stop it"
    assert Timeline.of(log(start(5), (WalKind.HALT, {"reason": "stop it"}), start(5))).halted is None


@pytest.mark.parametrize("kind", [WalKind.CHECKPOINT, WalKind.VOID, WalKind.GOOD, WalKind.START, WalKind.APPLIED])
def test_a_record_without_its_fields_refuses_the_log(kind: WalKind) -> None:
    body = {"applied": ["a"]} if kind == WalKind.APPLIED else {"nothing": 1}
    with pytest.raises(WalError, match="malformed"):
        Timeline.of(log((kind, body)))


# Acts of an operator


def act(number: int, step: int) -> tuple[WalKind, dict[str, Any]]:
    return WalKind.ACT, {"act": number, "step": step, "order_id": f"order-{number}-{step}", "action": "command"}


def acted(number: int, name: str = "", refused: str = "") -> tuple[WalKind, dict[str, Any]]:
    fate = {"applied": [name] if name else [], "refused": {f"order-{number}": refused} if refused else {}}
    return WalKind.ACTED, {"act": number, "boundary": 1, **fate, "digest": ""}


def test_an_act_that_the_run_has_not_seen_is_made_again() -> None:
    journal = Journal(Timeline.of(log(act(1, 10), acted(1, "a"), act(2, 20))), wal=None, good_after=2)
    first, second = journal.next_act(0), journal.next_act(1)
    assert first is not None and (first.number, first.step, first.ended, first.refused) == (1, 10, True, "")
    assert second is not None and (second.step, second.ended) == (20, False)
    assert journal.next_act(2) is None
    assert journal.orders == {"order-1-10", "order-2-20"} and journal.applied_before("a")


def test_what_became_of_an_act_is_what_the_log_says_last() -> None:
    found = Timeline.of(log(act(1, 10), acted(1, "a"), acted(1, refused="return_failed"), act(2, 11), acted(2, "b")))
    assert [(found.acts[n].refused, found.acts[n].ended) for n in (1, 2)] == [("return_failed", True), ("", True)]


def test_a_return_voids_the_acts_behind_it_whose_numbers_are_used_again() -> None:
    """Also those of the very boundary it goes to: an id is free again, and the order is not done a second time."""
    found = Timeline.of(log(
        act(1, 10), acted(1, "a"), act(2, 12), acted(2, "b"), act(3, 14), acted(3, "c"),
        (WalKind.VOID, back(1, 11, boundary=1, to_acts=1).to_json()), act(2, 11), acted(2, "d"),
    ))  # fmt: skip
    journal = Journal(found, wal=None, good_after=2)
    assert journal.next_act(0) is not None
    again = journal.next_act(1)
    assert again is not None and again.body is not None and again.body["order_id"] == "order-2-11"
    assert journal.next_act(2) is None
    assert [journal.applied_before(name) for name in "abcd"] == [True, False, False, True]
    assert len(journal.orders) == 4


def test_a_run_that_ended_as_it_should_has_done_with_its_acts() -> None:
    found = Timeline.of(log(act(1, 10), (WalKind.CLOSE, {}), start(10), act(2, 20)))
    assert [found.acts[n].over for n in (1, 2)] == [True, False]


def test_logs_from_before_there_were_acts_are_read() -> None:
    old = {key: value for key, value in back(1, 11, boundary=1).to_json().items() if key not in ("to_acts", "paused")}
    found = Timeline.of(log(checkpoint(0, 10), (WalKind.VOID, old), checkpoint(1, 12, branch=1)))
    assert (found.returns[0].to_acts, found.returns[0].paused, found.checkpoints[1].acts) == (0, None, 0)
    assert Journal(found, wal=None, good_after=2).void == set()


@pytest.mark.parametrize("spoiled", [
    {"act": "x", "step": 1, "order_id": "o"}, {"step": 1, "order_id": "o"}, {"act": 1, "step": 1}, {"act": 1},
])  # fmt: skip
def test_an_act_that_says_nothing_is_a_broken_log(spoiled: dict[str, Any]) -> None:
    with pytest.raises(WalError, match=r"record 1 \(ACT\) is malformed"):
        Timeline.of(log((WalKind.ACT, spoiled)))


@pytest.mark.parametrize(("branch", "step", "acts", "lies_on_it"), [
    (0, 20, 1, True), (0, 20, 2, False), (0, 19, 9, True), (0, 21, 0, False), (1, 20, 9, True), (0, 20, 0, True),
])  # fmt: skip
def test_at_the_step_of_a_return_the_acts_say_what_came_before_it(
    branch: int, step: int, acts: int, lies_on_it: bool
) -> None:
    assert on_timeline([back(1, 20, to_acts=1)], branch, step, acts) is lies_on_it


def test_a_checkpoint_that_has_seen_a_void_act_is_off_the_course_and_another_of_that_step_is_on_it() -> None:
    journal = Journal(Timeline(), wal=None, good_after=2)
    journal.committed(0, 20, 0, 0)
    journal.committed(1, 20, 0, 2)
    journal.went_back(back(1, 20, to_acts=1))
    assert journal.void == {1} and list(journal.ladder.rungs) == [0]
    journal.committed(2, 20, 0, 3)  # written while the run went back
    assert journal.void == {1, 2}


def test_a_return_to_before_an_act_undoes_the_one_to_after_it() -> None:
    returns = [back(1, 20, to_acts=2), back(2, 20, to_acts=1)]
    assert ahead(returns, 0, 20) == returns[1:]
