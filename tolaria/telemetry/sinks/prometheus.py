"""An endpoint that Prometheus scrapes: the run's present as gauges, what has happened as counters of this start.

    tolaria_step_seconds, tolaria_learning_rate{group=}, ...    `points.MEASURES`, each with tolaria_ before it
    tolaria_step, tolaria_branch, tolaria_epoch, ...            where the run is; a return sets them back
    tolaria_events_total{kind=,level=}, tolaria_incidents_total{cause=}, tolaria_commands_total{outcome=}, ...

Series that no longer apply (a seed that is gone) vanish. Who can reach the address can read all of it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tolaria.errors import ConfigError
from tolaria.telemetry.sinks.points import MEASURES, OF_BOUNDARIES, OF_STEPS, points_of
from tolaria.telemetry.sinks.record import BOUNDARY, STEP, Record
from tolaria.telemetry.sinks.scrape import ScrapeServer

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge
    from prometheus_client.metrics_core import Metric

PREFIX = "tolaria_"

POSITIONS = {
    "step": "Optimizer step that was logged last",
    "epoch": "Epochs that are complete",
    "boundary": "Boundaries so far",
    "branch": "0, and higher after each return to an earlier state",
    "emergency_level": "Highest emergency since the last boundary, 0 to 4",
}
COUNTERS = {
    "events": ("Events", ("kind", "level")),
    "incidents": ("Times that the run went wrong, by what was seen", ("cause",)),
    "returns": ("Returns to an earlier state, by what was gone back for", ("cause",)),
    "commands": ("Commands of the policy, applied or refused", ("outcome",)),
    "commands_judged": ("Commands whose effect was judged, by what it was", ("outcome",)),
    "checkpoints": ("Checkpoints that were committed, failed, or skipped", ("outcome",)),
    "policy_failures": ("Boundaries at which the policy gave no acceptable answer", ("code",)),
}
TOTALS = {
    "goodput_seconds": ("Where the run's time went", "category"),
    "sink_lost_records": ("Records that a sink did not get", "sink"),
}
Totals = Mapping[str, Callable[[], Mapping[str, float]]]
"""What each of `TOTALS` is read from at a scrape; one that is not there is not exported."""

# Kind of event -> counter, and the value of its label: a field of the event in braces, or as it is.
_COUNTED = {
    "incident": ("incidents", "{cause}"),
    "went_back": ("returns", "{cause}"),
    "command_applied": ("commands", "applied"),
    "command_refused": ("commands", "refused"),
    "command_judged": ("commands_judged", "{outcome}"),
    "checkpoint_committed": ("checkpoints", "committed"),
    "checkpoint_failed": ("checkpoints", "failed"),
    "checkpoint_skipped": ("checkpoints", "skipped"),
    "policy_failed": ("policy_failures", "{code}"),
}


def metric_names() -> set[str]:
    """Every metric there can be, as Prometheus calls it."""
    names = {*MEASURES, *POSITIONS, "run_info", *(f"{name}_total" for name in (*COUNTERS, *TOTALS))}
    return {PREFIX + name for name in names}


class PrometheusSink:
    """Serves ``address`` (host, port) from the moment it is made. ``run``: labels of tolaria_run_info.

    Raises ConfigError when the package is missing or the address can not be bound.
    """

    name = "prometheus"

    def __init__(self, address: tuple[str, int], run: Mapping[str, str], totals: Totals) -> None:
        try:
            import prometheus_client  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                f"telemetry.prometheus: {error}; pip install 'tolaria[telemetry]', or leave it empty"
            ) from error
        self._lock = threading.Lock()
        self._totals = totals
        self._registry = prometheus_client.CollectorRegistry()
        self._render = prometheus_client.generate_latest
        make: dict[str, Any] = {"registry": self._registry}
        self._gauges: dict[str, Gauge] = {
            name: prometheus_client.Gauge(PREFIX + name, measure.help, measure.labels, **make)
            for name, measure in MEASURES.items()
        }
        self._positions: dict[str, Gauge] = {
            name: prometheus_client.Gauge(PREFIX + name, text, **make) for name, text in POSITIONS.items()
        }
        self._counters: dict[str, Counter] = {
            name: prometheus_client.Counter(PREFIX + name, text, labels, **make)
            for name, (text, labels) in COUNTERS.items()
        }
        prometheus_client.Gauge(PREFIX + "run_info", "Which run this is", tuple(run), **make).labels(**run).set(1)
        self._registry.register(_Totals(totals))
        self._server = ScrapeServer(address, self.page, prometheus_client.CONTENT_TYPE_LATEST)

    @property
    def where(self) -> str:
        """Where it is scraped."""
        return self._server.url

    def write(self, record: Record) -> None:
        """Take over the record's numbers; count it if it is an event."""
        with self._lock:
            if record.kind != STEP:
                self._counters["events"].labels(record.kind, record.level).inc()
            # Every rank tells of what all go through together.
            if record.rank == 0:
                self._move(record)
                self._count(record)

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Stop serving."""
        self._server.close()

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        with self._lock:
            return self._render(self._registry)

    def _move(self, record: Record) -> None:
        self._positions["step"].set(record.step)
        self._positions["branch"].set(record.branch)
        if "emergency_level" in record.fields:
            self._positions["emergency_level"].set(record.fields["emergency_level"])
        if record.kind not in (STEP, BOUNDARY):
            return
        if record.kind == BOUNDARY:
            self._positions["boundary"].set(record.fields["boundary"])
            self._positions["emergency_level"].set(0)
        else:
            self._positions["epoch"].set(record.fields["epoch"])
        for name in OF_STEPS if record.kind == STEP else OF_BOUNDARIES:
            if MEASURES[name].labels:
                self._gauges[name].clear()
        for point in points_of(record):
            gauge = self._gauges[point.name]
            (gauge.labels(*point.labels) if point.labels else gauge).set(point.value)

    def _count(self, record: Record) -> None:
        if record.kind in _COUNTED:
            counter, label = _COUNTED[record.kind]
            self._counters[counter].labels(label.format_map(record.fields)).inc()


class _Totals:
    """Totals that somebody else keeps, read when they are asked for."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> "Iterator[Metric]":
        from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415

        for name, read in list(self._totals.items()):
            text, label = TOTALS[name]
            family = CounterMetricFamily(PREFIX + name, text, labels=[label])
            for value, total in read().items():
                family.add_metric([value], total)
            yield family
