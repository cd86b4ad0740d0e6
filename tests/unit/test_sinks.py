"""What the sinks of telemetry get, and that nothing of theirs reaches the run: full, slow, broken or stuck."""

import errno
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tolaria.errors import ConfigError
from tolaria.telemetry.events import EventLog, Level
from tolaria.telemetry.sinks import fan as fan_module
from tolaria.telemetry.sinks import scrape
from tolaria.telemetry.sinks.fan import Fan
from tolaria.telemetry.sinks.follow import Follower
from tolaria.telemetry.sinks.points import MEASURES, Point, points_of
from tolaria.telemetry.sinks.prometheus import PrometheusSink, metric_names
from tolaria.telemetry.sinks.record import Record
from tolaria.telemetry.sinks.tensorboard import TensorBoardSink

STEP_FIELDS = {"epoch": 1, "loss_rank0": 0.5, "step_s": 0.02, "samples_per_s": 3200.0, "lr": 1e-3, "lr/mid": 1e-4,
               "alpha/mid": 0.25}  # fmt: skip
BOUNDARY_FIELDS: dict[str, Any] = {
    "boundary": 3, "epoch": 2, "train_loss": 0.6, "val_loss": 0.7, "val_accuracy": 0.9, "val_noise": float("nan"),
    "metrics": {"top5": 0.99}, "mode": "conservative", "latency_ms": {"packet": 1.5, "validation": 20.0, "boundary": 4},
    "seeds": {"mid": "BLENDING"}, "signals": {"late": {"signal/gain": 0.1}}, "owners": {"mid": {"weight": 0.5}},
    "flops_per_sample": None, "own_ms": [1.0, 9.0],
}  # fmt: skip


def record(kind: str, number: int = 1, level: Level = "info", *, rank: int = 0, branch: int = 0, step: int = 10,
           **fields: Any) -> Record:  # fmt: skip
    return Record(number, kind, level, rank, step, branch, 10**18, fields)


class Told:
    """Where trouble is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, level: Level = "info", **fields: object) -> None:
        self.events.append((kind, fields))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


class Kept:
    """A sink that keeps what it gets; ``meet`` is called with each record first."""

    name = where = "kept"

    def __init__(self, meet: Callable[[Record], object] = lambda _: None) -> None:
        self.records: list[Record] = []
        self.closed = False
        self._meet = meet

    def write(self, got: Record) -> None:
        self._meet(got)
        self.records.append(got)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    @property
    def numbers(self) -> list[int]:
        return [got.sequence for got in self.records]


def put(fan: Fan, kind: str = "step", level: Level = "info", **fields: Any) -> None:
    fan.put(kind, level, fields, rank=0, step=1, branch=0, wall_ns=1)


def eventually(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "not within 10 s"
        time.sleep(0.01)


# The numbers


def test_a_steps_numbers_have_the_names_and_units_of_the_table() -> None:
    assert points_of(record("step", **STEP_FIELDS)) == [
        Point("step_loss", 0.5), Point("samples_per_second", 3200.0), Point("step_seconds", 0.02),
        Point("learning_rate", 1e-3, ("host",)), Point("learning_rate", 1e-4, ("mid",)),
        Point("seed_alpha", 0.25, ("mid",)),
    ]  # fmt: skip
    assert Point("learning_rate", 1e-4, ("mid",)).tag == "train/learning_rate/mid"


def test_all_numbers_of_a_boundary_are_there_and_unknown_ones_are_not() -> None:
    found = {(point.name, *point.labels): point.value for point in points_of(record("boundary", **BOUNDARY_FIELDS))}
    assert found.pop(("validation_loss_error",)) != 0  # NaN is a number that was measured
    assert found == {
        ("train_loss",): 0.6, ("validation_loss",): 0.7, ("validation_accuracy",): 0.9, ("conservative",): 1.0,
        ("validation_metric", "top5"): 0.99, ("boundary_seconds", "packet"): 0.0015,
        ("boundary_seconds", "validation"): 0.02, ("boundary_seconds", "boundary"): 0.004,
        ("rank_step_seconds", "0"): 0.001, ("rank_step_seconds", "1"): 0.009, ("seed_stage", "mid", "BLENDING"): 1.0,
        ("seed_gradient", "mid", "weight"): 0.5, ("growth_signal", "late", "gain"): 0.1,
    }  # fmt: skip
    assert points_of(record("boundary", rank=1, **BOUNDARY_FIELDS)) == points_of(record("halted")) == []


# Queue and thread


def test_a_full_queue_drops_and_counts_but_keeps_what_is_critical() -> None:
    gate = threading.Event()
    sink, told = Kept(lambda _: gate.wait()), Told()
    fan = Fan([sink], queue_records=4, tell=told)
    put(fan)
    eventually(lambda: sink._meet and not fan._threads[0]._queue)  # it is in the sink's hands
    for _ in range(10):
        put(fan)
    put(fan, "halted", "critical")
    assert fan.lost == {"kept": 6}
    gate.set()
    fan.close()
    assert sink.numbers == [1, 2, 3, 4, 5, 12] and sink.records[-1].kind == "halted"
    assert len(sink.records) + fan.lost["kept"] == 12
    assert told.kinds == ["sink_lost_records"] and told.events[0][1]["lost"] == 6
    assert sink.closed


def test_a_sink_that_stands_still_holds_nobody_up_and_is_left_behind_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fan_module, "CLOSE_S", 0.3)
    gate = threading.Event()
    stuck, well, told = Kept(lambda _: gate.wait()), Kept(), Told()
    fan = Fan([stuck, well], queue_records=4, tell=told)
    started = time.monotonic()
    for _ in range(1000):
        put(fan)
    assert time.monotonic() - started < 1.0
    eventually(lambda: well.records)
    fan.close()
    assert time.monotonic() - started < 5.0
    assert well.closed and not stuck.closed
    assert ("sink_abandoned", "kept") in [(kind, fields["sink"]) for kind, fields in told.events]
    gate.set()
    fan._threads[0]._thread.join()


def test_a_sink_that_raises_is_given_up_and_the_others_go_on() -> None:
    def raises(got: Record) -> None:
        if got.sequence == 2:
            raise KeyError("a bug of the package")

    broken, well, told = Kept(raises), Kept(), Told()
    fan = Fan([broken, well], queue_records=100, tell=told)
    for _ in range(5):
        put(fan)
    eventually(lambda: fan._threads[0].given_up)
    put(fan)
    fan.close()
    assert broken.numbers == [1] and broken.closed and fan.lost["kept"] == 0  # of the second of that name
    assert fan._threads[0].lost == 5 and well.numbers == [1, 2, 3, 4, 5, 6]
    assert told.kinds == ["sink_given_up", "sink_lost_records"]
    assert told.events[0][1] == {"sink": "kept", "reason": "KeyError: 'a bug of the package'", "lost": 4}


def test_a_full_disk_rests_the_sink_and_is_told_once_and_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    full = [True]

    def raises(_: Record) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tolaria.telemetry.sinks.worker.REST_S", 0.05)
    sink, told = Kept(raises), Told()
    fan = Fan([sink], queue_records=100, tell=told)
    for _ in range(3):
        put(fan)
    eventually(lambda: fan.lost["kept"] == 2)
    assert "sink_failing" in told.kinds
    full[0] = False
    eventually(lambda: sink.numbers == [3])
    fan.close()
    assert told.kinds.count("sink_failing") == told.kinds.count("sink_lost_records") == 1
    assert "No space left" in told.events[0][1]["reason"]


def test_what_a_sink_had_taken_when_its_flush_failed_is_counted() -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink, told = Kept(), Told()
    sink.flush = full  # type: ignore[method-assign]
    fan = Fan([sink], queue_records=8, tell=told)
    for _ in range(3):
        put(fan)
    eventually(lambda: "sink_lost_records" in told.kinds)
    fan.close()
    assert len(sink.records) == 3 and fan.lost == {"kept": 3}


def test_what_a_resting_sink_never_got_is_counted_at_the_end() -> None:
    def raises(_: Record) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink = Kept(raises)
    fan = Fan([sink], queue_records=100, tell=Told())
    for _ in range(7):
        put(fan)
    fan.close()
    assert fan.lost == {"kept": 7} and sink.closed


def test_fast_steps_are_thinned_but_never_events_or_the_first_of_a_branch() -> None:
    sink = Kept()
    fan = Fan([sink], queue_records=100, tell=Told(), interval_s=0.5)
    for at, (kind, branch, ms) in enumerate(
        [("step", 0, 0), ("step", 0, 100), ("boundary", 0, 200), ("boundary", 0, 201), ("step", 0, 500),
         ("step", 1, 501), ("step", 1, 900), ("step", 1, 100), ("step", 1, 700)]
    ):  # fmt: skip
        fan.put(kind, "info", {}, rank=0, step=at, branch=branch, wall_ns=ms * 10**6)
    fan.close()
    assert [got.step for got in sink.records] == [0, 2, 3, 4, 5, 7, 8]
    assert sink.numbers == [1, 2, 3, 4, 5, 6, 7] and fan.lost == {"kept": 0}  # nothing is missing


# Other ranks


def test_warnings_of_other_ranks_come_through_the_file_they_share(tmp_path: Path) -> None:
    path, got = tmp_path / "events.jsonl", list[tuple[Any, ...]]()

    def listener(kind: str, level: Level, fields: Any, *, rank: int, step: int, branch: int, wall_ns: int) -> None:
        got.append((kind, level, dict(fields), rank, step, branch))

    mine, other, foreign = (EventLog(path, rank, run_id=run) for rank, run in ((0, "r"), (3, "r"), (2, "another")))
    other.emit("before_it_began", "error")
    follower = Follower(path, "r", listener)
    other.step, other.branch = 7, 1
    mine.emit("halted", "critical")
    foreign.emit("halted", "critical")
    other.emit("boundary", own_ms=[1.0])
    other.emit("loader_restarted", "warning", reason="it was stuck")
    with path.open("ab") as file:
        file.write(b'{"rank":1,"cut sh\n{"rank":1}\n[1]\n')
    other.emit("run_failed", "critical", reason="out of memory")
    follower.close()
    assert got == [
        ("loader_restarted", "warning", {"reason": "it was stuck"}, 3, 7, 1),
        ("run_failed", "critical", {"reason": "out of memory"}, 3, 7, 1),
    ]
    for log in (mine, other, foreign):
        log.close()


# TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader  # noqa: PLC0415

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 6)))
    return found


def test_tensorboard_reads_every_number_and_no_curve_goes_backwards(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tb")
    for step, branch in ((10, 0), (20, 0), (10, 1), (20, 1), (30, 1)):
        sink.write(record("step", step=step, branch=branch, **STEP_FIELDS))
    sink.write(record("went_back", branch=1))
    sink.write(record("boundary", step=30, branch=1, **BOUNDARY_FIELDS))
    sink.close()
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == ["branch-0", "branch-1"]
    assert [step for step, _ in scalars(tmp_path / "tb" / "branch-0")["train/step_loss"]] == [10, 20]
    later = scalars(tmp_path / "tb" / "branch-1")
    assert [step for step, _ in later["train/step_loss"]] == [10, 20, 30]
    assert later["validation/validation_accuracy"] == [(30, 0.9)] and later["train/learning_rate/mid"][0] == (10, 1e-4)


def test_what_follows_a_full_disk_is_readable(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tb")
    sink.write(record("step", step=10, **STEP_FIELDS))
    sink.flush()
    (path,) = (tmp_path / "tb" / "branch-0").iterdir()
    sink.write(record("step", step=20, **STEP_FIELDS))
    flush = sink._writer.flush

    def half() -> None:
        flush()
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 20)
        raise OSError(errno.ENOSPC, "No space left on device")

    sink._writer.flush = half
    with pytest.raises(OSError, match="No space"):
        sink.flush()
    sink.write(record("step", step=30, **STEP_FIELDS))
    sink.close()
    assert len(list((tmp_path / "tb" / "branch-0").iterdir())) == 2
    assert [step for step, _ in scalars(tmp_path / "tb" / "branch-0")["train/step_loss"]] == [10, 30]


def test_a_folder_that_can_not_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^telemetry\.tensorboard: .*file/tb cannot be made \(Not a directory\)$"):
        TensorBoardSink(tmp_path / "file" / "tb")


# Prometheus


@pytest.fixture
def endpoint() -> Iterator[PrometheusSink]:
    totals = {
        "goodput_seconds": lambda: {"training": 12.5, "waiting": 0.5},
        "sink_lost_records": lambda: {"wandb": 3},
    }
    sink = PrometheusSink(("127.0.0.1", 0), {"run_id": "r", "name": "digits"}, totals)
    yield sink
    sink.close()


def samples(page: str) -> dict[tuple[str, ...], float]:
    """Sample name and label values -> value, as the client's own parser reads it."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def scraped(sink: PrometheusSink) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(sink.where, timeout=10) as answer:  # noqa: S310
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        return samples(answer.read().decode())


def test_a_scrape_has_the_present_as_gauges_and_what_happened_as_counters(endpoint: PrometheusSink) -> None:
    endpoint.write(record("step", **STEP_FIELDS))
    endpoint.write(record("boundary", **BOUNDARY_FIELDS))
    endpoint.write(record("incident", level="error", cause="loss_spike", emergency_level=3))
    endpoint.write(record("incident", level="error", rank=1, cause="loss_spike", emergency_level=3))
    endpoint.write(record("command_applied", what="germinate"))
    endpoint.write(record("command_refused", level="warning", code="gate"))
    endpoint.write(record("checkpoint_committed"))
    found = scraped(endpoint)
    assert {
        ("tolaria_run_info", "digits", "r"): 1.0, ("tolaria_step_seconds",): 0.02, ("tolaria_train_loss",): 0.6,
        ("tolaria_learning_rate", "mid"): 1e-4, ("tolaria_rank_step_seconds", "1"): 0.009,
        ("tolaria_boundary_seconds", "packet"): 0.0015, ("tolaria_seed_stage", "mid", "BLENDING"): 1.0,
        ("tolaria_incidents_total", "loss_spike"): 1.0, ("tolaria_commands_total", "applied"): 1.0,
        ("tolaria_events_total", "incident", "error"): 2.0,
        ("tolaria_commands_total", "refused"): 1.0, ("tolaria_checkpoints_total", "committed"): 1.0,
        ("tolaria_emergency_level",): 3.0, ("tolaria_step",): 10.0, ("tolaria_boundary",): 3.0,
        ("tolaria_goodput_seconds_total", "training"): 12.5, ("tolaria_sink_lost_records_total", "wandb"): 3.0,
    }.items() <= found.items()  # fmt: skip
    assert {name for name, *_ in found} <= metric_names()


def test_a_return_sets_the_gauges_back_and_what_is_gone_vanishes(endpoint: PrometheusSink) -> None:
    endpoint.write(record("boundary", step=20, **BOUNDARY_FIELDS))
    endpoint.write(record("step", step=30, **STEP_FIELDS))
    endpoint.write(record("step", step=20, branch=1, epoch=0, loss_rank0=0.4, lr=1e-3))
    endpoint.write(record("boundary", step=20, branch=1, **{**BOUNDARY_FIELDS, "seeds": {"mid": "DORMANT"}}))
    found = samples(endpoint.page().decode())
    assert found["tolaria_step",] == 20 and found["tolaria_branch",] == 1
    assert ("tolaria_seed_stage", "mid", "BLENDING") not in found and ("tolaria_seed_alpha", "mid") not in found
    assert found["tolaria_seed_stage", "mid", "DORMANT"] == 1


def test_the_page_is_made_once_a_second_however_often_it_is_asked_for() -> None:
    made = []

    def page() -> bytes:
        made.append(1)
        return b"x 1\n"

    server = scrape.ScrapeServer(("127.0.0.1", 0), page, "text/plain")
    started = time.monotonic()
    for _ in range(50):
        with urllib.request.urlopen(server.url, timeout=10) as answer:  # noqa: S310
            assert answer.read() == b"x 1\n"
    assert len(made) <= 2 + (time.monotonic() - started) / scrape.KEPT_S
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(server.url.replace("/metrics", "/"), timeout=10)  # noqa: S310
    server.close()


def test_a_port_that_is_taken_is_one_line(endpoint: PrometheusSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "BIND_S", 0.1)
    port = int(endpoint.where.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match=rf"^telemetry\.prometheus=127\.0\.0\.1:{port}: .*Address already in use"):
        PrometheusSink(("127.0.0.1", port), {"run_id": "r", "name": "n"}, {})


def test_clients_that_say_nothing_keep_nobody_from_a_scrape_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket  # noqa: PLC0415

    monkeypatch.setattr(scrape._Handler, "timeout", 0.5)
    server = scrape.ScrapeServer(("127.0.0.1", 0), lambda: b"x 1\n", "text/plain")
    address = ("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))
    idle = [socket.create_connection(address) for _ in range(scrape.MOST_CONNECTIONS + 4)]

    def served() -> bool:
        try:
            with urllib.request.urlopen(server.url, timeout=2) as answer:  # noqa: S310
                return bool(answer.read() == b"x 1\n")
        except OSError:
            return False

    eventually(served)
    for connection in idle:
        connection.close()
    server.close()


# The dashboard


DASHBOARD = Path(__file__).parents[2] / "launch" / "grafana" / "tolaria.json"


def test_the_dashboard_asks_only_for_what_the_endpoint_exports() -> None:
    import re  # noqa: PLC0415

    board = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"tolaria_\w+", target["expr"])
    }
    variables = {
        name for entry in board["templating"]["list"] for name in re.findall(r"tolaria_\w+", str(entry["query"]))
    }
    assert asked | variables <= metric_names()
    unseen = {f"tolaria_{name}" for name in MEASURES} - asked
    assert unseen <= {"tolaria_forward_flops", "tolaria_validation_metric"}, unseen
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    for panel in panels:
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"] and panel["gridPos"]["w"] <= 24
