"""How long from an emergency of level 4 to the acknowledgement of every rank? Two processes, their pulses, a watchdog.

    idle     the ranks sleep
    torch    one matrix product after another, each of some tenths of a second
    python   a loop in Python
    regex    rank 1 holds the interpreter lock for seconds: its pulse cannot answer, the watchdog stops it and does

Budget: 100 ms. A rank that was stopped goes on when the level is cleared, at the latest after the watchdog's limit.

    python benchmarks/emergency.py            100 emergencies each: about two minutes
    python benchmarks/emergency.py --quick    10 each
"""

import argparse
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from tolaria.process import start_time
from tolaria.recovery.page import OPERATOR, Page, Phase
from tolaria.recovery.pulse import Pulse
from tolaria.recovery.watchdog import WatchdogProcess

LOADS = ("idle", "torch", "python", "regex")
RANKS = 2
ANSWER_S = 10.0
LIMITS = {"heartbeat": 600.0}


def main() -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 emergencies of each kind")
    parser.add_argument("--rank", nargs=3, metavar=("PAGE", "RANK", "LOAD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return work(Path(options.rank[0]), int(options.rank[1]), options.rank[2])
    now = f"{datetime.now(UTC):%Y-%m-%d}"
    sys.stdout.write(f"{now}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, milliseconds\n")
    sys.stdout.write(f"{'':<10}{'p50':>8}{'p99':>8}{'max':>8}   answered by the watchdog\n")
    for load in LOADS:
        times, stopped = measure(load, 10 if options.quick else 100)
        p99 = sorted(times)[max(0, round(0.99 * len(times)) - 1)]
        figures = f"{statistics.median(times):>8.1f}{p99:>8.1f}{max(times):>8.1f}"
        sys.stdout.write(f"{load:<10}{figures}   {stopped} of {len(times)}\n")
        sys.stdout.flush()
    return 0


def measure(load: str, emergencies: int) -> tuple[list[float], int]:
    """Milliseconds to the last acknowledgement of each, and how many the watchdog gave."""
    chance, times, stopped = random.Random(7), list[float](), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = Page.create(folder / "page", local_ranks=RANKS)
        watchdog = WatchdogProcess(page, LIMITS, folder, "benchmark", list(range(RANKS)))
        command = [sys.executable, __file__, "--rank", str(page.path)]
        ranks = [
            subprocess.Popen([*command, str(rank), load], stdout=subprocess.PIPE, text=True) for rank in range(RANKS)
        ]
        try:
            for process in ranks:
                if process.stdout is None or not process.stdout.readline():
                    raise RuntimeError("a rank did not start; its own output says why")
            operator = Page.attach(page.path, line=OPERATOR)
            for _ in range(emergencies):
                time.sleep(0.3 + 0.3 * chance.random())
                start = time.monotonic_ns()
                operator.raise_level(4, "benchmark")
                wait_for_all(operator)
                lines = [operator.rank_line(rank) for rank in range(RANKS)]
                times.append(max(line.ack_ns - start for line in lines) / 1e6)
                stopped += any(line.stopped for line in lines)
                operator.clear()
                wait_for_all(operator)
            operator.close()
        finally:
            for process in ranks:
                process.kill()
                process.communicate()
            watchdog.close()
            page.close()
    return times, stopped


def wait_for_all(page: Page) -> None:
    """Until every rank has acknowledged the newest alarm or its end. Raises TimeoutError."""
    token, end = page.token(), time.monotonic() + ANSWER_S
    while any(page.rank_line(rank).ack < token for rank in range(RANKS)):
        if time.monotonic() > end:
            raise TimeoutError(f"no acknowledgement within {ANSWER_S:g} s")
        time.sleep(0.001)


def work(path: Path, rank: int, load: str) -> int:
    """One rank, for ever."""
    torch.set_num_threads(1)
    page = Page.attach(path, line=2 + rank)
    page.sign_in(start_time(os.getpid()))
    Pulse(page).start()
    page.enter(Phase.STEP, 1)
    sys.stdout.write("in\n")
    sys.stdout.flush()
    matrix = torch.rand(1536, 1536)
    while True:
        if load == "torch":
            torch.mm(matrix, matrix)
        elif load == "python":
            sum(i * i for i in range(1_000_000))
        elif load == "regex" and rank == 1:
            re.match("(a?){24}a{24}", "a" * 24)
        else:
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
