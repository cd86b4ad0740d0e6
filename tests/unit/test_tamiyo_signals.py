"""Emergencies of the policy: their frame, what the trainer accepts, what the policy's side sends, and both together."""

import logging
import os
import signal as signals_of_the_os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.config import TamiyoConfig
from tolaria.errors import ConfigError, MessageRejected
from tolaria.leyline import codec
from tolaria.leyline.framing import (
    FrameHeader,
    FrameKind,
    KeyRing,
    claims_signal,
    open_frame,
    request_header,
    seal,
    signal_header,
)
from tolaria.leyline.generated import leyline_pb2 as pb
from tolaria.leyline.keys import key_id
from tolaria.leyline.limits import MAX_SIGNAL_BYTES
from tolaria.leyline.types import (
    Command,
    EmergencyLevel,
    EmergencySignal,
    FieldReport,
    HardwareContext,
    PolicyRequest,
    SystemState,
)
from tolaria.tamiyo.client import PolicyClient, open_client
from tolaria.tamiyo.desk import Desk
from tolaria.tamiyo.embedded import EmbeddedPolicy
from tolaria.tamiyo.inbox import MAX_WAITING, SignalInbox
from tolaria.tamiyo.outbox import SignalOutbox
from tolaria.tamiyo.policies import load_policy
from tolaria.tamiyo.policy import Policy, raise_level

KEY, OTHER_KEY = bytes(range(32)), bytes(range(100, 132))
KEYS = KeyRing([KEY])
DRILL = EmergencySignal(level=EmergencyLevel.CONSERVATIVE, reason="drill", origin="test", mark=7)
WAIT_S = 15.0

texts = st.text(st.characters(codec="utf-8").filter(str.isprintable), max_size=128)


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(MessageRejected) as caught:
        act()
    return caught.value.code


def question(run_id: str = "run", generation: str = "g", boundary: int = 1) -> FrameHeader:
    return request_header(
        run_id=run_id, generation=generation, boundary=boundary, seq=1, payload=b"question", wall_ns=1
    )


def frame_of(
    signal: EmergencySignal = DRILL, asked: FrameHeader | None = None, keys: KeyRing = KEYS, **changes: Any
) -> bytes:
    header = signal_header(asked or question(), mark=signal.mark, wall_ns=1)
    return seal(replace(header, **changes), codec.encode_signal(signal), keys)


def new_inbox(run_id: str = "run", generation: str = "g", keys: KeyRing = KEYS) -> tuple[SignalInbox, Counter[str]]:
    rejected: Counter[str] = Counter()
    return SignalInbox(keys, rejected, run_id=run_id, generation=generation), rejected


# The message


@given(st.sampled_from(EmergencyLevel), texts, texts, st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1))
def test_a_signal_comes_out_as_it_went_in(level: EmergencyLevel, reason: str, origin: str, mark: int, at: int) -> None:
    # Every character takes four bytes at most, so nothing that passes the checks is too long to be sent.
    given_ = EmergencySignal(level=level, reason=reason, origin=origin, mark=mark)
    raw = codec.encode_signal(given_, raised_at_ns=at)
    assert codec.decode_signal(raw, mark=mark) == given_
    assert pb.EmergencySignal.FromString(raw).triggered_at.seconds == at // 10**9


def edited(edit: Callable[[Any], object]) -> bytes:
    wire = pb.EmergencySignal.FromString(codec.encode_signal(DRILL))
    edit(wire)
    return wire.SerializeToString()


RAW = codec.encode_signal(DRILL)
WRONG: dict[str, tuple[bytes, str]] = {
    "level 0": (edited(lambda w: setattr(w, "level", 0)), "enum"),
    "level 5": (edited(lambda w: setattr(w, "level", 5)), "enum"),
    "negative level": (edited(lambda w: setattr(w, "level", -1)), "range"),
    "no version": (edited(lambda w: w.ClearField("version")), "version"),
    "version 2": (edited(lambda w: setattr(w, "version", 2)), "version"),
    "long reason": (edited(lambda w: setattr(w, "reason", "x" * 129)), "text"),
    "escape sequence in the reason": (edited(lambda w: setattr(w, "reason", "\x1b[2J")), "text"),
    "two lines": (edited(lambda w: setattr(w, "reason", "a\nb")), "text"),
    "long origin": (edited(lambda w: setattr(w, "origin", "x" * 129)), "text"),
    "invisible origin": (edited(lambda w: setattr(w, "origin", "\u202e")), "text"),
    "too large": (edited(lambda w: setattr(w, "payload_checksum", bytes(4096))), "size"),
    "two levels": (RAW + b"\x10\x04", "duplicate"),
    "unknown field": (RAW + b"\xf8\x07\x01", "unknown_field"),
    "cut off": (RAW[:-1], "parse"),
    "empty": (b"", "version"),
}


@pytest.mark.parametrize(("raw", "code"), WRONG.values(), ids=WRONG)
def test_a_wrong_signal_is_refused_with_its_code(raw: bytes, code: str) -> None:
    assert code_of(lambda: codec.decode_signal(raw, mark=1)) == code
    inbox, rejected = new_inbox()
    header = signal_header(question(), mark=9, wall_ns=1)
    if len(raw) <= FrameKind.SIGNAL.max_payload_bytes:
        inbox.put(seal(header, raw, KEYS))
        assert rejected == {code: 1}
    else:
        inbox.put(seal(replace(header, kind=FrameKind.REPLY), raw, KEYS))
        assert rejected == {"size": 1}
    assert inbox.take() == []
    assert inbox.mark == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"level": 3}, "type"),
        ({"level": 0}, "type"),
        ({"reason": "x" * 129}, "text"),
        ({"origin": "a\0b"}, "text"),
        ({"reason": None}, "type"),
        ({"mark": -1}, "range"),
    ],
)
def test_what_would_be_refused_is_not_sent(change: dict[str, Any], code: str) -> None:
    assert code_of(lambda: codec.encode_signal(replace(DRILL, **change))) == code


@pytest.mark.parametrize("level", [0, 5, -1, 99])
def test_only_the_four_levels_can_be_raised(level: int) -> None:
    with pytest.raises(ValueError, match=str(level)):
        raise_level(level, "no such level")


def test_a_policy_text_that_does_not_fit_is_clipped_and_the_level_still_goes_out() -> None:
    raised = raise_level(4, "line one\nline two " + "x" * 200, origin="a\tb")
    assert codec.decode_signal(codec.encode_signal(raised), mark=0) == raised
    assert raised.reason.startswith("line one line two x")
    assert raised.origin == "a b"


# What the trainer accepts


def test_no_single_altered_byte_is_accepted() -> None:
    frame = frame_of()
    inbox, rejected = new_inbox()
    altered = 0
    for at in range(len(frame)):
        for flip in range(1, 256):
            inbox.put(frame[:at] + bytes([frame[at] ^ flip]) + frame[at + 1 :])
            altered += 1
    assert altered == 255 * len(frame)
    assert rejected.total() == altered
    assert inbox.take() == []
    assert inbox.mark == 0
    inbox.put(frame)
    assert inbox.take() == [DRILL]


def test_no_cut_or_lengthened_frame_is_accepted() -> None:
    frame = frame_of()
    inbox, rejected = new_inbox()
    pieces = [frame[:size] for size in range(len(frame))] + [frame + b"\0", frame + frame, b"\0" + frame]
    for piece in pieces:
        inbox.put(piece)
    assert rejected.total() == len(pieces)
    assert inbox.take() == []


def test_a_signal_larger_than_one_can_be_is_not_verified() -> None:
    inbox, rejected = new_inbox()
    inbox.put(frame_of() + bytes(MAX_SIGNAL_BYTES))
    assert rejected == {"size": 1}


def test_a_signal_is_taken_once_and_never_again() -> None:
    inbox, rejected = new_inbox()
    frames = {mark: frame_of(replace(DRILL, mark=mark)) for mark in (5, 6, 8)}
    for mark in (6, 6, 5, 8, 6, 8):
        inbox.put(frames[mark])
    assert [signal.mark for signal in inbox.take()] == [6, 8]
    assert inbox.take() == []
    assert rejected == {"replayed": 4}
    assert inbox.mark == 8


def test_a_mark_kept_from_an_earlier_start_refuses_what_that_one_saw() -> None:
    inbox, rejected = new_inbox()
    inbox.mark = 7
    inbox.put(frame_of(DRILL))
    inbox.put(frame_of(replace(DRILL, mark=8)))
    assert [signal.mark for signal in inbox.take()] == [8]
    assert rejected == {"replayed": 1}


FOREIGN: dict[str, tuple[bytes, str]] = {
    "another run": (frame_of(asked=question(run_id="other")), "run"),
    "another start": (frame_of(asked=question(generation="h")), "generation"),
    "another key": (frame_of(keys=KeyRing([OTHER_KEY])), "unknown_key"),
    "a signed reply": (frame_of(kind=FrameKind.REPLY), "kind"),
    "our own question": (frame_of(kind=FrameKind.REQUEST), "mac"),
    "mark 0": (frame_of(replace(DRILL, mark=0)), "replayed"),
}


@pytest.mark.parametrize(("frame", "code"), FOREIGN.values(), ids=FOREIGN)
def test_a_signal_for_somebody_else_is_refused(frame: bytes, code: str) -> None:
    inbox, rejected = new_inbox()
    inbox.put(frame)
    assert rejected == {code: 1}
    assert inbox.take() == []
    assert inbox.mark == 0


def test_a_revoked_key_raises_nothing() -> None:
    inbox, rejected = new_inbox(keys=KeyRing([OTHER_KEY, KEY], revoked=[key_id(KEY)]))
    inbox.put(frame_of())
    assert rejected == {"revoked_key": 1}
    assert inbox.take() == []


def test_a_frame_that_calls_itself_something_else_is_no_signal() -> None:
    assert claims_signal(frame_of())
    assert not claims_signal(frame_of(kind=FrameKind.REPLY))
    assert not claims_signal(frame_of()[:7])
    assert not claims_signal(b"")


def test_when_nobody_takes_them_the_grave_ones_stay() -> None:
    inbox, rejected = new_inbox()
    halt = replace(DRILL, level=EmergencyLevel.HALT, mark=1)
    inbox.put(frame_of(halt))
    for mark in range(2, 2 + MAX_WAITING + 10):
        inbox.put(frame_of(replace(DRILL, level=EmergencyLevel.NOTICE, mark=mark)))
    taken = inbox.take()
    assert len(taken) == MAX_WAITING
    assert taken[0] == halt
    assert [signal.mark for signal in taken[1:]] == list(range(13, 12 + MAX_WAITING))
    assert rejected == {"unread": 11}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400).map(lambda raw: b"TLY1\x01\x00\x00\x03" + raw) | st.binary(max_size=400))
def test_nothing_that_comes_in_raises(raw: bytes) -> None:
    inbox, rejected = new_inbox()
    inbox.put(raw)
    assert rejected.total() == 1
    assert inbox.take() == []


# What the policy's side sends


class Told(Policy):
    """Returns what it was told to."""

    version = "told-1"

    def __init__(self, now: EmergencySignal | None = None) -> None:
        self.now = now
        self.calls = 0

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        return []

    def emergency(self) -> EmergencySignal | None:
        self.calls += 1
        return self.now


class Wire:
    """Takes what is sent, or refuses it while ``down``."""

    def __init__(self) -> None:
        self.down = False
        self.sent: list[tuple[bytes, bytes]] = []

    def send(self, receiver: bytes, frame: bytes) -> bool:
        if not self.down:
            self.sent.append((receiver, frame))
        return not self.down

    def accepted(self, inbox: SignalInbox) -> list[EmergencySignal]:
        for _, frame in self.sent:
            inbox.put(frame)
        self.sent.clear()
        return inbox.take()


def raised(level: int, reason: str = "drill") -> EmergencySignal:
    return raise_level(level, reason)


def test_a_level_is_sent_when_it_appears_and_when_it_rises() -> None:
    policy, wire, outbox = Told(), Wire(), SignalOutbox(KEYS)
    asked = question()
    inbox, rejected = new_inbox()
    outbox.heard(asked, b"trainer")
    seen = []
    for level in (None, 2, 2, 3, 2, None, 2, 4, None, 1):
        policy.now = None if level is None else raised(level)
        outbox.send({asked.run_id: policy}, wire.send)
        seen.append([int(signal.level) for signal in wire.accepted(inbox)])
    assert seen == [[], [2], [], [3], [], [], [2], [4], [], [1]]
    assert not rejected


def test_who_raised_it_is_the_policy_unless_it_says_otherwise() -> None:
    policy, wire, outbox = Told(raised(1)), Wire(), SignalOutbox(KEYS)
    asked = question()
    outbox.heard(asked, b"trainer")
    outbox.send({asked.run_id: policy}, wire.send)
    policy.now = raise_level(2, "drill", origin="probe")
    outbox.send({asked.run_id: policy}, wire.send)
    assert [signal.origin for signal in wire.accepted(new_inbox()[0])] == ["told-1", "probe"]


def test_each_run_is_told_its_own_and_nothing_before_its_first_question() -> None:
    quiet, loud, wire, outbox = Told(), Told(raised(3)), Wire(), SignalOutbox(KEYS)
    first, second = question("run"), question("run-2")
    policies = {first.run_id: quiet, second.run_id: loud}
    outbox.heard(first, b"one")
    outbox.send(policies, wire.send)
    assert loud.calls == 0
    outbox.heard(second, b"two")
    outbox.send(policies, wire.send)
    assert [receiver for receiver, _ in wire.sent] == [b"two"]
    inbox, rejected = new_inbox("run")
    frame = wire.sent[0][1]
    inbox.put(frame)
    assert rejected == {"run": 1}
    inbox, _ = new_inbox("run-2")
    inbox.put(frame)
    assert [int(signal.level) for signal in inbox.take()] == [3]


def test_what_cannot_be_sent_is_kept_until_it_can() -> None:
    policy, wire, outbox = Told(raised(3)), Wire(), SignalOutbox(KEYS)
    asked = question()
    inbox, rejected = new_inbox()
    outbox.heard(asked, b"trainer")
    wire.down = True
    for _ in range(3):
        outbox.send({asked.run_id: policy}, wire.send)
        policy.now = None
    assert wire.sent == []
    wire.down = False
    for _ in range(3):
        outbox.send({asked.run_id: policy}, wire.send)
    assert [int(signal.level) for signal in wire.accepted(inbox)] == [3]
    assert not rejected


def test_after_a_new_connection_the_last_one_comes_again_and_counts_once() -> None:
    policy, wire, outbox = Told(raised(3)), Wire(), SignalOutbox(KEYS)
    asked = question()
    outbox.heard(asked, b"old")
    outbox.send({asked.run_id: policy}, wire.send)
    outbox.heard(question(boundary=2), b"new")
    outbox.send({asked.run_id: policy}, wire.send)
    outbox.heard(question(boundary=3), b"new")
    outbox.send({asked.run_id: policy}, wire.send)
    assert [receiver for receiver, _ in wire.sent] == [b"old", b"new"]
    assert wire.sent[0][1] == wire.sent[1][1]
    policy.now = raised(4)
    outbox.send({asked.run_id: policy}, wire.send)
    assert open_frame(wire.sent.pop()[1], KEYS, FrameKind.SIGNAL).header.boundary == 3
    inbox, rejected = new_inbox()
    assert len(wire.accepted(inbox)) == 1
    assert rejected == {"replayed": 1}


def test_a_new_start_gets_no_old_emergency_but_hears_what_is_still_wrong(caplog: pytest.LogCaptureFixture) -> None:
    policy, wire, outbox = Told(raised(4, "old")), Wire(), SignalOutbox(KEYS)
    asked = question()
    wire.down = True
    outbox.heard(asked, b"trainer")
    outbox.send({asked.run_id: policy}, wire.send)
    wire.down, policy.now = False, None
    outbox.heard(question(generation="h"), b"restarted")
    outbox.send({asked.run_id: policy}, wire.send)
    assert wire.sent == []
    assert "never sent and is dropped" in caplog.text
    policy.now = raised(2, "still")
    outbox.send({asked.run_id: policy}, wire.send)
    outbox.heard(question(generation="i"), b"restarted again")
    outbox.send({asked.run_id: policy}, wire.send)
    first, second = (frame for _, frame in wire.sent)
    for generation, frame in (("h", first), ("i", second)):
        inbox, _ = new_inbox(generation=generation)
        inbox.put(frame)
        assert [signal.reason for signal in inbox.take()] == ["still"]


def test_marks_grow_while_the_clock_stands_or_goes_back_and_over_restarts() -> None:
    policy, wire = Told(), Wire()
    clock = iter([1000] * 20 + [10] * 20)
    outbox = SignalOutbox(KEYS, wall_ns=lambda: next(clock))
    asked = question()
    outbox.heard(asked, b"trainer")
    inbox, rejected = new_inbox()
    for _ in range(8):
        for policy.now in (raised(1), None):
            outbox.send({asked.run_id: policy}, wire.send)
    assert [signal.mark for signal in wire.accepted(inbox)] == list(range(1000, 1008))
    assert not rejected
    restarted = SignalOutbox(KEYS, wall_ns=lambda: 2000)
    restarted.heard(asked, b"trainer")
    restarted.send({asked.run_id: Told(raised(1))}, wire.send)
    assert [signal.mark for signal in wire.accepted(inbox)] == [2000]


class Broken(Told):
    def emergency(self) -> EmergencySignal | None:
        super().emergency()
        raise KeyError("no such metric")


class Wild(Told):
    def emergency(self) -> EmergencySignal | None:
        super().emergency()
        return replace(DRILL, level=9)  # type: ignore[arg-type]


class Wordy(Told):
    def emergency(self) -> EmergencySignal | None:
        super().emergency()
        return replace(DRILL, reason="x" * 500)


class Textual(Told):
    def emergency(self) -> EmergencySignal | None:
        super().emergency()
        return "help"  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [Broken, Wild, Wordy, Textual])
def test_a_failing_policy_raises_nothing_and_harms_no_other(kind: type[Told], caplog: pytest.LogCaptureFixture) -> None:
    broken, good, wire, outbox = kind(), Told(raised(3)), Wire(), SignalOutbox(KEYS)
    first, second = question("run"), question("run-2")
    outbox.heard(first, b"one")
    outbox.heard(second, b"two")
    with caplog.at_level(logging.ERROR):
        for _ in range(100):
            outbox.send({first.run_id: broken, second.run_id: good}, wire.send)
    assert broken.calls == 100
    assert [receiver for receiver, _ in wire.sent] == [b"two"]
    assert caplog.text.count("emergency() failed") == 7


def request(boundary: int, run_id: str = "run") -> PolicyRequest:
    state = SystemState(
        packet_id=f"packet-{boundary}", current_epoch=boundary, global_step=10 * boundary, validation_accuracy=0.5,
        validation_loss=0.5, training_loss=0.6, timestamp_ns=1, training_run_id=run_id, experiment_name="test",
        hardware=HardwareContext(device_type="cpu"),
    )  # fmt: skip
    return PolicyRequest(state=state)


def asked_frame(boundary: int, seq: int) -> bytes:
    payload = codec.encode_request(request(boundary))
    header = request_header(run_id="run", generation="g", boundary=boundary, seq=seq, payload=payload, wall_ns=1)
    return seal(header, payload, KEYS)


def test_an_old_question_does_not_turn_the_way_back() -> None:
    policy, wire = Told(), Wire()
    desk = Desk(KEYS, lambda: policy)
    first, second = asked_frame(1, 1), asked_frame(2, 2)
    desk.answer(first, b"trainer")
    desk.answer(second, b"trainer")
    # A recorded question, and one that is no question at all, from somewhere else.
    assert desk.answer(first, b"thief") is not None
    assert desk.answer(second[:-1], b"thief") is None
    policy.now = raised(3)
    desk.send_emergencies(wire.send)
    assert [receiver for receiver, _ in wire.sent] == [b"trainer"]
    # The newest question asked again does: the trainer connects anew before it asks a second time.
    assert desk.answer(second, b"reconnected") is not None
    desk.send_emergencies(wire.send)
    assert [receiver for receiver, _ in wire.sent] == [b"trainer", b"reconnected"]


def test_a_class_that_is_no_policy_may_have_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain_policies.py").write_text(
        "from tolaria.tamiyo.policy import raise_level\n"
        "class Deaf:\n    def decide(self, state, reports): return []\n"
        "class Alert(Deaf):\n    def emergency(self): return raise_level(2, 'seen')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_policy("plain_policies:Deaf", {}).emergency() is None
    assert load_policy("noop", {}).emergency() is None
    assert load_policy("plain_policies:Alert", {}).emergency() == raise_level(2, "seen")


# Scripts


def write_script(path: Path, *entries: str) -> str:
    path.write_text("\n".join(f"[[command]]\n{entry}" for entry in entries))
    return f"script:{path}"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ('boundary = 1\nop = "emergency"\nlevel = 0', "level=0; expected 1"),
        ('boundary = 1\nop = "emergency"\nlevel = 5', "level=5; expected 1"),
        ('boundary = 1\nop = "emergency"\nlevel = true', "expected int"),
        ('boundary = 1\nop = "emergency"', "level missing"),
        ('boundary = 1\nop = "emergency"\nlevel = 3\nslot = "x"', "unknown key 'slot'"),
        ('boundary = 2\nop = "emergency"\nlevel = 3', "a second emergency at boundary 2"),
    ],
)
def test_a_wrong_emergency_in_a_script_is_refused_at_start(entry: str, says: str, tmp_path: Path) -> None:
    spec = write_script(tmp_path / "script.toml", 'boundary = 2\nop = "emergency"\nlevel = 1', entry)
    with pytest.raises(ConfigError, match=says) as caught:
        load_policy(spec, {})
    assert "command 2" in str(caught.value)


# Both sides, the policy in a process of its own

WATCHER = """
from pathlib import Path

from tolaria.tamiyo.policy import Policy, raise_level


class Watcher(Policy):
    version = "watcher-1"

    def __init__(self, *, file: str) -> None:
        self.file = Path(file)

    def decide(self, state, reports):
        return []

    def emergency(self):
        return raise_level(int(text), "file says so") if (text := self.file.read_text()) else None
"""


def client_for(policy: EmbeddedPolicy, generation: str = "g") -> PolicyClient:
    return open_client(
        TamiyoConfig(), run_id="run", generation=generation, endpoint=policy.endpoint, key_file=policy.key_file
    )


def ask(client: PolicyClient, boundary: int, deadline_ms: int = 10_000) -> None:
    client.ask(request(boundary), boundary=boundary, deadline_ms=deadline_ms)


def wait_for_level(client: PolicyClient, level: int) -> EmergencySignal:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if found := client.signals():
            assert [int(signal.level) for signal in found] == [level]
            return found[0]
        time.sleep(0.01)
    raise AssertionError(f"no signal of level {level} within {WAIT_S:g} s; rejected: {client.rejected}")


def test_a_script_raises_one_beside_its_answer_and_only_once(tmp_path: Path) -> None:
    entries = ['boundary = 2\nop = "emergency"\nlevel = 3\nreason = "drill"', 'boundary = 2\nop = "pause"']
    entries += [f'boundary = {boundary}\nop = "emergency"\nlevel = 3\nreason = "again"' for boundary in (4, 5)]
    spec = write_script(tmp_path / "script.toml", *entries)
    with EmbeddedPolicy(spec, log_path=tmp_path / "log") as policy:
        policy.wait_ready()
        client = client_for(policy)
        try:
            ask(client, 1)
            assert client.signals() == []
            reply = client.ask(request(2), boundary=2, deadline_ms=10_000)
            # It came during the question, and the question has its answer all the same.
            assert len(reply.commands) == 1
            found = client.signals()
            assert [(int(s.level), s.reason, s.origin) for s in found] == [(3, "drill", "script:script.toml")]
            assert client.signal_mark == found[0].mark > 10**18
            # The run has gone back and comes to the same boundary again.
            ask(client, 2)
            ask(client, 3)
            assert client.signals() == []
            # However soon one follows the other, the second is no repetition of the first.
            ask(client, 4)
            ask(client, 5)
            assert [signal.reason for signal in client.signals()] == ["again", "again"]
            assert not client.rejected
        finally:
            client.close()


def test_a_policy_is_heard_between_two_questions_over_its_restart_and_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "watching.py").write_text(WATCHER)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "level"
    file.write_text("2")

    def set_level(text: str) -> None:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(file)

    with EmbeddedPolicy("watching:Watcher", {"file": str(file)}, log_path=tmp_path / "log") as policy:
        policy.wait_ready()
        client = client_for(policy)
        try:
            assert client.signals() == []
            ask(client, 1)
            marks = [wait_for_level(client, 2).mark]
            set_level("4")
            marks.append(wait_for_level(client, 4).mark)
            assert client.signals() == []
            os.kill(policy.pid, signals_of_the_os.SIGKILL)
            end = time.monotonic() + WAIT_S
            while not policy.revive():
                assert time.monotonic() < end
                time.sleep(0.01)
            policy.wait_ready()
            ask(client, 2)
            # The new process knows nothing of the old one's marks, and its own are greater.
            marks.append(wait_for_level(client, 4).mark)
            assert marks == sorted(set(marks))
            assert client.signal_mark == marks[-1]
            second = client_for(policy, generation="h")
            second.signal_mark = client.signal_mark
            try:
                ask(second, 3)
                assert wait_for_level(second, 4).mark > marks[-1]
                assert not second.rejected
            finally:
                second.close()
            assert not client.rejected
        finally:
            client.close()
