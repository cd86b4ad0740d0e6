"""A real run of two ranks with all sinks, once well and once with every sink in trouble: it is the run without any."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from tests.faults.test_disk import fill, mounted
from tests.faults.test_processes import digest_of, flags, let_go
from tests.torchrun import ROOT, Job, launch
from tests.unit.test_sinks import samples
from tolaria.leyline.types import HealthStatus, TelemetryLevel
from tolaria.publish.packets import sequence_of
from tolaria.publish.subscriber import Subscriber
from tolaria.telemetry.lines import read_lines
from tolaria.telemetry.metrics import read_metrics

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

POISON = {"nan_from": 17, "nan_to": 20}
QUICK = ["--telemetry.interval_s=0", "--recovery.snapshot_steps=5", "--tamiyo.deadline_ms=1500"]
FAKES = Path(__file__).parent / "fake_packages"
WATCH = ROOT / "launch" / "examples" / "watch_telemetry.py"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: sockets are made in it."""
    path = Path(tempfile.mkdtemp(prefix="tl-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def plain() -> str:
    """Digest of the run without sinks."""
    with tempfile.TemporaryDirectory(prefix="tl-") as path, started(Path(path), [], hold=False) as job:
        return digest_of(job.finish())


@contextlib.contextmanager
def started(
    folder: Path, more: list[str], *, hold: bool, environment: Mapping[str, str] | None = None
) -> Iterator[Job]:
    """The run of test_processes.py with three bad batches on rank 1, so that it goes back once."""
    given = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{FAKES}",
        "TOLARIA_TEST_WANDB": str(folder / "wandb"),
        **(environment or {}),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tolaria.launch", *flags(folder, hold=hold, **POISON), *QUICK, *more]
    with Job(folder, [*command, "--run.dir", str(folder / "run")], folder / "run", environment=given) as job:
        yield job


@contextlib.contextmanager
def watcher(endpoint: str) -> Iterator[subprocess.Popen[str]]:
    """The example of a subscriber; killed at the end."""
    command = [sys.executable, str(WATCH), endpoint]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def scrape(url: str) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
        return samples(answer.read().decode())


def test_every_sink_has_the_run_and_the_run_is_the_same(folder: Path, plain: str) -> None:
    endpoint = f"ipc://{folder}/t.sock"
    sinks = [f"--telemetry.publish={endpoint}", "--telemetry.prometheus=127.0.0.1:0", "--telemetry.tensorboard=run",
             "--telemetry.wandb=digits"]  # fmt: skip
    with watcher(endpoint) as watching, Subscriber(endpoint) as subscriber, started(folder, sinks, hold=True) as job:
        for rank in range(2):
            job.wait_file(folder / f"reached-{rank}")
        job.wait_until(lambda: len(job.events("boundary", rank=0)) >= 3 or None, "the third boundary")
        (opened,) = job.events("sinks_opened")
        stage = ("tolaria_seed_stage", "mid", job.events("boundary", rank=0)[-1]["seeds"]["mid"])

        def page_of_it() -> dict[tuple[str, ...], float] | None:
            found = scrape(opened["where"]["prometheus"])
            return found if found.get(("tolaria_boundary",), 0) >= 3 and stage in found else None

        page = job.wait_until(page_of_it, "the page of the third boundary")
        assert page["tolaria_branch",] == 1 and page["tolaria_returns_total", "non_finite"] == 1
        assert stage[2] != "DORMANT" and page[stage] == 1 and page["tolaria_step_seconds",] > 0.005
        assert {label[0] for name, *label in page if name == "tolaria_rank_step_seconds"} == {"0", "1"}
        let_go(folder)
        summary = job.finish()
        assert digest_of(summary) == plain and job.left_behind() == []
        packets = []
        while (packet := subscriber.receive(0.5)) is not None:
            packets.append(packet)
        lines = watching.communicate(timeout=30)[0].splitlines()

    # Packets: all of them, numbered, each with where the run was.
    numbers = [sequence_of(packet.packet_id)[1] for packet in packets]
    assert numbers == list(range(numbers[0], numbers[-1] + 1)) and subscriber.missed == 0
    assert len(lines) >= len(packets) - numbers[0] and "branch 1  run ended" in lines[-1]
    kinds = [event.attributes["kind"] for packet in packets for event in packet.events]
    assert kinds.count("went_back") >= 1 and kinds[-1] == "run_ended" and "command_applied" in kinds
    went_back = next(i for i, p in enumerate(packets) if p.events and p.events[0].attributes["kind"] == "went_back")
    for at, packet in enumerate(packets):
        assert packet.health is not None
        # What rank 1 told comes a little later, with where it was then.
        if not packet.events or packet.events[0].attributes["rank"] == "0":
            assert packet.health.indicators["branch"] == ("1" if at >= went_back else "0")
    assert HealthStatus.UNHEALTHY in {packet.health.status for packet in packets if packet.health is not None}
    assert any(packet.spans and packet.spans[0].name == "boundary" for packet in packets)
    # Rank 1 has told of the incident as well.
    assert {e.attributes["rank"] for p in packets for e in p.events if p.level > TelemetryLevel.INFO} == {"0", "1"}

    # metrics.jsonl, TensorBoard and W&B: the same numbers, no step backwards within a branch.
    written: dict[int, list[tuple[int, float]]] = {}
    for line in read_metrics(folder / "run" / "metrics.jsonl"):
        written.setdefault(line["branch"], []).append((line["step"], round(line["loss_rank0"], 4)))
    assert written.keys() == {0, 1}
    for branch, losses in written.items():
        assert losses == sorted(losses)
        assert shown(folder / "run" / "tensorboard" / f"branch-{branch}") == losses
    sent = list(read_lines(folder / "wandb"))
    assert [line["call"] for line in sent[:2]] == ["init", "define_metric"] and sent[-1]["call"] == "finish"
    logged = [(x["branch"], x["step"]) for x in sent if "train/step_loss" in x]
    assert logged == [(branch, step) for branch, losses in written.items() for step, _ in losses]
    assert summary["counters"]["events_lost"] == 0


def shown(folder: Path) -> list[tuple[int, float]]:
    """Step and loss as TensorBoard reads them."""
    return [
        (event.step, round(value.simple_value, 4))
        for path in sorted(folder.iterdir())
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "train/step_loss"
    ]


def test_a_full_disk_a_broken_package_and_nobody_listening_change_nothing(folder: Path, plain: str) -> None:
    with mounted(folder / "small", "-t", "tmpfs", "-o", "size=1m", "none") as place:
        fill(place)
        sinks = [f"--telemetry.publish=ipc://{folder}/t.sock", f"--telemetry.tensorboard={place}",
                 "--telemetry.wandb=digits"]  # fmt: skip
        with started(folder, sinks, hold=False, environment={"TOLARIA_TEST_WANDB_BREAKS": "3"}) as job:
            summary = job.finish()
            assert digest_of(summary) == plain and job.left_behind() == []
            (given_up,) = job.events("sink_given_up")
            assert (given_up["sink"], given_up["reason"]) == ("wandb", "RuntimeError: the service says no")
            (failing,) = job.events("sink_failing")
            assert failing["sink"] == "tensorboard" and "No space left on device" in failing["reason"]
            assert {event["sink"] for event in job.events("sink_lost_records")} == {"wandb", "tensorboard"}
    assert [line["call"] for line in read_lines(folder / "wandb")].count("log") == 2


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--telemetry.publish=tcp://10.1.2.3:5701",
            "telemetry.publish='tcp://10.1.2.3:5701': telemetry is not encrypted",
        ),
        ("--telemetry.publish=http://x", "telemetry.publish='http://x': expected ipc://PATH or tcp://127.0.0.1:PORT"),
        ("--telemetry.prometheus=9464", "telemetry.prometheus='9464': expected HOST:PORT, as 127.0.0.1:9464"),
        ("--telemetry.prometheus=203.0.113.9:9464", "telemetry.prometheus=203.0.113.9:9464: cannot be served there"),
        ("--telemetry.wandb=digits", "telemetry.wandb='digits': No module named 'wandb'; pip install wandb"),
    ],
)
def test_a_sink_that_can_not_be_had_refuses_the_start_in_one_line(folder: Path, flag: str, said: str) -> None:
    with launch(folder, [*flags(folder, ranks=0, hold=False), flag], ranks=0) as job:
        assert job.wait() == 2
        assert said in job.output.replace("=ipc", "='ipc"), job.output
        assert "Traceback" not in job.output and len(job.output.splitlines()) == 1
