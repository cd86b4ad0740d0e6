"""Does growing pay? Two problems trained in five ways, compared at equal training FLOPs on data that nobody has seen.

    small               the small host alone
    grown               the same host, grown by the heuristic policy while it trains
    large               a host of the grown size from the start: the seeds that "grown" kept, in place from step 0
    small, same FLOPs   the small host, trained for as many FLOPs as "grown" took
    large, same FLOPs   the large host likewise: it sees fewer samples

All see the same data in the same order, with the schedule of the learning rate stretched over each run. FLOPs are those
of every step as it was computed, shadow branches of seeds in training included, and of what "grown" measures at
boundaries beyond the validation that all sides have (growth_sides.py). The report split is seen by nothing but this
table (growth_problems.py); the policy was tuned with run seeds from 100 on, the table's begin at 0.

One thread per process, two processes at most, eager: compile time is in nobody's figures.

    python benchmarks/growth.py                      5 run seeds
    python benchmarks/growth.py --quick              2 run seeds
    python benchmarks/growth.py --picture FILE.png   also draw it (pip install 'tolaria[bench]')
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from growth_problems import PROBLEMS
from growth_sides import SIDES, Result, run_all

MAX_PROCESSES = 2


def table(results: Sequence[Result]) -> str:
    """Mean and standard deviation over run seeds of each side, and how often growing won."""
    lines = []
    for problem in dict.fromkeys(r.problem for r in results):
        rows = [r for r in results if r.problem == problem]
        lines.append(
            f"\n{problem:<19}{'report loss':>17}{'accuracy':>16}{'parameters':>12}{'GFLOP':>17}{'seconds':>15}"
        )
        for side in SIDES:
            mine = [r for r in rows if r.side == side]
            lines.append(
                f"{side:<19}{_spread(mine, lambda r: r.report_loss, '.4f'):>17}"
                f"{_spread(mine, lambda r: r.report_accuracy * 100, '.1f') + ' %':>16}"
                f"{statistics.mean(r.parameters for r in mine):>12,.0f}"
                f"{_spread(mine, lambda r: r.flops / 1e9, '.2f'):>17}{_spread(mine, lambda r: r.seconds, '.0f'):>15}"
            )
        lines += [_against(rows, other) for other in SIDES if other != "grown"]
    return "\n".join(lines)


def _against(rows: Sequence[Result], other: str) -> str:
    """Report loss of the grown model minus another side's, run seed by run seed."""
    losses = {(r.side, r.run_seed): r.report_loss for r in rows}
    seeds = sorted({r.run_seed for r in rows})
    gains = [losses[other, seed] - losses["grown", seed] for seed in seeds]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    won = sum(gain > 0 for gain in gains)
    return (
        f"  grown against {other + ':':<19}{statistics.mean(gains):+.4f} +- {error:.4f} loss less "
        f"(standard error), better in {won} of {len(gains)}"
    )


def _spread(results: Sequence[Result], value: Callable[[Result], float], form: str) -> str:
    values = [value(r) for r in results]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {deviation:{form}}"


def main() -> int:
    """Run all sides for every problem and run seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="run seeds (default: 5)")
    parser.add_argument("--first", type=int, default=0, help="the first run seed (default: 0)")
    parser.add_argument("--quick", action="store_true", help="2 run seeds")
    parser.add_argument("--problem", choices=sorted(PROBLEMS), help="only this one")
    parser.add_argument("--processes", type=int, default=MAX_PROCESSES, choices=range(1, MAX_PROCESSES + 1))
    parser.add_argument("--json", type=Path, help="write every run's figures and points to this file")
    parser.add_argument("--picture", type=Path, help="draw report loss against training FLOPs into this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread")
    names = [options.problem] if options.problem else list(PROBLEMS)
    seeds = range(options.first, options.first + (2 if options.quick else options.seeds))
    jobs = [(name, seed) for seed in seeds for name in reversed(names)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        futures = [pool.submit(run_all, name, seed, ()) for name, seed in jobs]
        results = sorted((r for f in futures for r in f.result()), key=lambda r: (names.index(r.problem), r.run_seed))
    print(table(results))
    record = {"date": datetime.now(UTC).isoformat(), "torch": torch.__version__, "runs": [asdict(r) for r in results]}
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.picture is not None:
        from growth_picture import draw  # noqa: PLC0415  matplotlib is not needed for the table

        draw(results, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
