"""Packets of a run, over real sockets: what they say, that their numbers add up, and who is never waited for."""

import contextlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.unit.test_sinks import BOUNDARY_FIELDS, STEP_FIELDS, Told, record
from tolaria.errors import ConfigError
from tolaria.leyline.codec import decode_telemetry, encode_telemetry
from tolaria.leyline.types import HealthStatus, TelemetryLevel
from tolaria.publish import publisher as publisher_module
from tolaria.publish.packets import PacketMaker, sequence_of
from tolaria.publish.publisher import Publisher
from tolaria.publish.subscriber import Subscriber
from tolaria.telemetry.events import Level
from tolaria.telemetry.sinks.fan import Fan

ROOT = Path(__file__).parents[2]


def maker() -> PacketMaker:
    return PacketMaker("ab12", "0f")


# What packets say


def test_a_steps_packet_has_its_numbers_with_unit_and_where_the_run_is() -> None:
    packet = maker().make(record("step", 7, branch=2, **STEP_FIELDS))
    assert sequence_of(packet.packet_id) == ("ab12.0f", 7)
    numbers = {(m.name, *m.attributes.values()): (m.value, m.unit) for m in packet.metrics}
    assert numbers["step_seconds",] == (0.02, "s") and numbers["learning_rate", "mid"] == (1e-4, "")
    assert packet.level is TelemetryLevel.INFO and packet.events == () and packet.health is not None
    assert packet.health.status is HealthStatus.HEALTHY
    assert packet.health.indicators == {
        "run_id": "ab12", "step": "10", "branch": "2", "mode": "normal", "emergency_level": "0"
    }  # fmt: skip
    assert decode_telemetry(encode_telemetry(packet)) == packet


def test_a_boundarys_packet_has_all_of_it_and_its_parts_as_spans() -> None:
    packet = maker().make(record("boundary", **BOUNDARY_FIELDS))
    whole, *parts = packet.spans
    assert (whole.name, whole.end_ns - whole.start_ns, whole.end_ns) == ("boundary", 24_000_000, packet.timestamp_ns)
    assert [(span.name, span.end_ns - span.start_ns) for span in parts] == [
        ("packet", 1_500_000), ("validation", 20_000_000)
    ]  # fmt: skip
    assert parts[0].start_ns == whole.start_ns and parts[1].start_ns == parts[0].end_ns
    assert {span.parent_span_id for span in parts} == {whole.span_id}
    (event,) = packet.events
    assert event.attributes["boundary"] == "3" and event.attributes["mode"] == "conservative"
    assert len(packet.metrics) == 14 and packet.health is not None
    assert packet.health.status is HealthStatus.DEGRADED
    assert decode_telemetry(encode_telemetry(packet)).spans == packet.spans


def test_an_event_keeps_its_level_its_words_and_its_fields() -> None:
    fields: dict[str, Any] = {
        "reason": "loss 14\n\x1b[31mred",
        "milliseconds": {"copy": 1.5},
        "to_step": 5,
        "why": "x" * 9999,
    }
    packet = maker().make(record("went_back", level="warning", rank=3, **fields))
    (event,) = packet.events
    assert event.description == "went back: loss 14  [31mred" and event.level is packet.level is TelemetryLevel.WARNING
    assert event.attributes["milliseconds"] == '{"copy": 1.5}' and event.attributes["to_step"] == "5"
    assert event.attributes["rank"] == "3" and event.attributes["why"].endswith("...")
    assert decode_telemetry(encode_telemetry(packet)).events == packet.events


def test_health_follows_mode_and_emergencies() -> None:
    made, seen = maker(), []
    for happened in (
        record("mode_changed", level="warning", mode="conservative", reason="policy is silent"),
        record("incident", level="error", emergency_level=3, reason="NaN"),
        record("incident", level="error", rank=1, emergency_level=4, reason="another rank's"),
        record("halted", level="critical", reason="operator"),
        record("halt_cleared", reason="operator"),
        record("boundary", **{**BOUNDARY_FIELDS, "mode": "normal"}),
        record("run_failed", level="critical", reason="disk"),
    ):
        health = made.make(happened).health
        assert health is not None
        seen.append((health.status.name, health.summary))
    assert seen == [
        ("DEGRADED", "policy is silent"), ("UNHEALTHY", "NaN"), ("UNHEALTHY", "NaN"), ("CRITICAL", "operator"),
        ("DEGRADED", "operator"), ("HEALTHY", ""), ("CRITICAL", "disk"),
    ]  # fmt: skip


# Over sockets


@pytest.fixture
def opened() -> Iterator[Callable[..., tuple[Fan, Publisher, Told]]]:
    """Makes a fan with a publisher on a free port."""
    fans: list[Fan] = []

    def make(queue: int = 1000) -> tuple[Fan, Publisher, Told]:
        sink, told = Publisher("tcp://127.0.0.1:*", maker(), queue_packets=queue), Told()
        fans.append(Fan([sink], queue_records=100_000, tell=told))
        return fans[-1], sink, told

    yield make
    for fan in fans:
        fan.close()


def put(fan: Fan, kind: str = "step", level: Level = "info", **fields: Any) -> None:
    fan.put(kind, level, fields, rank=0, step=1, branch=0, wall_ns=time.time_ns())


def connected(fan: Fan, subscriber: Subscriber) -> None:
    """Until the subscriber is being served."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        put(fan, **STEP_FIELDS)
        if subscriber.receive(0.3) is not None:
            while subscriber.receive(0.3) is not None:
                pass
            return
    raise AssertionError("no packet within 10 s")


def test_every_packet_arrives_once_and_in_order(opened: Callable[..., tuple[Fan, Publisher, Told]]) -> None:
    fan, sink, _ = opened()
    with Subscriber(sink.where) as subscriber:
        connected(fan, subscriber)
        for _ in range(200):
            put(fan, **STEP_FIELDS)
        put(fan, "halted", "critical", reason="operator")
        packets = [packet for _ in range(201) if (packet := subscriber.receive(5.0)) is not None]
        numbers = [sequence_of(packet.packet_id)[1] for packet in packets]
        assert numbers == list(range(numbers[0], numbers[0] + 201))
        assert packets[-1].level is TelemetryLevel.CRITICAL
        assert (subscriber.missed, subscriber.refused, fan.lost) == (0, 0, {"publish": 0})


def test_a_subscriber_may_want_only_what_is_grave(opened: Callable[..., tuple[Fan, Publisher, Told]]) -> None:
    fan, sink, _ = opened()
    with Subscriber(sink.where) as all_of_it, Subscriber(sink.where, levels=[TelemetryLevel.CRITICAL]) as grave:
        connected(fan, all_of_it)
        put(fan, **STEP_FIELDS)
        put(fan, "halted", "critical")
        packet = grave.receive(5.0)
        assert packet is not None and packet.events[0].attributes["kind"] == "halted"


STOPPED = """
import sys, time
from tolaria.publish.subscriber import Subscriber
with Subscriber(sys.argv[1], queue_packets=10) as subscriber:
    got = 0
    while True:
        packet = subscriber.receive(1.0)
        if packet is None:
            continue
        got += 1
        kind = packet.events[0].attributes["kind"] if packet.events else "step"
        print(kind, packet.packet_id, got, subscriber.missed, flush=True)
        if kind == "run_ended":
            break
"""


@contextlib.contextmanager
def stopped_child(endpoint: str) -> Iterator[subprocess.Popen[str]]:
    """A subscriber to be stopped; killed at the end whatever state it is in."""
    child = subprocess.Popen([sys.executable, "-c", STOPPED, endpoint], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with child:
        try:
            yield child
        finally:
            child.kill()


def test_what_is_critical_is_sent_again_ever_more_seldom_and_who_comes_late_has_it_once() -> None:
    now = [0.0]
    sink = Publisher("tcp://127.0.0.1:*", maker(), queue_packets=1000, clock=lambda: now[0])
    sink.write(record("halted", 5, "critical"))
    with Subscriber(sink.where) as late:
        times, got = list[float](), []
        while now[0] < 400:
            sink.write(record("step", 6 + int(now[0]), **STEP_FIELDS))
            due = sink._repeated[0].due
            sink.flush()
            if sink._repeated[0].due != due:
                times.append(now[0])
            now[0] += 1
            time.sleep(0.001)
        while (packet := late.receive(0.3)) is not None:
            got.append(packet)
        assert times == [1, 3, 7, 15, 31, 63, 123, 183, 243, 303, 363]
        assert [packet.level.name for packet in got].count("CRITICAL") == 1
        assert late.missed == 0
    sink.close()


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_a_stopped_subscriber_is_not_waited_for_and_still_gets_what_was_critical(
    opened: Callable[..., tuple[Fan, Publisher, Told]],
) -> None:
    fan, sink, told = opened(queue=50)
    with stopped_child(sink.where) as child, Subscriber(sink.where) as other:
        connected(fan, other)
        assert child.stdout is not None
        while not select.select([child.stdout], [], [], 0.1)[0]:
            put(fan, **STEP_FIELDS)
        child.send_signal(signal.SIGSTOP)
        wide = {"reason": "x" * 1000, **{f"more{n}": "y" * 1000 for n in range(8)}}
        for _ in range(2000):
            # More than the kernel's buffers and the queue of that subscriber hold.
            put(fan, "filler", **wide)
        for number in range(5):
            put(fan, "halted", "critical", number=number)
        critical = set[str]()
        while len(critical) < 5:
            packet = other.receive(10.0)
            assert packet is not None, "the other subscriber was held up"
            if packet.level is TelemetryLevel.CRITICAL:
                critical.add(packet.packet_id)
        assert fan.lost == {"publish": 0}
        child.send_signal(signal.SIGCONT)
        time.sleep(2 * publisher_module.AGAIN_AFTER_S)
        put(fan, "run_ended")
        lines = [line.split() for line in child.communicate(timeout=30)[0].splitlines()]
        again = [packet_id for kind, packet_id, *_ in lines if kind == "halted"]
        assert sorted(again) == sorted(critical)
        assert int(lines[-1][3]) > 0, "nothing was missed, so its queue was never full"
        first = sequence_of(lines[0][1])[1]
        assert int(lines[-1][2]) + int(lines[-1][3]) == fan._sequence - first + 1  # what came and what did not
        assert told.kinds == []


def test_what_is_no_packet_is_counted_and_passed_over() -> None:
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    packet = maker().make(record("halted", 1, "critical"))
    with Subscriber(f"tcp://127.0.0.1:{port}") as subscriber:
        end = time.monotonic() + 10
        while subscriber.refused < 3 and time.monotonic() < end:
            socket.send_multipart([b"INFO", b"\xff\xff"])
            socket.send_multipart([b"INFO"])
            socket.send_multipart([b"INFO", encode_telemetry(replace(packet, packet_id="nonumber"))])
            assert subscriber.receive(0.1) is None
        socket.send_multipart([b"CRITICAL", encode_telemetry(packet)])
        assert subscriber.receive(5.0) == packet
        socket.send_multipart([b"CRITICAL.AGAIN", encode_telemetry(packet)])
        assert subscriber.receive(0.2) is None
    socket.close(linger=0)
    context.term()


# Endpoints


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("tcp://10.0.0.7:5701", "telemetry is not encrypted; expected ipc://PATH or tcp://127.0.0.1:PORT"),
        ("tcp://*:5701", "telemetry is not encrypted"),
        ("tcp://127.0.0.1", "expected tcp://HOST:PORT"),
        ("ipc://@abstract", "expected the path of a socket file"),
        ("ipc:///nowhere/at/all.sock", "cannot bind"),
    ],
)
def test_an_endpoint_that_is_none_is_refused_in_one_line(endpoint: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Publisher(endpoint, maker(), queue_packets=10)
    assert str(caught.value).startswith("telemetry.publish=") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_endpoint_that_is_taken_is_refused(
    opened: Callable[..., tuple[Fan, Publisher, Told]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(publisher_module, "BIND_S", 0.1)
    _, sink, _ = opened()
    with pytest.raises(ConfigError, match=r"cannot bind \(Address already in use"):
        Publisher(sink.where, maker(), queue_packets=10)
    (tmp_path / "f").write_text("a file of the user's")
    with pytest.raises(ConfigError, match="exists and is not a socket"):
        Publisher(f"ipc://{tmp_path}/f", maker(), queue_packets=10)
    assert (tmp_path / "f").read_text() == "a file of the user's"
