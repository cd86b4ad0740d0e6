"""Telemetry packets: what goes out comes back equal; what is wrong is refused with its own code, on both sides."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_leyline_codec import names, texts, times
from tolaria.errors import MessageRejected
from tolaria.leyline import limits
from tolaria.leyline.codec import decode_telemetry, encode_telemetry
from tolaria.leyline.generated import leyline_pb2 as pb
from tolaria.leyline.types import HealthStatus, TelemetryLevel
from tolaria.leyline.types_telemetry import MetricPoint, SystemHealth, TelemetryEvent, TelemetryPacket, TraceSpan

attributes = st.dictionaries(names, texts, max_size=3)
levels = st.sampled_from(TelemetryLevel)
points = st.builds(
    MetricPoint, name=names, value=st.floats(allow_nan=False), unit=texts, attributes=attributes
)  # fmt: skip
events = st.builds(TelemetryEvent, event_id=names, description=texts, level=levels, attributes=attributes)
spans = st.builds(
    lambda start, length, **rest: TraceSpan(start_ns=start, end_ns=min(start + length, 2**63 - 1), **rest),
    start=times, length=times, span_id=names, parent_span_id=st.just("") | names, name=names, attributes=attributes,
)  # fmt: skip
health = st.builds(SystemHealth, status=st.sampled_from(HealthStatus), summary=texts, indicators=attributes)
packets = st.builds(
    TelemetryPacket,
    packet_id=names,
    timestamp_ns=times,
    level=levels,
    metrics=st.lists(points, max_size=4).map(tuple),
    events=st.lists(events, max_size=2).map(tuple),
    spans=st.lists(spans, max_size=3).map(tuple),
    health=st.none() | health,
    source_subsystem=st.just("") | names,
)
EVENT = TelemetryEvent(event_id="e", description="halted", level=TelemetryLevel.CRITICAL)
SPAN = TraceSpan(span_id="s", name="boundary", start_ns=1, end_ns=2)
PACKET = TelemetryPacket(
    packet_id="run.1.7", timestamp_ns=5, level=TelemetryLevel.CRITICAL, metrics=(MetricPoint(name="m", value=1.0),),
    events=(EVENT,), spans=(SPAN,), health=SystemHealth(status=HealthStatus.CRITICAL),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(packets)
def test_a_packet_comes_back_as_it_was(packet: TelemetryPacket) -> None:
    assert decode_telemetry(encode_telemetry(packet)) == packet


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 0.1])
def test_any_number_a_loss_can_be_is_carried_exactly(value: float) -> None:
    packet = replace(PACKET, metrics=(MetricPoint(name="train_loss", value=value),))
    (point,) = decode_telemetry(encode_telemetry(packet)).metrics
    assert point.value == value or (math.isnan(value) and math.isnan(point.value))


LONG = "x" * (limits.MAX_TELEMETRY_CHARS + 1)
POINT = PACKET.metrics[0]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({"packet_id": ""}, "text"),
    "time before 1970": ({"timestamp_ns": -1}, "range"),
    "level that is none": ({"level": 2}, "type"),
    "too many metrics": ({"metrics": (POINT,) * (limits.MAX_METRIC_POINTS + 1)}, "count"),
    "metric without a name": ({"metrics": (replace(POINT, name=""),)}, "text"),
    "metric that is text": ({"metrics": (replace(POINT, value="1"),)}, "type"),
    "metric that is true": ({"metrics": (replace(POINT, value=True),)}, "type"),
    "unit that steers a terminal": ({"metrics": (replace(POINT, unit="\x1b[31m"),)}, "text"),
    "attributes that are a list": ({"metrics": (replace(POINT, attributes=["a"]),)}, "type"),
    "too many attributes": ({"metrics": (replace(POINT, attributes={f"a{n}": "" for n in range(65)}),)}, "count"),
    "too many events": ({"events": (EVENT,) * (limits.MAX_TELEMETRY_EVENTS + 1)}, "count"),
    "description too long": ({"events": (replace(EVENT, description=LONG),)}, "text"),
    "event without a level": ({"events": (replace(EVENT, level=0),)}, "type"),
    "span that ends before it begins": ({"spans": (replace(SPAN, end_ns=0),)}, "range"),
    "span without a name": ({"spans": (replace(SPAN, name=""),)}, "text"),
    "too many spans": ({"spans": (SPAN,) * (limits.MAX_SPANS + 1)}, "count"),
    "health that is none": ({"health": SystemHealth(status=9)}, "type"),  # type: ignore[arg-type]
    "indicator that is a number": ({"health": SystemHealth(status=HealthStatus.HEALTHY, indicators={"a": 1})}, "type"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize(("change", "code"), WRONG.values(), ids=WRONG.keys())
def test_a_run_can_not_send_what_a_subscriber_would_refuse(change: dict[str, Any], code: str) -> None:
    with pytest.raises(MessageRejected) as caught:
        encode_telemetry(replace(PACKET, **change))
    assert caught.value.code == code


EDITS: dict[str, tuple[Callable[[Any], object], str]] = {
    "unknown level": (lambda w: setattr(w, "level", 77), "enum"),
    "no level": (lambda w: w.ClearField("level"), "enum"),
    "unknown health": (lambda w: setattr(w.system_health, "status", 0), "enum"),
    "event of an unknown level": (lambda w: setattr(w.events[0], "level", 9), "enum"),
    "time of a billion nanoseconds": (lambda w: setattr(w.timestamp, "nanos", 10**9), "range"),
    "span that ends before it begins": (lambda w: setattr(w.spans[0].end_time, "nanos", 0), "range"),
    "name with a line break": (lambda w: setattr(w.metrics[0], "name", "a\nb"), "text"),
    "too many spans": (lambda w: w.spans.extend([w.spans[0]] * limits.MAX_SPANS), "count"),
}


@pytest.mark.parametrize(("edit", "code"), EDITS.values(), ids=EDITS.keys())
def test_a_wrong_packet_is_refused(edit: Callable[[Any], object], code: str) -> None:
    wire = pb.TelemetryPacket.FromString(encode_telemetry(PACKET))
    edit(wire)
    with pytest.raises(MessageRejected) as caught:
        decode_telemetry(wire.SerializeToString())
    assert caught.value.code == code


@settings(max_examples=150, deadline=None)
@given(packets, st.data())
def test_damaged_bytes_give_a_packet_or_a_refusal_and_nothing_else(
    packet: TelemetryPacket, data: st.DataObject
) -> None:
    raw = bytearray(encode_telemetry(packet))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MessageRejected):
        assert isinstance(decode_telemetry(bytes(raw)), TelemetryPacket)
