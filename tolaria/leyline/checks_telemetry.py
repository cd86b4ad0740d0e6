"""What a telemetry packet must satisfy to be sent or accepted; the rest is in `tolaria.leyline.checks`."""

from collections.abc import Mapping

from tolaria.errors import MessageRejected
from tolaria.leyline import limits
from tolaria.leyline.limits import check_count, check_enum, check_integer, check_mapping, check_name, check_text
from tolaria.leyline.types import HealthStatus, TelemetryLevel
from tolaria.leyline.types_telemetry import TelemetryPacket, TraceSpan

_LONG = limits.MAX_TELEMETRY_CHARS


def check_telemetry(packet: TelemetryPacket) -> None:
    """Check a whole packet. Raises MessageRejected with the codes of `tolaria.leyline.limits`."""
    check_name("packet.packet_id", packet.packet_id)
    check_integer("packet.timestamp", packet.timestamp_ns, limits.MAX_TIME_NS)
    check_name("packet.source_subsystem", packet.source_subsystem, optional=True)
    check_enum("packet.level", packet.level, TelemetryLevel)
    check_count("packet.metrics", len(packet.metrics), limits.MAX_METRIC_POINTS)
    for point in packet.metrics:
        check_name("metric.name", point.name)
        _check_value(point.name, point.value)
        check_text("metric.unit", point.unit)
        _check_attributes("metric.attributes", point.attributes)
    check_count("packet.events", len(packet.events), limits.MAX_TELEMETRY_EVENTS)
    for event in packet.events:
        check_name("event.event_id", event.event_id)
        check_text("event.description", event.description, most=_LONG)
        check_enum("event.level", event.level, TelemetryLevel)
        _check_attributes("event.attributes", event.attributes)
    check_count("packet.spans", len(packet.spans), limits.MAX_SPANS)
    for span in packet.spans:
        _check_span(span)
    if packet.health is not None:
        check_enum("health.status", packet.health.status, HealthStatus)
        check_text("health.summary", packet.health.summary, most=_LONG)
        _check_attributes("health.indicators", packet.health.indicators)


def _check_value(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise MessageRejected("type", f"metric {name}: expected a number, not {type(value).__name__}")


def _check_span(span: TraceSpan) -> None:
    check_name("span.span_id", span.span_id)
    check_name("span.parent_span_id", span.parent_span_id, optional=True)
    check_name("span.name", span.name)
    check_integer("span.start_time", span.start_ns, limits.MAX_TIME_NS)
    check_integer("span.end_time", span.end_ns, limits.MAX_TIME_NS)
    if span.end_ns < span.start_ns:
        raise MessageRejected("range", f"span {span.name} ends before it begins")
    _check_attributes("span.attributes", span.attributes)


def _check_attributes(where: str, attributes: Mapping[str, str]) -> None:
    check_mapping(where, attributes)
    check_count(where, len(attributes), limits.MAX_ATTRIBUTES)
    for key, value in attributes.items():
        check_name(f"key of {where}", key)
        check_text(f"{where}[{key}]", value, most=_LONG)
