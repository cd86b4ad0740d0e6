"""The client against real ZeroMQ peers that are silent, late, confused or hostile."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.errors import ConfigError, MessageRejected, PolicyUnavailable
from tolaria.leyline.codec import ReceivedReply, encode_reply, encode_signal
from tolaria.leyline.framing import (
    FrameHeader,
    FrameKind,
    KeyRing,
    open_frame,
    reply_header,
    seal,
    signal_header,
)
from tolaria.leyline.types import (
    EmergencyLevel,
    EmergencySignal,
    HardwareContext,
    PolicyReply,
    PolicyRequest,
    SystemState,
)
from tolaria.tamiyo import transport as transport_module
from tolaria.tamiyo.client import MAX_EXAMINED_FRAMES, MAX_EXAMINED_SIGNALS, PolicyClient
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.transport import Accept, DealerTransport, T

KEYS = KeyRing([bytes(range(32))])
OTHER_KEYS = KeyRing([bytes(range(100, 132))])
RESEND_MS = 150
DEADLINE_MS = 400
# A deadline is kept when the wait ends soon after it, also on a machine whose cores are busy.
SLACK_S = 1.0


def request(boundary: int = 1, loss: float = 0.5) -> PolicyRequest:
    state = SystemState(
        packet_id=f"packet-{boundary}", current_epoch=boundary, global_step=10 * boundary, validation_accuracy=0.5,
        validation_loss=loss, training_loss=0.6, timestamp_ns=1, training_run_id="run", experiment_name="test",
        hardware=HardwareContext(device_type="cpu"),
    )  # fmt: skip
    return PolicyRequest(state=state)


def answer(frame: bytes, version: str = "good", keys: KeyRing = KEYS, **changes: object) -> bytes:
    """A reply to a request frame; ``changes`` go into its header."""
    header = open_frame(frame, KEYS, FrameKind.REQUEST).header
    changed: FrameHeader = replace(reply_header(header, seq=1, wall_ns=1), **changes)  # type: ignore[arg-type]
    return seal(changed, encode_reply(PolicyReply(policy_version=version)), keys)


def signal(frame: bytes, mark: int, level: int = 3, keys: KeyRing = KEYS) -> bytes:
    """An emergency for the run that sent a request frame."""
    header = open_frame(frame, KEYS, FrameKind.REQUEST).header
    raised = EmergencySignal(level=EmergencyLevel(level), reason=f"number {mark}")
    return seal(signal_header(header, mark=mark, wall_ns=1), encode_signal(raised), keys)


Behaviour = Callable[["Peer", bytes, bytes], None]


class Peer(threading.Thread):
    """A ROUTER in a thread of its own that does what a test tells it to on each request."""

    def __init__(self, url: str, behave: Behaviour) -> None:
        super().__init__()
        self.behave = behave
        self.requests: list[bytes] = []
        self.error: Exception | None = None
        self._stopped = threading.Event()
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.bind(url)
        self.url = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, receiver: bytes, *parts: bytes) -> None:
        self.socket.send_multipart([receiver, *parts])

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                if self.socket.poll(20):
                    sender, frame = self.socket.recv_multipart()
                    self.requests.append(frame)
                    self.behave(self, sender, frame)
        except (zmq.ZMQError, AssertionError, MessageRejected, ValueError) as error:  # told to the test by stop()
            self.error = error
        finally:
            self.socket.close(linger=0)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        self._context.term()
        if self.error is not None:
            raise self.error


StartPeer = Callable[[Behaviour], Peer]


@pytest.fixture
def start_peer(tmp_path: Path) -> Iterator[StartPeer]:
    peers = []

    def start(behave: Behaviour) -> Peer:
        peers.append(Peer(f"ipc://{tmp_path}/{len(peers)}", behave))
        peers[-1].start()
        return peers[-1]

    yield start
    for peer in peers:
        peer.stop()


MakeClient = Callable[..., PolicyClient]


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    clients = []

    def make(url: str, run_id: str = "run", generation: str = "start-1") -> PolicyClient:
        transport = DealerTransport(parse_endpoint(url, "tamiyo.endpoint"))
        clients.append(PolicyClient(transport, KEYS, run_id=run_id, generation=generation, resend_ms=RESEND_MS))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def refusal(client: PolicyClient, boundary: int = 1, deadline_ms: int = DEADLINE_MS) -> str:
    """The code with which a question fails, after a wait that must not exceed its deadline."""
    started = time.monotonic()
    with pytest.raises(PolicyUnavailable) as caught:
        client.ask(request(boundary), boundary=boundary, deadline_ms=deadline_ms)
    assert time.monotonic() - started < deadline_ms / 1000 + SLACK_S
    return caught.value.code


def good(client: PolicyClient, boundary: int = 1) -> str:
    return client.ask(request(boundary), boundary=boundary, deadline_ms=5000).policy_version


def test_an_answer_is_accepted(start_peer: StartPeer, make_client: MakeClient) -> None:
    peer = start_peer(lambda peer, sender, frame: peer.send(sender, answer(frame, version="v7")))
    client = make_client(peer.url)
    assert [good(client, boundary) for boundary in (1, 2, 3)] == ["v7"] * 3
    assert not client.rejected
    assert len(peer.requests) == 3


def test_a_silent_peer_costs_the_deadline_and_is_asked_twice_with_the_same_bytes(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    peer = start_peer(lambda peer, sender, frame: None)
    started = time.monotonic()
    assert refusal(make_client(peer.url)) == "timeout"
    assert time.monotonic() - started >= DEADLINE_MS / 1000
    assert len(peer.requests) == 2
    assert peer.requests[0] == peer.requests[1]


def test_without_a_peer_the_wait_ends_at_the_deadline(tmp_path: Path, make_client: MakeClient) -> None:
    client = make_client(f"ipc://{tmp_path}/nobody")
    assert refusal(client) == "timeout"
    assert refusal(client, boundary=2) == "timeout"


def test_a_peer_that_comes_up_within_the_wait_is_asked_once(
    tmp_path: Path, start_peer: StartPeer, make_client: MakeClient
) -> None:
    client, peers = make_client(f"ipc://{tmp_path}/0"), []
    # Later than the resend: nothing is queued for a peer that is not there.
    late = threading.Timer(
        0.5, lambda: peers.append(start_peer(lambda peer, sender, frame: peer.send(sender, answer(frame))))
    )
    late.start()
    assert good(client) == "good"
    late.join()
    assert good(client, 2) == "good"
    assert len(peers[0].requests) == 2


def test_a_lost_question_is_answered_when_it_comes_again(start_peer: StartPeer, make_client: MakeClient) -> None:
    def second_only(peer: Peer, sender: bytes, frame: bytes) -> None:
        if len(peer.requests) == 2:
            peer.send(sender, answer(frame))

    peer = start_peer(second_only)
    assert good(make_client(peer.url)) == "good"
    assert peer.requests[0] == peer.requests[1]


def test_a_late_reply_never_answers_the_next_question(start_peer: StartPeer, make_client: MakeClient) -> None:
    def one_behind(peer: Peer, sender: bytes, frame: bytes) -> None:
        if len(peer.requests) > 2:
            peer.send(sender, answer(peer.requests[0], version="late"))
            peer.send(sender, answer(frame, version="fresh"))

    client = make_client(start_peer(one_behind).url)
    assert refusal(client) == "timeout"
    assert good(client, boundary=2) == "fresh"
    assert client.rejected == {"boundary": 1}


def test_after_a_failure_nothing_comes_through_the_old_connection(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    senders = []

    def to_the_old_connection_first(peer: Peer, sender: bytes, frame: bytes) -> None:
        senders.append(sender)
        if len(senders) > 2:
            peer.send(senders[0], answer(peer.requests[0]))
            peer.send(sender, answer(frame))

    client = make_client(start_peer(to_the_old_connection_first).url)
    assert refusal(client) == "timeout"
    assert good(client, boundary=2) == "good"
    assert senders[0] == senders[1] != senders[2]
    assert not client.rejected


def test_a_duplicate_reply_never_answers_the_next_question(start_peer: StartPeer, make_client: MakeClient) -> None:
    def twice(peer: Peer, sender: bytes, frame: bytes) -> None:
        reply = answer(frame, version=f"answer-{len(peer.requests)}")
        peer.send(sender, reply)
        peer.send(sender, reply)

    client = make_client(start_peer(twice).url)
    assert [good(client, boundary) for boundary in (1, 2)] == ["answer-1", "answer-2"]
    assert client.rejected == {"boundary": 1}


def test_the_reply_to_an_earlier_question_of_the_same_boundary_is_refused(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    client = make_client(start_peer(lambda peer, s, frame: peer.send(s, answer(peer.requests[0]))).url)
    assert good(client, boundary=5) == "good"
    assert refusal(client, boundary=5) == "timeout"
    assert client.rejected == {"correlation": 2}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"run_id": b"r" * 16}, "run"),
        ({"generation": 7}, "generation"),
        ({"boundary": 9}, "boundary"),
        ({"corr_id": b"c" * 16}, "correlation"),
        ({"request_sha256": b"s" * 32}, "request_digest"),
    ],
)
def test_a_signed_reply_to_anything_but_this_question_is_refused(
    change: dict[str, object], code: str, start_peer: StartPeer, make_client: MakeClient
) -> None:
    def wrong_then_right(peer: Peer, sender: bytes, frame: bytes) -> None:
        peer.send(sender, answer(frame, version="wrong", **change))
        peer.send(sender, answer(frame, version="right"))

    client = make_client(start_peer(wrong_then_right).url)
    assert good(client) == "right"
    assert client.rejected == {code: 1}


@pytest.mark.parametrize(
    ("forge", "code"),
    [
        (lambda frame: answer(frame, keys=OTHER_KEYS), "unknown_key"),
        (lambda frame: frame, "mac"),
        (lambda frame: answer(frame)[:-1] + b"\0", "mac"),
        (lambda frame: answer(frame)[:-33] + b"\1" + answer(frame)[-32:], "mac"),
        (lambda frame: answer(frame) + b"more", "mac"),
    ],
    ids=["another key", "reflected", "mac altered", "payload altered", "lengthened"],
)
def test_a_forged_reply_is_refused_and_alarms(
    forge: Callable[[bytes], bytes], code: str, start_peer: StartPeer, make_client: MakeClient
) -> None:
    client = make_client(start_peer(lambda peer, sender, frame: peer.send(sender, forge(frame))).url)
    assert refusal(client) == "auth"
    assert client.rejected == {code: 2}


def test_junk_before_the_answer_does_not_end_the_wait(start_peer: StartPeer, make_client: MakeClient) -> None:
    junk = [b"", b"\0", b"TLY1" * 40, bytes(60_000)]

    def junk_first(peer: Peer, sender: bytes, frame: bytes) -> None:
        for piece in [*junk, answer(frame)[:100], answer(frame, keys=OTHER_KEYS)]:
            peer.send(sender, piece)
        peer.send(sender, answer(frame))

    client = make_client(start_peer(junk_first).url)
    assert good(client) == "good"
    assert sum(client.rejected.values()) == len(junk) + 2


def test_an_oversized_frame_is_dropped_with_its_connection_and_the_answer_still_comes(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    def big_first(peer: Peer, sender: bytes, frame: bytes) -> None:
        if len(peer.requests) == 1:
            peer.send(sender, bytes(10_000_000))
        else:
            peer.send(sender, answer(frame))

    peer = start_peer(big_first)
    assert good(make_client(peer.url)) == "good"
    assert len(peer.requests) == 2


def test_the_answer_is_found_in_a_flood_of_junk_that_is_hardly_looked_at(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    flood = 5000

    def flood_first(peer: Peer, sender: bytes, frame: bytes) -> None:
        foreign = answer(frame, corr_id=b"x" * 16, keys=OTHER_KEYS)
        for _ in range(flood):
            peer.send(sender, foreign)
        peer.send(sender, answer(frame))

    client = make_client(start_peer(flood_first).url)
    assert good(client) == "good"
    assert client.rejected == {"unknown_key": MAX_EXAMINED_FRAMES, "unread": flood - MAX_EXAMINED_FRAMES}


def test_a_flood_that_knows_the_question_ends_it(start_peer: StartPeer, make_client: MakeClient) -> None:
    def false_answers(peer: Peer, sender: bytes, frame: bytes) -> None:
        for _ in range(500):
            peer.send(sender, answer(frame, keys=OTHER_KEYS))

    client = make_client(start_peer(false_answers).url)
    assert refusal(client, deadline_ms=5000) == "flood"
    assert client.rejected == {"unknown_key": MAX_EXAMINED_FRAMES}


def test_more_frames_than_are_ever_read_for_one_answer_end_it(
    start_peer: StartPeer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "MAX_RECEIVED_FRAMES", 200)

    def endless(peer: Peer, sender: bytes, frame: bytes) -> None:
        for _ in range(1000):
            peer.send(sender, b"junk")

    assert refusal(make_client(start_peer(endless).url), deadline_ms=5000) == "flood"


def test_messages_of_several_parts_are_dropped_whole(start_peer: StartPeer, make_client: MakeClient) -> None:
    def parts_first(peer: Peer, sender: bytes, frame: bytes) -> None:
        reply = answer(frame, version="in parts")
        peer.send(sender, reply, b"")
        peer.send(sender, b"", reply)
        peer.send(sender, *[bytes(50_000)] * 500)
        peer.send(sender, answer(frame, version="single"))

    client = make_client(start_peer(parts_first).url)
    assert good(client) == "single"
    assert client.rejected == {"multipart": 3}


def test_a_message_that_never_ends_costs_the_deadline_and_not_the_next_question(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    senders = []

    def unfinished(peer: Peer, sender: bytes, frame: bytes) -> None:
        senders.append(sender)
        if len(senders) == 1:
            peer.socket.send(sender, zmq.SNDMORE)
            for _ in range(200):
                peer.socket.send(bytes(50_000), zmq.SNDMORE)
        elif sender != senders[0]:
            peer.socket.send(b"the end")
            peer.send(sender, answer(frame))

    client = make_client(start_peer(unfinished).url)
    assert refusal(client) == "timeout"
    assert good(client, boundary=2) == "good"
    assert len(senders) == 3
    assert not client.rejected


def test_a_signed_but_malformed_reply_ends_the_wait_at_once(start_peer: StartPeer, make_client: MakeClient) -> None:
    def malformed(peer: Peer, sender: bytes, frame: bytes) -> None:
        header = open_frame(frame, KEYS, FrameKind.REQUEST).header
        peer.send(sender, seal(reply_header(header, seq=1, wall_ns=1), b"\xff\xff\xff", KEYS))

    client = make_client(start_peer(malformed).url)
    started = time.monotonic()
    assert refusal(client, deadline_ms=20_000) == "schema"
    assert time.monotonic() - started < 10
    assert sum(client.rejected.values()) == 1


def test_a_state_that_cannot_be_sent_is_said_so_and_nothing_is_sent(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    peer = start_peer(lambda peer, sender, frame: peer.send(sender, answer(frame)))
    client = make_client(peer.url)
    with pytest.raises(PolicyUnavailable, match="validation_loss") as caught:
        client.ask(request(loss=float("nan")), boundary=1, deadline_ms=DEADLINE_MS)
    assert caught.value.code == "request"
    assert good(client) == "good"
    assert len(peer.requests) == 1


def drained(client: PolicyClient, done: Callable[[], bool]) -> list[int]:
    """The marks of what `signals` gives until ``done()``."""
    marks: list[int] = []
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        marks += [found.mark for found in client.signals()]
        time.sleep(0.002)
    return marks


def test_signals_before_an_answer_are_handed_out_after_it(start_peer: StartPeer, make_client: MakeClient) -> None:
    def alarmed(peer: Peer, sender: bytes, frame: bytes) -> None:
        for mark in (1, 2, 2, 3):
            peer.send(sender, signal(frame, mark))
        peer.send(sender, answer(frame))

    client = make_client(start_peer(alarmed).url)
    assert client.signals() == []
    assert good(client) == "good"
    assert client.signal_mark == 3
    assert [(found.mark, found.reason) for found in client.signals()] == [(n, f"number {n}") for n in (1, 2, 3)]
    assert client.signals() == []
    assert client.rejected == {"replayed": 1}


def test_signals_come_without_a_question_and_those_seen_by_an_earlier_start_do_not(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    def alarmed_later(peer: Peer, sender: bytes, frame: bytes) -> None:
        peer.send(sender, answer(frame))
        for mark in (5, 8, 9):
            peer.send(sender, signal(frame, mark))

    client = make_client(start_peer(alarmed_later).url)
    client.signal_mark = 8
    assert good(client) == "good"
    assert drained(client, lambda: client.signal_mark == 9 and client.rejected.total() == 2) == [9]
    assert client.rejected == {"replayed": 2}


def test_signals_never_prolong_a_question(start_peer: StartPeer, make_client: MakeClient) -> None:
    stop = threading.Event()

    def alarms_only(peer: Peer, sender: bytes, frame: bytes) -> None:
        mark = 1000 * len(peer.requests)
        while not peer.socket.poll(5) and not stop.is_set():
            peer.send(sender, signal(frame, mark := mark + 1, level=1))

    client = make_client(start_peer(alarms_only).url)
    assert refusal(client) == "timeout"
    stop.set()
    assert client.signals()
    assert client.signal_mark > 1000


def test_a_flood_of_false_signals_hides_neither_the_answer_nor_uses_up_what_is_examined_for_it(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    flood = 3000

    def flood_first(peer: Peer, sender: bytes, frame: bytes) -> None:
        if len(peer.requests) > 1:
            return  # asked again, on a busy machine: another flood would be counted too
        false = signal(frame, 1, keys=OTHER_KEYS)
        for number in range(flood):
            peer.send(sender, false)
            if number == MAX_EXAMINED_FRAMES + 5:
                peer.send(sender, signal(frame, 1, level=4))
        for _ in range(MAX_EXAMINED_FRAMES):
            peer.send(sender, answer(frame, corr_id=b"x" * 16))
        peer.send(sender, answer(frame))

    client = make_client(start_peer(flood_first).url)
    assert good(client) == "good"
    assert [int(found.level) for found in client.signals()] == [4]
    # One of those examined was the true one.
    examined = MAX_EXAMINED_SIGNALS - 1
    assert client.rejected == {
        "unknown_key": examined, "unread": flood - examined, "correlation": MAX_EXAMINED_FRAMES,
    }  # fmt: skip


def test_a_signal_with_the_questions_id_is_still_no_answer(start_peer: StartPeer, make_client: MakeClient) -> None:
    def as_an_answer(peer: Peer, sender: bytes, frame: bytes) -> None:
        peer.send(sender, answer(frame, kind=FrameKind.SIGNAL))
        peer.send(sender, answer(frame, version="true"))

    client = make_client(start_peer(as_an_answer).url)
    assert good(client) == "true"
    assert client.signals() == []
    assert client.rejected.total() == 1


def test_what_comes_between_questions_and_is_no_signal_is_counted_and_dropped(
    start_peer: StartPeer, make_client: MakeClient
) -> None:
    def twice(peer: Peer, sender: bytes, frame: bytes) -> None:
        peer.send(sender, answer(frame))
        peer.send(sender, answer(frame))
        peer.send(sender, b"junk")
        peer.send(sender, signal(frame, 1), b"")
        peer.send(sender, signal(frame, 2)[:-1])
        peer.send(sender, signal(frame, 3))

    client = make_client(start_peer(twice).url)
    assert good(client) == "good"
    assert drained(client, lambda: client.signal_mark == 3) == [3]
    assert client.rejected == {"unasked": 2, "multipart": 1, "mac": 1}
    assert good(client, boundary=2) == "good"


def test_one_look_reads_only_so_much_and_loses_nothing(
    start_peer: StartPeer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 400

    def flood(peer: Peer, sender: bytes, frame: bytes) -> None:
        peer.send(sender, answer(frame))
        for mark in range(1, many + 1):
            peer.send(sender, signal(frame, mark))

    client = make_client(start_peer(flood).url)
    assert good(client) == "good"
    # As if each frame took as long as one look may take.
    clock = iter(number * transport_module.RECEIVE_S for number in range(10**9))
    monkeypatch.setattr(transport_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    marks: list[int] = []
    for _ in range(10**6):
        found = client.signals()
        assert len(found) <= 1
        marks += [signal.mark for signal in found]
        if len(marks) == many:
            break
    assert marks == list(range(1, many + 1))
    assert not client.rejected


def test_a_connection_that_floods_between_questions_is_given_up(
    start_peer: StartPeer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "MAX_RECEIVED_BYTES", 1_000_000)

    def endless_parts(peer: Peer, sender: bytes, frame: bytes) -> None:
        peer.send(sender, answer(frame))
        if len(peer.requests) == 1:
            peer.send(sender, *[bytes(50_000)] * 100)

    client = make_client(start_peer(endless_parts).url)
    assert good(client) == "good"
    assert drained(client, lambda: client.rejected.total() > 0) == []
    assert client.rejected == {"flood": 1}
    assert client.signals() == []
    assert good(client, boundary=2) == "good"


class CannedTransport:
    """Hands over given frames, as a socket would."""

    def __init__(self, frames: Callable[[bytes], list[bytes | None]]) -> None:
        self._frames = frames

    def exchange(self, request: bytes, accept: Accept[T], *, deadline_s: float, resend_s: float) -> T:
        for frame in self._frames(request):
            accepted = accept(frame)
            if accepted is not None:
                return accepted
        raise PolicyUnavailable("timeout", "nothing more")

    def receive(self, take: Callable[[bytes | None], None]) -> None:
        for frame in self._frames(b""):
            take(frame)

    def close(self) -> None:
        return


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.none(), st.binary(max_size=300)), max_size=80))
def test_nothing_that_comes_in_raises_anything_but_unavailable(frames: list[bytes | None]) -> None:
    client = PolicyClient(CannedTransport(lambda _: frames), KEYS, run_id="run", generation="g", resend_ms=1)
    with pytest.raises(PolicyUnavailable):
        client.ask(request(), boundary=1, deadline_ms=1)
    assert sum(client.rejected.values()) == len(frames)
    assert client.signals() == []
    assert sum(client.rejected.values()) == 2 * len(frames)


def test_no_single_altered_byte_is_accepted() -> None:
    def altered(frame: bytes) -> list[bytes | None]:
        reply = answer(frame)
        return [reply[:at] + bytes([reply[at] ^ 1]) + reply[at + 1 :] for at in positions]

    size = 0

    def whole(frame: bytes) -> list[bytes | None]:
        nonlocal size
        size = len(answer(frame))
        return [answer(frame)]

    def client(frames: Callable[[bytes], list[bytes | None]]) -> PolicyClient:
        return PolicyClient(CannedTransport(frames), KEYS, run_id="run", generation="g", resend_ms=1)

    assert client(whole).ask(request(), boundary=1, deadline_ms=1) == ReceivedReply(policy_version="good")
    for start in range(0, size, MAX_EXAMINED_FRAMES):
        positions = range(start, min(start + MAX_EXAMINED_FRAMES, size))
        asked = client(altered)
        with pytest.raises(PolicyUnavailable):
            asked.ask(request(), boundary=1, deadline_ms=1)
        assert sum(asked.rejected.values()) == len(positions)


@pytest.mark.parametrize(
    ("url", "leaves_host"),
    [
        ("ipc:///tmp/x.sock", False),
        ("tcp://127.0.0.1:5000", False),
        ("tcp://127.8.8.8:*", False),
        ("tcp://localhost:5000", False),
        ("tcp://[::1]:5000", False),
        ("tcp://10.0.0.7:5000", True),
        ("tcp://0.0.0.0:5000", True),
        ("tcp://*:5000", True),
        ("tcp://[::]:5000", True),
        ("tcp://eth0:5000", True),
        ("tcp://policy.example:5000", True),
        ("tcp://localhost.example:5000", True),
        ("tcp://127.0.0.1.example:5000", True),
        ("tcp://2130706433:5000", True),
    ],
)
def test_only_certain_loopback_endpoints_need_no_curve(url: str, leaves_host: bool) -> None:
    endpoint = parse_endpoint(url, "tamiyo.endpoint")
    assert endpoint.leaves_host is leaves_host
    if leaves_host:
        with pytest.raises(ConfigError, match="CURVE"):
            DealerTransport(endpoint)
    else:
        DealerTransport(endpoint).close()


@pytest.mark.parametrize(
    "url",
    [
        "", "ipc://", "ipc://@abstract", "ipc://*", "ipc:///" + "x" * 107, "tcp://127.0.0.1", "tcp://:5000",
        "tcp://127.0.0.1:99999", "tcp://127.0.0.1:-1", "tcp://10.0.0.1:1;127.0.0.1:5000", "inproc://x", "udp://1:1",
        "pgm://x", "ws://127.0.0.1:80", "127.0.0.1:5000",
    ],
)  # fmt: skip
def test_other_endpoints_are_refused_with_the_key(url: str) -> None:
    with pytest.raises(ConfigError, match=r"tamiyo\.endpoint"):
        parse_endpoint(url, "tamiyo.endpoint")
