"""How long from the start of the process to the end of the first step, and what of it is compiling?

Real runs of `tolaria.build.train` (byte-level GPT, 0.3 M parameters, no policy), each in processes of its own. All
times in seconds, of rank 0; medians over rounds, sides in turns.

    ranks     processes that train together
    side      first: a new run; restart: it goes on from its checkpoint
    code      eager: nothing is compiled; cold: there is no .compile_cache; warm: an earlier run has left one
    import    Python, torch, Tolaria
    group     process group
    build     task, model, run directory, checkpoint read, compiled code taken up, one validation batch
    compile   structure and optimizer compiled and tried
    step      the rest, to the end of the first step
    total     all of it
    budget    of the total: a warm restart takes at most half of a cold one

    python -m benchmarks.startup            1 and 2 ranks, 3 rounds: 10 minutes
    python -m benchmarks.startup --quick    1 rank, eager, 1 round: 25 seconds
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import machine_line, make_parser, markdown, save, say, spread, table
from benchmarks.real_ranks import run_ranks

PARTS = ("import", "group", "build", "compile", "step")
SIDES = (("first", "cold"), ("restart", "cold"), ("first", "warm"), ("restart", "warm"))
EAGER = (("first", "eager"), ("restart", "eager"))
HEADER = ("side", "code", "ranks", *PARTS, "total", "budget")
HOST = {"layers": 2, "features": 96, "heads": 4, "context": 64, "max_train_bytes": 100_000}


def main() -> int:
    """Measure and print; 0."""
    parser = make_parser(__doc__, quick="1 rank, eager, 1 round")
    parser.add_argument("--ranks", type=int, choices=(1, 2), help="so many ranks only")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every side (default: 3)")
    parser.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        return start(**options.rank_of)
    say(machine_line())
    rows: list[dict[str, Any]] = []
    for ranks in [options.ranks] if options.ranks else [1] if options.quick else [1, 2]:
        rounds = [_round(ranks, compiled=not options.quick) for _ in range(1 if options.quick else options.rounds)]
        rows += [
            {"side": side, "code": code, "ranks": ranks, **_medians([r[side, code] for r in rounds])}
            for side, code in rounds[0]
        ]
    cells = [_cells(row, rows) for row in rows]
    say("\n" + table(HEADER, cells))
    save("startup", {"rows": rows, "markdown": markdown(HEADER, cells)}, options.out)
    return 0


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {part: spread([each[part] for each in rounds]).median for part in (*PARTS, "total")}


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    cold = [r for r in rows if (r["side"], r["code"], r["ranks"]) == ("restart", "cold", row["ranks"])]
    budget = f"{cold[0]['total'] / 2:.1f}" if cold and (row["side"], row["code"]) == ("restart", "warm") else ""
    return [row["side"], row["code"], str(row["ranks"]), *(f"{row[part]:.2f}" for part in (*PARTS, "total")), budget]


def _round(ranks: int, *, compiled: bool) -> dict[tuple[str, str], dict[str, float]]:
    """Every side once. A cold restart leaves behind what makes the next two warm."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for side, code in (*EAGER, *(SIDES if compiled else ())):
            if code == "cold":
                shutil.rmtree(Path(folder) / ".compile_cache", ignore_errors=True)
            run = {"folder": folder, "name": code, "resume": side == "restart", "compiled": code != "eager"}
            found[side, code] = _start(ranks, run)
    return found


def _start(ranks: int, run: dict[str, Any]) -> dict[str, float]:
    told = Path(run["folder"]) / "times.json"
    run_ranks(ranks, "startup", "--rank-of", json.dumps({**run, "times": str(told), "started": time.time()}))
    found: dict[str, float] = json.loads(told.read_text())
    return found


# In each rank


def start(*, folder: str, name: str, resume: bool, compiled: bool, times: str, started: float) -> int:
    """Train two steps, and write when what was over to ``times``; 0."""
    from tolaria import build, config, dist  # noqa: PLC0415 - what is measured
    from tolaria.replica import Replica  # noqa: PLC0415
    from tolaria.step import TrainStep  # noqa: PLC0415
    from tolaria.tasks import stdlib_gpt  # noqa: PLC0415

    at = {"import": time.time()}
    build.init_world = _noting(dist.init_world, at, after="group")
    Replica.warm_up = _noting(Replica.warm_up, at, before="build", after="compile")  # type: ignore[method-assign]
    TrainStep.__call__ = _noting(TrainStep.__call__, at, after="step")  # type: ignore[method-assign]
    build.train(
        config.Config(
            run=config.RunConfig(name=name, dir=f"{folder}/{name}", resume="auto" if resume else "no"),
            train=config.TrainConfig(max_steps=4 if resume else 2, batch_size=8),
            compile=config.CompileConfig(enabled=compiled),
            tamiyo=config.TamiyoConfig(policy="none"),
            dist=config.DistConfig(device="cpu"),
            log=config.LogConfig(progress="off"),
        ),
        task=partial(stdlib_gpt.make_task, **HOST),  # type: ignore[arg-type]
    )
    if os.environ.get("RANK", "0") == "0":
        ends = [started, *(at[part] for part in PARTS)]
        spent = {part: ends[n + 1] - ends[n] for n, part in enumerate(PARTS)}
        Path(times).write_text(json.dumps({**spent, "total": at["step"] - started}))
    return 0


def _noting(work: Callable[..., Any], at: dict[str, float], *, after: str, before: str = "") -> Callable[..., Any]:
    """``work``, which notes when it was first called and when that was over."""

    def noted(*arguments: Any, **options: Any) -> Any:
        if before:
            at.setdefault(before, time.time())
        result = work(*arguments, **options)
        at.setdefault(after, time.time())
        return result

    return noted


if __name__ == "__main__":
    sys.exit(main())
