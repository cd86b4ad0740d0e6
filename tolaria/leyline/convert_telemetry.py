"""Telemetry to generated messages and back, as `tolaria.leyline.convert` does with everything else."""

from typing import cast

from tolaria.leyline.convert import member, nanoseconds, timestamp
from tolaria.leyline.generated import leyline_pb2 as pb
from tolaria.leyline.types import HealthStatus, TelemetryLevel
from tolaria.leyline.types_telemetry import MetricPoint, SystemHealth, TelemetryEvent, TelemetryPacket, TraceSpan


def telemetry_to_wire(packet: TelemetryPacket) -> pb.TelemetryPacket:
    """The message of a checked packet."""
    health = packet.health
    return pb.TelemetryPacket(
        packet_id=packet.packet_id,
        timestamp=timestamp(packet.timestamp_ns),
        source_subsystem=packet.source_subsystem,
        level=cast(pb.TelemetryLevel, packet.level),
        metrics=[
            pb.MetricPoint(name=m.name, value=m.value, unit=m.unit, attributes=m.attributes) for m in packet.metrics
        ],
        events=[_event_to_wire(event) for event in packet.events],
        spans=[_span_to_wire(span) for span in packet.spans],
        system_health=None if health is None else pb.SystemHealth(
            status=cast(pb.HealthStatus, health.status), summary=health.summary, indicators=health.indicators
        ),
    )  # fmt: skip


def telemetry_from_wire(wire: pb.TelemetryPacket) -> TelemetryPacket:
    """The packet of a parsed message, values still unchecked."""
    return TelemetryPacket(
        packet_id=wire.packet_id,
        timestamp_ns=nanoseconds("TelemetryPacket.timestamp", wire.timestamp),
        source_subsystem=wire.source_subsystem,
        level=member("TelemetryPacket.level", TelemetryLevel, wire.level),
        metrics=tuple(
            MetricPoint(name=m.name, value=m.value, unit=m.unit, attributes=dict(m.attributes)) for m in wire.metrics
        ),
        events=tuple(_event_from_wire(event) for event in wire.events),
        spans=tuple(_span_from_wire(span) for span in wire.spans),
        health=_health_from_wire(wire.system_health) if wire.HasField("system_health") else None,
    )


def _event_to_wire(event: TelemetryEvent) -> pb.TelemetryEvent:
    return pb.TelemetryEvent(
        event_id=event.event_id,
        description=event.description,
        level=cast(pb.TelemetryLevel, event.level),
        attributes=event.attributes,
    )


def _event_from_wire(event: pb.TelemetryEvent) -> TelemetryEvent:
    return TelemetryEvent(
        event_id=event.event_id,
        description=event.description,
        level=member("TelemetryEvent.level", TelemetryLevel, event.level),
        attributes=dict(event.attributes),
    )


def _span_to_wire(span: TraceSpan) -> pb.TraceSpan:
    return pb.TraceSpan(
        span_id=span.span_id,
        parent_span_id=span.parent_span_id,
        name=span.name,
        start_time=timestamp(span.start_ns),
        end_time=timestamp(span.end_ns),
        attributes=span.attributes,
    )


def _span_from_wire(span: pb.TraceSpan) -> TraceSpan:
    return TraceSpan(
        span_id=span.span_id,
        parent_span_id=span.parent_span_id,
        name=span.name,
        start_ns=nanoseconds("TraceSpan.start_time", span.start_time),
        end_ns=nanoseconds("TraceSpan.end_time", span.end_time),
        attributes=dict(span.attributes),
    )


def _health_from_wire(health: pb.SystemHealth) -> SystemHealth:
    status = member("SystemHealth.status", HealthStatus, health.status)
    return SystemHealth(status=status, summary=health.summary, indicators=dict(health.indicators))
