"""What the benchmarks share: the machine in words, figures of timings, tables, and results as JSON.

Results go to ``build/bench/NAME.json`` unless ``--out`` says otherwise; those that the README quotes lie in
``benchmarks/results/``.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path("build/bench")


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": device,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine_line() -> str:
    """The same on one line."""
    m = machine()
    return (
        f"{m['date']}, {m['machine']}, {m['cores']} cores, {m['device']}, load {m['load']}, torch {m['torch']}, "
        f"Python {m['python']}"
    )


@dataclass(frozen=True)
class Spread:
    """How values lie: ``low`` and ``high`` are the quartiles; ``p99`` of fewer than 100 values is the largest."""

    median: float
    low: float
    high: float
    p99: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("no values to summarise")
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(
        statistics.median(ordered), ordered[round(0.25 * last)], ordered[round(0.75 * last)],
        ordered[min(last, round(0.99 * len(ordered)))], len(ordered),
    )  # fmt: skip


def ratios(side: Sequence[float], base: Sequence[float]) -> Spread:
    """The ratio of two sides that were measured in turns, round by round, so that what slows both cancels."""
    return spread([a / b for a, b in zip(side, base, strict=True)])


def make_parser(doc: str | None, *, quick: str) -> argparse.ArgumentParser:
    """The command line that all have: ``doc`` for its help, ``--quick``, ``--out``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    return parser


def say(text: str = "") -> None:
    """One line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their content, the first to the left, the others to the right."""
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (c.ljust(w) if at == 0 else c.rjust(w) for at, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join((line(header), line(["-" * w for w in widths]), *map(line, rows)))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a table for a README."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def save(name: str, results: Mapping[str, Any], out: Path = RESULTS) -> Path:
    """Write results with the machine they are of; the file's path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1, default=vars) + "\n")
    return path
