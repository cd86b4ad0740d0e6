"""Leyline's telemetry as plain Python, as `tolaria.leyline.types` has everything else. Nothing steers by it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tolaria.leyline.types import HealthStatus, TelemetryLevel


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricPoint:
    """One number. ``value``: any double, since a NaN is what a loss that has diverged is; ``unit``: "" has none."""

    name: str
    value: float
    unit: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryEvent:
    """Something that happened. ``description`` is for people, up to `limits.MAX_TELEMETRY_CHARS`."""

    event_id: str
    description: str
    level: TelemetryLevel
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSpan:
    """Something that lasted, from ``start_ns`` to ``end_ns`` of the sender's wall clock."""

    span_id: str
    name: str
    start_ns: int
    end_ns: int
    parent_span_id: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemHealth:
    """How the run is. ``indicators``: what that is taken from, by name."""

    status: HealthStatus
    summary: str = ""
    indicators: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryPacket:
    """What a run tells whoever listens. ``level``: the highest of its events, INFO without one."""

    packet_id: str
    timestamp_ns: int
    level: TelemetryLevel
    metrics: tuple[MetricPoint, ...] = ()
    events: tuple[TelemetryEvent, ...] = ()
    spans: tuple[TraceSpan, ...] = ()
    health: SystemHealth | None = None
    source_subsystem: str = "tolaria"
