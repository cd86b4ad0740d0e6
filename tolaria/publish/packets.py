"""From a record of the run's telemetry to a TelemetryPacket. Pure, but for what the maker remembers of the run."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tolaria.leyline import limits
from tolaria.leyline.limits import clip_text
from tolaria.leyline.types import HealthStatus, TelemetryLevel
from tolaria.leyline.types_telemetry import MetricPoint, SystemHealth, TelemetryEvent, TelemetryPacket, TraceSpan
from tolaria.telemetry.lines import to_json
from tolaria.telemetry.sinks.points import MEASURES, Point, points_of
from tolaria.telemetry.sinks.record import BOUNDARY, STEP, Record
from tolaria.telemetry.split import OUTSIDE

WHOLE = "boundary"
NOTICE, ELEVATED, HALT = 1, 2, 4


class PacketMaker:
    """Makes the packets of one start of a run. ``start``: what tells its packets from those of other starts.

    Every packet says how the run is, and where: run_id, step, branch, mode and emergency_level are among the
    indicators of its health.
    """

    def __init__(self, run_id: str, start: str) -> None:
        self._run_id = run_id
        self._start = start
        self._mode = "normal"
        self._emergency = 0
        self._reason = ""
        self._ended_badly = False

    def make(self, record: Record) -> TelemetryPacket:
        """The packet of a record; they are to come in order."""
        if record.rank == 0:
            self._follow(record)
        packet_id = f"{self._run_id}.{self._start}.{record.sequence}"
        level = TelemetryLevel[record.level.upper()]
        points = points_of(record)[: limits.MAX_METRIC_POINTS]
        return TelemetryPacket(
            packet_id=packet_id,
            timestamp_ns=record.wall_ns,
            level=level,
            metrics=tuple(map(_metric, points)),
            events=() if record.kind == STEP else (_event(record, packet_id, level),),
            spans=tuple(_spans(record, packet_id)) if record.kind == BOUNDARY else (),
            health=self._health(record),
        )

    def _follow(self, record: Record) -> None:
        fields = record.fields
        if record.kind in ("mode_changed", BOUNDARY):
            self._mode = str(fields["mode"])
        if record.kind in (BOUNDARY, "halt_cleared"):
            self._emergency = 0
        elif record.kind == "halted":
            self._emergency = HALT
        elif "emergency_level" in fields:
            self._emergency = max(self._emergency, int(fields["emergency_level"]))
        self._ended_badly = self._ended_badly or record.kind in ("run_failed", "gave_up")
        if "reason" in fields and record.level != "info":
            self._reason = str(fields["reason"])

    def _health(self, record: Record) -> SystemHealth:
        if self._ended_badly or self._emergency >= HALT:
            status = HealthStatus.CRITICAL
        elif self._emergency >= ELEVATED:
            status = HealthStatus.UNHEALTHY
        elif self._emergency >= NOTICE or self._mode != "normal":
            status = HealthStatus.DEGRADED
        else:
            status = HealthStatus.HEALTHY
        return SystemHealth(
            status=status,
            summary="" if status is HealthStatus.HEALTHY else _long(self._reason or self._mode),
            indicators={
                "run_id": self._run_id, "step": str(record.step), "branch": str(record.branch),
                "mode": _long(self._mode), "emergency_level": str(self._emergency),
            },
        )  # fmt: skip


def sequence_of(packet_id: str) -> tuple[str, int]:
    """The start of a run that a packet belongs to, and its number there, from 1. Raises ValueError for other ids."""
    start, _, number = packet_id.rpartition(".")
    return start, int(number)


def _metric(point: Point) -> MetricPoint:
    measure = MEASURES[point.name]
    attributes = {label: _long(value) for label, value in zip(measure.labels, point.labels, strict=True)}
    return MetricPoint(name=point.name, value=float(point.value), unit=measure.unit, attributes=attributes)


def _event(record: Record, packet_id: str, level: TelemetryLevel) -> TelemetryEvent:
    said = record.fields.get("reason")
    words = record.kind.replace("_", " ")
    return TelemetryEvent(
        event_id=f"{packet_id}.{record.kind}",
        description=_long(f"{words}: {said}" if said else words),
        level=level,
        attributes={"kind": record.kind, "rank": str(record.rank), **dict(_attributes(record))},
    )


def _attributes(record: Record) -> Iterator[tuple[str, str]]:
    """The event's own fields as text; those of a boundary that have several numbers are metrics already."""
    for name, value in list(record.fields.items())[: limits.MAX_ATTRIBUTES - 2]:
        plain = to_json(value)
        if isinstance(plain, (dict, list)):
            if record.kind != BOUNDARY:
                yield name, _long(json.dumps(plain))
        else:
            yield name, _long(plain if isinstance(plain, str) else json.dumps(plain))


def _spans(record: Record, packet_id: str) -> Iterator[TraceSpan]:
    """The boundary and its parts. Only how long each part took is known, so they are laid end to end in their order."""
    spent: Mapping[str, Any] = record.fields.get("latency_ms", {})
    if WHOLE not in spent:
        return
    parts = {part: round(ms * 1e6) for part, ms in spent.items() if part != WHOLE and ms > 0}
    whole = max(round((spent[WHOLE] + sum(spent.get(part, 0.0) for part in OUTSIDE)) * 1e6), sum(parts.values()))
    at = record.wall_ns - whole
    parent = f"{packet_id}.{WHOLE}"
    attributes = {"boundary": str(record.fields.get("boundary", "")), "step": str(record.step)}
    yield TraceSpan(span_id=parent, name=WHOLE, start_ns=at, end_ns=record.wall_ns, attributes=attributes)
    for part, length in parts.items():
        yield TraceSpan(
            span_id=f"{parent}.{part}", parent_span_id=parent, name=part, start_ns=at, end_ns=at + length
        )  # fmt: skip
        at += length


def _long(text: str) -> str:
    return clip_text(text, most=limits.MAX_TELEMETRY_CHARS)
