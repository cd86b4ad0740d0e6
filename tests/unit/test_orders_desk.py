"""Rank 0's desk: who is heard, what is done once, what is said when there is too much or it is over."""

import dataclasses
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tolaria.errors import ConfigError, RunUnreachable
from tolaria.leyline.framing import (
    Frame,
    FrameKind,
    KeyRing,
    load_key_file,
    new_key_file_text,
    open_frame,
    request_header,
    seal,
)
from tolaria.orders.client import RunClient, operator_name
from tolaria.orders.desk import ADDRESS_NAME, KEY_NAME, MAX_REMEMBERED, MAX_WAITING, OrderDesk, open_desk
from tolaria.orders.words import HELLO, PAUSE, STOP, Order, Outcome, decode_outcome, encode_order

RUN_ID, GENERATION = "20261125T010203Z-aabbccdd", "5" * 16
KEYS = KeyRing([bytes(range(32))])


class Desk(OrderDesk):
    """One that is asked without its thread and its socket."""

    def __init__(self, folder: Path, **more: Any) -> None:
        given = {"keys": KEYS, "done_before": set(), "hello": lambda: {"step": 7}, "wall_ns": lambda: 1, **more}
        super().__init__(folder, RUN_ID, GENERATION, **given)

    def sent(self) -> list[tuple[bytes, Outcome]]:
        """What it has to say, and to whom; then it has nothing more."""
        found = []
        while self._outbox:
            receiver, raw = self._outbox.popleft()
            frame: Frame = open_frame(raw, self._keys, FrameKind.OUTCOME)
            found.append((receiver, decode_outcome(frame.payload)))
        return found


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def frame(order: Order, *, keys: KeyRing = KEYS, **changes: Any) -> bytes:
    payload = encode_order(order)
    header = request_header(
        run_id=RUN_ID, generation=GENERATION, boundary=0, seq=0, payload=payload, wall_ns=1, kind=FrameKind.ORDER
    )
    return seal(dataclasses.replace(header, **changes), payload, keys)


def test_an_order_waits_and_its_outcome_goes_to_who_sent_it(desk: Desk) -> None:
    order = Order(action=PAUSE)
    assert not desk.waiting
    raw = frame(order)
    desk.receive(raw, b"me")
    assert desk.waiting and desk.sent() == []
    taken = desk.take()
    assert taken is not None and taken.order == order and taken.frame == raw
    assert desk.take() is None
    outcome = Outcome(order_id=order.order_id, state="applied", step=3)
    desk.answer(outcome)
    assert desk.sent() == [(b"me", outcome)]


@pytest.mark.parametrize(("raw", "code"), [
    (None, "multipart"), (b"", "size"), (b"x" * 200, "magic"),
    (frame(Order(action=PAUSE), keys=KeyRing([bytes(range(1, 33))])), "unknown_key"),
    (frame(Order(action=PAUSE), kind=FrameKind.REQUEST), "mac"),
    (frame(Order(action=PAUSE), kind=FrameKind.OUTCOME), "mac"),  # its own words, sent back to it
    (frame(Order(action=PAUSE), run_id=b"another run 0123"), "run"),
    (frame(Order(action=PAUSE), generation=99), "generation"),
    (frame(Order(action=PAUSE))[:-1] + b"\0", "mac"),
])  # fmt: skip
def test_who_is_not_the_operator_of_this_start_gets_a_count_and_no_answer(
    desk: Desk, raw: bytes | None, code: str
) -> None:
    desk.receive(raw, b"stranger")
    assert desk.rejected == {code: 1}
    assert not desk.waiting and desk.sent() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_garbage_never_gets_through(desk: Desk, raw: bytes) -> None:
    desk.receive(raw, b"stranger")
    desk.receive(frame(Order(action=PAUSE))[:104] + raw, b"stranger")
    assert not desk.waiting and desk.sent() == []
    assert len(desk.rejected) < 12


def test_the_same_order_is_not_done_twice_and_answered_to_who_asked_last(desk: Desk) -> None:
    order = Order(action=PAUSE)
    desk.receive(frame(order), b"first")
    desk.receive(frame(order), b"second")
    assert desk.take() is not None and desk.take() is None
    outcome = Outcome(order_id=order.order_id, state="refused", code="paused")
    desk.answer(outcome)
    desk.receive(frame(order), b"third")
    assert desk.sent() == [(b"second", outcome), (b"third", outcome)]


def test_what_an_earlier_start_did_is_not_done_again_nor_what_this_one_has_forgotten(tmp_path: Path) -> None:
    """The ids are those of the log, which grows while the desk is open."""
    done, late = {"0" * 32}, Order(action=PAUSE)
    desk = Desk(tmp_path, done_before=done)
    desk.receive(frame(Order(action=PAUSE, order_id="0" * 32)), b"me")
    [(_, outcome)] = desk.sent()
    assert (outcome.state, outcome.code) == ("refused", "done_before")
    desk.receive(frame(late), b"me")
    assert desk.take() is not None
    done.add(late.order_id)
    desk.answer(Outcome(order_id=late.order_id, state="applied"))
    for _ in range(MAX_REMEMBERED + 1):
        desk.receive(frame(Order(action=HELLO)), b"me")
    desk.sent()
    desk.receive(frame(late), b"me")
    assert desk.take() is None
    assert [outcome.code for _, outcome in desk.sent()] == ["done_before"]


def test_a_flood_of_orders_is_bounded_and_told(desk: Desk) -> None:
    for _ in range(10 * MAX_WAITING):
        desk.receive(frame(Order(action=PAUSE)), b"me")
    answers = desk.sent()
    assert len(answers) == 9 * MAX_WAITING and {outcome.code for _, outcome in answers} == {"busy"}
    for _ in range(MAX_WAITING):
        assert desk.take() is not None
    assert desk.take() is None
    assert len(desk._known) <= MAX_WAITING + MAX_REMEMBERED


def test_what_is_too_long_to_say_is_said_short_and_hurts_nobody(desk: Desk) -> None:
    order = Order(action=PAUSE)
    desk.receive(frame(order), b"me")
    desk.take()
    desk.answer(Outcome(order_id=order.order_id, state="refused", code="apply_failed", reason="page " * 20_000))
    [(_, outcome)] = desk.sent()
    assert outcome.code == "apply_failed" and 100 < len(outcome.reason) < 5000
    desk.answer(Outcome(order_id=order.order_id, state="applied", details={"loss": float("nan"), "odd": object()}))
    assert desk.sent()[0][1].state == "applied"


# Keys


def key_file(path: Path, *lines: str) -> Path:
    path.touch(0o600)
    path.write_text("".join(lines))
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    return path


def test_a_key_is_replaced_and_revoked_while_the_run_lives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old, new = new_key_file_text(), new_key_file_text()
    path = key_file(tmp_path / KEY_NAME, old)
    before = load_key_file(path)
    desk = Desk(tmp_path, keys=before, key_file=path)
    after = load_key_file(key_file(tmp_path / "after", new, old))
    desk.receive(frame(Order(action=HELLO), keys=after), b"me")
    assert desk.rejected == {"unknown_key": 1}
    key_file(path, new, old)
    desk.receive(frame(Order(action=HELLO), keys=after), b"me")
    desk.receive(frame(Order(action=HELLO), keys=before), b"me")
    assert len(desk.sent()) == 2
    key_file(path, new, old, f"revoke {before.signing_key_id:08x}\n")
    desk.receive(frame(Order(action=HELLO), keys=before), b"me")
    assert desk.rejected == {"unknown_key": 1, "revoked_key": 1}
    key_file(path, "half written")
    desk.receive(frame(Order(action=HELLO), keys=after), b"me")
    path.unlink()
    desk.receive(frame(Order(action=HELLO), keys=after), b"me")
    assert len(desk.sent()) == 2
    assert "orders are judged by the keys from before" in capfd.readouterr().err


# With its thread


@pytest.fixture
def served(tmp_path: Path) -> Iterator[OrderDesk]:
    desk = open_desk(tmp_path, RUN_ID, GENERATION, done_before=set(), hello=lambda: {"step": 7})
    yield desk
    desk.close()
    desk.close()


def test_the_run_s_owner_finds_it_and_is_answered(tmp_path: Path, served: OrderDesk) -> None:
    for name in (KEY_NAME, ADDRESS_NAME):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    answer = RunClient.of(tmp_path).send(Order(action=HELLO), wait_s=20)
    assert answer.details == {"step": 7, "waiting": 0}
    served.close()
    assert not (tmp_path / ADDRESS_NAME).exists() and (tmp_path / KEY_NAME).exists()
    with pytest.raises(RunUnreachable, match="no run there takes orders"):
        RunClient.of(tmp_path)


def test_who_waits_when_the_run_ends_is_told(tmp_path: Path, served: OrderDesk) -> None:
    found: list[Outcome] = []
    sender = threading.Thread(
        target=lambda: found.append(RunClient.of(tmp_path).send(Order(action=STOP), wait_s=20))
    )  # fmt: skip
    sender.start()
    end = time.monotonic() + 20
    while not served.waiting and time.monotonic() < end:
        time.sleep(0.01)
    served.close()
    sender.join(20)
    assert [(outcome.state, outcome.code) for outcome in found] == [("refused", "ended")]


def test_an_older_start_that_ends_late_leaves_the_address_of_the_newer_one(tmp_path: Path, served: OrderDesk) -> None:
    path = tmp_path / ADDRESS_NAME
    newer = {**json.loads(path.read_text()), "generation": "6" * 16}
    path.write_text(json.dumps(newer))
    served.close()
    assert json.loads(path.read_text()) == newer


def test_a_run_that_was_killed_is_told_from_one_that_is_busy(tmp_path: Path, served: OrderDesk) -> None:
    path = tmp_path / ADDRESS_NAME
    address = json.loads(path.read_text())
    gone = {**address, "endpoint": f"ipc://{tmp_path}/tolaria-tamiyo-1-gone/policy.sock"}
    path.write_text(json.dumps(gone))
    started = time.monotonic()
    with pytest.raises(RunUnreachable, match="was killed and is not started again"):
        RunClient.of(tmp_path)
    path.write_text(json.dumps({**gone, "host": "elsewhere"}))
    with pytest.raises(RunUnreachable, match="are taken on elsewhere"):
        RunClient.of(tmp_path)
    assert time.monotonic() - started < 5
    for spoiled in ("", "[]", "{}", '{"endpoint": 1}'):
        path.write_text(spoiled)
        with pytest.raises(RunUnreachable, match="cannot be understood"):
            RunClient.of(tmp_path)


def test_a_key_file_that_others_may_read_opens_no_desk(tmp_path: Path) -> None:
    key_file(tmp_path / KEY_NAME, new_key_file_text()).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_desk(tmp_path, RUN_ID, GENERATION, done_before=set(), hello=dict)
    assert not (tmp_path / ADDRESS_NAME).exists()


def test_an_operator_without_a_name_or_with_a_long_one_can_give_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert operator_name().startswith(f"{os.getuid()}@")
    monkeypatch.setattr("getpass.getuser", lambda: "x" * 300)
    encode_order(Order(action=PAUSE, operator=operator_name()))
