"""All benchmarks of speed, one after the other, and one table of what has a budget.

    boundary        a boundary by part, the packet, rank 0 among many ranks
    control_lane    what it costs that all ranks agree
    startup         to the first step, compiled code kept and not
    growth_pause    from a command to the first grown step
    step_latency    a step beside a hand-written loop and beside other trainers
    gpu             step, snapshot and growth on one GPU; only where there is one

Each writes its JSON to the folder of the results, and the table there, README.md, is made of all of them that lie in
it, so that one benchmark can be run again by itself. One that fails is named at the end, and the others go on.

    python -m benchmarks                      all; times are given before each
    python -m benchmarks --quick              all, small; to build/bench instead of benchmarks/results
    python -m benchmarks --only boundary      one of them; can be given more than once
    python -m benchmarks --list               what there is and how long it takes
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import RESULTS, machine_line, markdown, say, table
from benchmarks.headlines import headlines
from benchmarks.real_ranks import ROOT, own_environment

KEPT = Path("benchmarks/results")
HEADER = ("", "measured", "budget", "")


@dataclass(frozen=True)
class Benchmark:
    """``minutes``, ``quick_minutes``: what it takes on two quiet cores."""

    name: str
    minutes: float
    quick_minutes: float


ALL = (
    Benchmark("boundary", 1, 0.5),
    Benchmark("control_lane", 2, 0.5),
    Benchmark("startup", 10, 0.5),
    Benchmark("growth_pause", 15, 0.5),
    Benchmark("step_latency", 25, 1),
    Benchmark("gpu", 10, 3),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; 0, or 1 when one has failed."""
    options = _parse(argv)
    chosen = [b for b in ALL if b.name in options.only or (not options.only and _possible(b.name))]
    minutes = {b.name: b.quick_minutes if options.quick else b.minutes for b in chosen}
    if options.list:
        say(table(["benchmark", "minutes"], [[name, f"{spent:g}"] for name, spent in minutes.items()]))
        return 0
    say(machine_line())
    failed = []
    for at, (name, spent) in enumerate(minutes.items(), start=1):
        left = sum(list(minutes.values())[at - 1 :])
        say(f"\n[{at}/{len(minutes)}] {name}: about {spent:g} min; {left:g} min to the end of all\n")
        started = time.monotonic()
        if not _run(name, options.out, quick=options.quick):
            failed.append(name)
        say(f"\n{name}: {(time.monotonic() - started) / 60:.1f} min")
    say(f"\n{_write_table(options.out)}")
    if failed:
        say(f"failed: {', '.join(failed)}; what they printed says why")
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="each as small as it gets")
    parser.add_argument("--only", action="append", choices=[b.name for b in ALL], default=[], help="this one")
    parser.add_argument("--list", action="store_true", help="say what would be run, and how long it takes")
    parser.add_argument("--out", type=Path, help=f"folder of the results ({KEPT}; with --quick {RESULTS})")
    options = parser.parse_args(argv)
    options.out = (options.out or (RESULTS if options.quick else KEPT)).absolute()
    return options


def _possible(name: str) -> bool:
    return name != "gpu" or torch.cuda.is_available()


def _run(name: str, out: Path, *, quick: bool) -> bool:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *["--quick"] * quick]
    return subprocess.run(command, cwd=ROOT, env=own_environment(), check=False).returncode == 0


def _write_table(out: Path) -> str:
    """README.md beside the results that lie in ``out``; the same for a terminal."""
    shown, parts = [], ["# Results", "", "Written by `python -m benchmarks`; what each row is: [README](../README.md)."]
    for name in (b.name for b in ALL):
        file = out / f"{name}.json"
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text())
            rows = [headline.cells for headline in headlines(name, found)]
            on = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
            parts += ["", f"## {name}", "", f"{on}.", "", markdown(HEADER, rows)]
            shown += rows
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text("\n".join(parts) + "\n")
    plain = [[cell.strip("*") for cell in row] for row in shown]
    return f"{table(HEADER, plain)}\n\nwritten to {out / 'README.md'}"


if __name__ == "__main__":
    sys.exit(main())
