"""What do the sinks of telemetry cost a step: all of them at work, or all in trouble?

Two ranks train a model of step_latency.py by hand, with DDP; rank 0 writes events.jsonl and metrics.jsonl as a run
does, a line every 10 steps and a boundary at the end of each block, and hands both on, numbers of steps every 0.5 s as
by default. All sides take turns in the same two processes:

    off        the two files only
    on         and packets to a subscriber, Prometheus scraping every 100 ms, TensorBoard's files
    trouble    the subscriber is stopped (SIGSTOP), scrapers hang up at once, TensorBoard writes to a disk that is full

    us a step  median over blocks
    ratio      to "off" of the same round, median and quartiles (budget 1.01)
    put        microseconds in which one record is handed to all sinks, in the training thread (budget 20)

    python -m benchmarks.telemetry            one minute for each model
    python -m benchmarks.telemetry --quick    the tiny model, few rounds
"""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.figures import RESULTS, machine_line, ratios, save, say, spread, table
from benchmarks.latency_sides import LR
from benchmarks.latency_workloads import WORKLOADS, mean_loss
from benchmarks.step_latency import free_port
from tolaria.process import keep_freed_memory
from tolaria.publish.packets import PacketMaker
from tolaria.publish.publisher import Publisher
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.metrics import MetricsLog
from tolaria.telemetry.sinks.fan import Fan
from tolaria.telemetry.sinks.prometheus import PrometheusSink
from tolaria.telemetry.sinks.tensorboard import TensorBoardSink

SIDES = ("off", "on", "trouble")
STEPS = {"mlp": 400, "cnn": 100}
INTERVAL = 10
SCRAPE_S = 0.1
PUTS = 2000
FULL = "/dev/full"

SUBSCRIBE = """
import sys
from tolaria.publish.subscriber import Subscriber
with Subscriber(sys.argv[1]) as subscriber:
    while True:
        subscriber.receive(60.0)
"""
SCRAPE = """
import select, socket, sys
mode, host, port = "rest", "", 0
while True:
    if select.select([sys.stdin], [], [], float(sys.argv[1]))[0]:
        words = sys.stdin.readline().split()
        if not words:
            break
        mode, host, port = words
    elif mode != "rest":
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\\r\\n\\r\\n")
            while mode == "scrape" and connection.recv(65536):
                pass
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model, 4 rounds")
    parser.add_argument("--rounds", type=int, default=0, help="blocks of each side; 0: 16, or 4 with --quick")
    parser.add_argument("--models", nargs="+", choices=STEPS, default=None, help="which (all; --quick: mlp)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    options = parser.parse_args(argv)
    say(machine_line())
    results = {}
    for model in options.models or (["mlp"] if options.quick else list(STEPS)):
        found = _measure(model, options.rounds or (4 if options.quick else 16))
        results[model] = _report(model, found)
    say(f"\nwritten to {save('telemetry', results, options.out)}")
    return 0


def _measure(model: str, rounds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.telemetry"])
    mine, theirs = context.Pipe()
    port = free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, model, rounds, theirs)) for rank in range(2)]
    for process in ranks:
        process.start()
    theirs.close()
    try:
        told: dict[str, Any] = mine.recv()
    except EOFError as error:
        raise SystemExit(f"{model}: the ranks ended before they had measured") from error
    finally:
        for process in ranks:
            process.join()
    return told


def _rank(rank: int, port: int, model: str, rounds: int, driver: Connection) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    step = _training(model)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    with ExitStack() as cleanup:
        bench = cleanup.enter_context(_sinks()) if rank == 0 else None
        for turn in range(rounds + 1):
            for side in SIDES if turn % 2 else SIDES[::-1]:
                if bench is not None:
                    bench.enter(side)
                dist.barrier()
                started = time.perf_counter()
                for at in range(1, STEPS[model] + 1):
                    step()
                    if bench is not None and at % INTERVAL == 0:
                        bench.step(at, (time.perf_counter() - started) / at)
                if bench is not None:
                    bench.boundary()
                if turn:
                    times[side].append((time.perf_counter() - started) / STEPS[model])
        if bench is not None:
            bench.enter("on")
            put_us = bench.puts()
            driver.send({"times": times, "put_us": put_us, "lost": {s: fan.lost for s, fan in bench.fans.items()}})
    dist.destroy_process_group()


def _training(name: str) -> Callable[[], None]:
    """One step of a hand-written loop."""
    workload = WORKLOADS[name]
    model = DistributedDataParallel(workload.task(None).model, gradient_as_bucket_view=True)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    inputs, targets = (tensor[: workload.batch] for tensor in workload.make_data())

    def step() -> None:
        mean_loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Bench:
    """Rank 0's telemetry, switched from side to side."""

    def __init__(self, folder: Path, cleanup: ExitStack) -> None:
        self.fans: dict[str, Fan] = {}
        self._events = EventLog(folder / "events.jsonl", 0, run_id="bench")
        cleanup.callback(self._events.close)
        self._handed: dict[str, Any] = {"off": None}
        self._where: dict[str, tuple[str, str]] = {}
        self._subscribers: dict[str, subprocess.Popen[bytes]] = {}
        for side in SIDES[1:]:
            publisher = Publisher(f"ipc://{folder}/{side}.sock", PacketMaker("bench", side), queue_packets=4096)
            prometheus = PrometheusSink(("127.0.0.1", 0), {"run_id": "bench", "name": side}, {})
            board = TensorBoardSink(folder / side)
            if side == "trouble":
                board._begin = _full_disk  # type: ignore[method-assign]
            self.fans[side] = Fan([publisher, prometheus, board], queue_records=4096, tell=_ignore, interval_s=0.5)
            cleanup.callback(self.fans[side].close)
            self._handed[side] = self.fans[side].put
            self._where[side] = ("127.0.0.1", prometheus.where.split(":")[2].split("/")[0])
            self._subscribers[side] = cleanup.enter_context(_child(SUBSCRIBE, publisher.where))
        self._metrics = {
            side: MetricsLog(folder / f"metrics-{side}.jsonl", listener=self._handed[side]) for side in SIDES
        }
        for log in self._metrics.values():
            cleanup.callback(log.close)
        self._scraper = cleanup.enter_context(_child(SCRAPE, str(SCRAPE_S)))
        # Both subscribers have come by now; from here on one of them never reads.
        time.sleep(1.0)
        self._subscribers["trouble"].send_signal(signal.SIGSTOP)
        self._side = "off"

    def enter(self, side: str) -> None:
        """The steps that follow are of this side."""
        self._side = side
        self._events.listener = self._handed[side]
        mode = {"off": "rest", "on": "scrape", "trouble": "hangup"}[side]
        host, port = self._where.get(side, ("-", "0"))
        if self._scraper.stdin is not None:
            self._scraper.stdin.write(f"{mode} {host} {port}\n".encode())
            self._scraper.stdin.flush()

    def step(self, step: int, seconds: float) -> None:
        """What a run tells of a step."""
        self._metrics[self._side].write(
            step, 0, epoch=1, loss_rank0=0.5, step_s=seconds, samples_per_s=64 / seconds, lr=1e-3,
            **{"lr/early": 1e-4, "lr/late": 1e-4, "alpha/early": 0.5, "alpha/late": 1.0},
        )  # fmt: skip

    def boundary(self) -> None:
        """What a run tells of a boundary."""
        parts = ("validation", "signal", "report", "guard", "packet", "encode", "round_trip", "decision", "broadcast",
                 "check", "apply", "digest", "warm_up", "telemetry", "boundary")  # fmt: skip
        self._events.note(
            "boundary", boundary=1, epoch=1, train_loss=0.5, val_loss=0.5, val_accuracy=0.9, metrics={}, mode="normal",
            latency_ms=dict.fromkeys(parts, 1.0), seeds={"early": "BLENDING", "late": "DORMANT"}, val_noise=0.01,
            signals={"late": {f"signal/{n}": 0.1 for n in range(4)}}, flops_per_sample=10**6,
            owners={"early": {"weight": 1.0, "norm": 0.1, "share": 0.5}}, own_ms=[1.0, 1.0],
        )  # fmt: skip

    def puts(self) -> float:
        """Median microseconds of handing one record to three sinks at work."""
        values = {"reason": "one of many"}
        taken = []
        for at in range(PUTS):
            started = time.perf_counter()
            self.fans["on"].put("event", "info", values, rank=0, step=at, branch=0, wall_ns=1)
            taken.append((time.perf_counter() - started) * 1e6)
        return median(taken)


def _ignore(kind: str, level: str = "info", **fields: object) -> None:
    pass


def _full_disk() -> RecordWriter:
    """The writer of a file on a disk that has no room; its sink closes it."""
    return RecordWriter(os.fdopen(os.open(FULL, os.O_WRONLY), "wb"))


@contextmanager
def _sinks() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="tl-") as folder, ExitStack() as cleanup:
        yield Bench(Path(folder), cleanup)


@contextmanager
def _child(program: str, argument: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", program, argument], stdin=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def _report(model: str, found: dict[str, Any]) -> dict[str, Any]:
    rows, sides = [], {}
    for side in SIDES:
        us, ratio = spread([s * 1e6 for s in found["times"][side]]), ratios(found["times"][side], found["times"]["off"])
        sides[side] = {"us": us, "ratio": ratio}
        rows.append([side, f"{us.median:.0f}", f"{ratio.median:.4f}", f"{ratio.low:.4f} to {ratio.high:.4f}"])
    say(f"\n{model}, 2 ranks, {STEPS[model]} steps a block, {len(found['times']['off'])} blocks of each side")
    say(table(["side", "us a step", "ratio", "quartiles"], rows))
    say(f"handing a record to the sinks: {found['put_us']:.1f} us")
    for side, lost in found["lost"].items():
        say(f"lost, {side}: " + ", ".join(f"{name} {count:g}" for name, count in lost.items()))
    return {"sides": sides, "put_us": found["put_us"], "lost": found["lost"]}


if __name__ == "__main__":
    sys.exit(main())
