"""What does a step cost beside a loop written by hand, and beside other trainers?

Each side trains the same model in processes of its own; a gate in the data set lets one side at a time take a block of
steps, in turns, and the order of the turns changes. So all sides see the same machine.

    us        microseconds of a step: median of the blocks; a block's time is that of its slowest rank
    ratio     to the hand-written loop, block by block: median, and the quartiles beside it
    over      microseconds above the hand-written loop

    mlp, cnn, gpt   three linear layers; three convolutions; a GPT of four blocks (see latency_workloads.py)
    dormant         the model has a slot, with nothing in it
    training        a seed learns on its shadow branch: a second forward and backward pass from the slot on
    blending        a seed is being blended in; the hand-written loop has the same seed in its model
    defaults        with snapshots in memory and comparisons of the ranks, which the other cells leave out

The breakdown comes from blocks of their own, in which the phases of a step are timed; "backward" contains the reduction
over ranks. Every process has one thread and the same memory settings (`tolaria.process.keep_freed_memory`).

    python -m benchmarks.step_latency                     all cells, about 25 minutes on two quiet cores
    python -m benchmarks.step_latency --quick             the tiny model, Tolaria and the hand-written loop
    python -m benchmarks.step_latency --cells 'gpt*'      cells whose name matches
    python -m benchmarks.step_latency --runs 3 --peers    cells with peers only, three times, in fresh processes
"""

import argparse
import multiprocessing
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from benchmarks.figures import machine_line, make_parser, ratios, save, say, spread, table
from benchmarks.latency_sides import TIMED, Cell, Seat, sit
from benchmarks.latency_workloads import WORKLOADS

HAND, TOLARIA, DEFAULTS = "hand-written", "tolaria", "tolaria, defaults"
PEERS = ("accelerate", "fabric", "lightning")
START_S = 600.0
SETTLE_ROUNDS = 2
TARGETS = {"mlp": 1.05}
TARGET = 1.02


@dataclass
class Result:
    """One cell: microseconds of each block by side, and the mean microseconds of each phase by timed side."""

    cell: Cell
    times_us: dict[str, list[float]]
    phases_us: dict[str, dict[str, float]] = field(default_factory=dict)


class Side:
    """The processes of one side, one per rank."""

    def __init__(self, context: ForkServerContext, name: str, cell: Cell, folder: str) -> None:
        self.name = name
        port = free_port()
        self._drivers, self._processes = [], []
        for rank in range(cell.ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=sit, args=(name, Seat(cell, rank, port, folder, theirs)))
            process.start()
            theirs.close()
            self._drivers.append(mine)
            self._processes.append(process)

    def wait(self) -> tuple[float, dict[str, float]]:
        """Seconds that the slowest rank took to its gate, and rank 0's phases. Raises SystemExit when one has ended."""
        told = []
        for driver, process in zip(self._drivers, self._processes, strict=True):
            try:
                if not driver.poll(START_S):
                    raise SystemExit(f"{self.name}: a rank stood still for {START_S:.0f} s")
                told.append(driver.recv())
            except EOFError as error:
                process.join()
                raise SystemExit(f"{self.name}: a rank ended (exit code {process.exitcode})") from error
        return max(seconds for seconds, _ in told), told[0][1]

    def run(self, microbatches: int) -> tuple[float, dict[str, float]]:
        """Let it read so many microbatches; as `wait`."""
        for driver in self._drivers:
            driver.send(microbatches)
        return self.wait()

    def close(self) -> None:
        """End it, whatever it is doing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; 0."""
    options = _parse(argv)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.latency_seeds"])
    say(machine_line())
    results = []
    with ExitStack() as cleanup:
        folder = tempfile.mkdtemp(prefix="tolaria-bench-", dir="/dev/shm")
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        for cell, sides in _cells(options):
            _prepare(context, cell, folder)
            result = measure(context, cell, sides, folder, options.rounds)
            say(f"\n{_text(result)}")
            results.append(result)
    path = save("step_latency", {"cells": list(map(_as_json, results))}, options.out)
    say(f"\nwritten to {path}")
    return 0


def measure(context: ForkServerContext, cell: Cell, names: Sequence[str], folder: str, rounds: int) -> Result:
    """All sides of one cell, in turns."""
    block = max(1, WORKLOADS[cell.workload].block // cell.accumulation)
    times: dict[str, list[float]] = {name: [] for name in names if not name.endswith(TIMED)}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in names if name.endswith(TIMED)}
    with ExitStack() as cleanup:
        sides = []
        for name in names:
            sides.append(Side(context, name, cell, folder))
            cleanup.callback(sides[-1].close)
            sides[-1].wait()
        for turn in range(SETTLE_ROUNDS + rounds):
            # Each side comes after each other one now and then: what one leaves in the caches, all find.
            first = turn % len(sides)
            for side in (sides[first:] + sides[:first])[:: 1 if turn % 2 else -1]:
                seconds, seen = side.run(block * cell.accumulation)
                if turn >= SETTLE_ROUNDS and side.name in times:
                    times[side.name].append(seconds * 1e6 / block)
                elif turn >= SETTLE_ROUNDS:
                    phases[side.name].append({phase: s * 1e6 / block for phase, s in seen.items()})
    means = {
        name.removesuffix(TIMED): {p: sum(s.get(p, 0.0) for s in seen) / len(seen) for p in seen[0]}
        for name, seen in phases.items()
    }
    return Result(cell, times, means)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, quick="the tiny model eager, 1 and 2 ranks, without peers")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help="cells whose name matches a shell pattern")
    parser.add_argument("--peers", action="store_true", help="only the cells in which peers take part")
    parser.add_argument("--runs", type=int, default=1, help="measure each cell so many times, in fresh processes")
    parser.add_argument("--rounds", type=int, default=0, help="blocks of each side (40; with --quick 10)")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (10 if options.quick else 40)
    return options


def _cells(options: argparse.Namespace) -> Iterator[tuple[Cell, list[str]]]:
    """Every cell with its sides."""
    timed = [HAND + TIMED, TOLARIA + TIMED]
    peers = [peer for peer in PEERS if find_spec(peer.replace("fabric", "lightning")) is not None]
    if len(peers) < len(PEERS):
        say(f"not installed: {', '.join(set(PEERS) - set(peers))} (pip install 'tolaria[bench]')")
    for _ in range(options.runs):
        for cell, sides in _all_cells(peers):
            if options.quick and (cell.workload != "mlp" or cell.compiled or sides == [HAND, TOLARIA]):
                continue
            if (options.peers and sides == [HAND, TOLARIA]) or not fnmatchcase(cell.name, options.cells):
                continue
            if options.quick:
                yield cell, [HAND, TOLARIA, *timed]
            else:
                yield cell, sides if sides == [HAND, TOLARIA] else [*sides, *timed]


def _all_cells(peers: Sequence[str]) -> Iterator[tuple[Cell, list[str]]]:
    for workload in WORKLOADS:
        for ranks in (1, 2):
            for compiled in (False, True):
                yield Cell(workload, ranks, compiled), [HAND, TOLARIA, DEFAULTS, *peers]
    for workload in WORKLOADS:
        for ranks in (1, 2):
            yield Cell(workload, ranks, amp=True), [HAND, TOLARIA]
            yield Cell(workload, ranks, accumulation=4), [HAND, TOLARIA]
            for seed in ("dormant", "training", "blending"):
                yield Cell(workload, ranks, seed=seed), [HAND, TOLARIA]


def _prepare(context: ForkServerContext, cell: Cell, folder: str) -> None:
    """The run with a seed that the cell goes on from, unless it is there."""
    from benchmarks.latency_seeds import STEPS, grow, grown_run  # noqa: PLC0415 - imports all of Tolaria

    if cell.seed in STEPS and not Path(grown_run(folder, cell.workload, cell.seed)).exists():
        process = context.Process(target=grow, args=(cell.workload, cell.seed, folder))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{cell.name}: growing the seed failed (exit code {process.exitcode})")


def _text(result: Result) -> str:
    base = result.times_us[HAND]
    rows = []
    for name, times in result.times_us.items():
        us, ratio = spread(times), ratios(times, base)
        quartiles = f"{ratio.low:.3f} to {ratio.high:.3f}"
        judged = _target(result.cell) if name == TOLARIA else None
        target = f"{judged:.2f}" if judged is not None else ""
        over = f"{us.median - spread(base).median:+.0f}"
        rows.append([name, f"{us.median:.0f}", f"{ratio.median:.3f}", quartiles, target, over])
    text = f"{result.cell.name}\n{table(['', 'us', 'ratio', 'quartiles', 'target', 'over'], rows)}"
    if result.phases_us:
        names = sorted({phase for each in result.phases_us.values() for phase in each})
        lines = [
            [side, *(f"{each[n]:.0f}" if n in each else "" for n in names)] for side, each in result.phases_us.items()
        ]
        text += f"\n\n{table(['us in', *names], lines)}"
    return text


def _target(cell: Cell) -> float | None:
    """What the ratio should be at most; a seed that learns beside the host does more than the hand-written loop."""
    return TARGETS.get(cell.workload, TARGET) if cell.seed != "training" else None


def _as_json(result: Result) -> dict[str, Any]:
    base = result.times_us[HAND]
    sides = {name: {"us": spread(t), "ratio": ratios(t, base)} for name, t in result.times_us.items()}
    return {
        "cell": asdict(result.cell), "name": result.cell.name, "target": _target(result.cell), "sides": sides,
        "phases_us": result.phases_us,
    }  # fmt: skip


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
