"""What does a boundary cost, part by part, and what does each further rank add to it?

Two runs of two ranks under torchrun with a boundary after every step, the policy in a process of its own over ipc, by
rank 0's own clock (`tolaria.telemetry.split`, which says what each part is). All in milliseconds; every boundary but
the first few counts.

    part        a part of a boundary; in capitals the sums that have a budget, taken boundary by boundary
    noop        median and 99th percentile where the policy wants nothing
    one rate    where it changes a learning rate at every boundary: only then there is something to apply and compare
    budget      of the 99th percentile; for BOUNDARY also the goal for its median

    REPORT      report, packet, encode: what the policy is told
    POLICY      round_trip
    COMMANDS    decision, broadcast, check, apply, digest: what it answered, from the log to all ranks
    BOUNDARY    all of it, but for validation, signal and warm_up, which depend on the user's model and data

Then the packet: its size, and the microseconds of building and encoding it, with two seeds and no metrics (which has a
budget) and as the run above sends it.

Last, rank 0's own work among 2 to 1,024 ranks. Simulated (see boundary_ranks.py): a collective returns at once, so
that this is what rank 0 computes, without the network; with the line through the points.

    python -m benchmarks.boundary                       500 boundaries, about a minute
    python -m benchmarks.boundary --quick               40 boundaries, up to 64 ranks, half a minute
    python -m benchmarks.boundary --picture FILE.png    also draw it (pip install 'tolaria[bench]')
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns

import torch

from benchmarks.boundary_ranks import among, fitted, work
from benchmarks.boundary_run import SCRIPT, write_script
from benchmarks.figures import Spread, machine_line, make_parser, markdown, save, say, spread, table
from benchmarks.real_ranks import run_ranks
from tolaria.coordinator.packet import build_packet
from tolaria.leyline.codec import encode_state
from tolaria.leyline.types import HardwareContext, SeedStage, SeedState, SystemState
from tolaria.telemetry.events import read_events

SIDES: dict[str, tuple[str, ...]] = {"noop": (), "one rate": ("--command",)}
WARM_UP = 10
SUMS = {
    "REPORT": ("report", "packet", "encode"),
    "POLICY": ("round_trip",),
    "COMMANDS": ("decision", "broadcast", "check", "apply", "digest"),
    "GUARD": ("guard",),
}
PARTS = (*(part for parts in SUMS.values() for part in parts), "telemetry", "rest")
OUTSIDE = ("validation", "signal")
BUDGET_MS = {"REPORT": 3.5, "POLICY": 12.0, "COMMANDS": 1.5, "GUARD": 1.0, "BOUNDARY": 18.0}
GOAL_MS = 3.0
PACKET_BYTES, PACKET_US = 280, 80
RANKS = (2, 8, 32, 64, 128, 256, 512, 1024)
HEADER = ("part", "noop", "p99", "one rate", "p99", "budget")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; 0."""
    options = _parse(argv)
    torch.set_num_threads(1)
    say(machine_line())
    sides = {side: _spreads(_run(options.boundaries, flags)) for side, flags in SIDES.items()}
    cells = list(_cells(sides))
    say(f"\n2 ranks, {options.boundaries} boundaries of each side, ms\n{table(HEADER, cells)}")
    packet = _packet(2000 if options.quick else 20_000)
    say(f"\n{_packet_text(packet)}")
    found = work([n for n in RANKS if n <= (64 if options.quick else max(RANKS))], 10 if options.quick else 40)
    base_ms, rank_us = fitted(found)
    rows = [[str(ranks), f"{ms:.2f}"] for ranks, ms in found.items()]
    say(f"\nrank 0's own work, simulated\n{table(['ranks', 'ms'], rows)}")
    say(f"{base_ms:.2f} ms, and {rank_us:.2f} us for each rank")
    results = {
        "boundaries": options.boundaries, "budget_ms": BUDGET_MS, "goal_ms": GOAL_MS, "two_ranks_ms": sides,
        "packet": packet, "simulated": {"ms": found, "base_ms": base_ms, "rank_us": rank_us},
        "markdown": markdown(HEADER, cells),
    }  # fmt: skip
    say(f"\nwritten to {save('boundary', results, options.out)}")
    if options.picture is not None:
        from benchmarks.boundary_picture import draw  # noqa: PLC0415 - matplotlib is an extra

        draw(sides, found, (base_ms, rank_us), options.picture)
        say(f"drawn to {options.picture}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, quick="40 boundaries, up to 64 simulated ranks")
    parser.add_argument("--boundaries", type=int, default=0, help="of each side (500; with --quick 40)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it, as PNG, SVG or PDF")
    options = parser.parse_args(argv)
    options.boundaries = options.boundaries or (40 if options.quick else 500)
    if options.boundaries <= 0:
        parser.error(f"--boundaries {options.boundaries}: expected at least one")
    return options


# Two ranks


def _run(boundaries: int, flags: Sequence[str]) -> list[dict[str, float]]:
    """Rank 0's times at every boundary of a run of two ranks, without the first few."""
    with tempfile.TemporaryDirectory(prefix="tolaria-bench-") as folder:
        write_script(Path(folder) / SCRIPT, boundaries + WARM_UP)
        run_ranks(2, "boundary_run", folder, str(boundaries + WARM_UP), *flags)
        events = read_events(Path(folder) / "run" / "events.jsonl", "boundary")
        found: list[dict[str, float]] = [event["latency_ms"] for event in events if event["rank"] == 0]
    if len(found) != boundaries + WARM_UP:
        raise SystemExit(f"the run told of {len(found)} boundaries instead of {boundaries + WARM_UP}")
    return found[WARM_UP:]


def _spreads(boundaries: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Every part and every sum that has a budget."""
    parts = {part: [each.get(part, 0.0) for each in boundaries] for part in (*OUTSIDE, *PARTS)}
    sums = {name: [sum(each.get(part, 0.0) for part in of) for each in boundaries] for name, of in SUMS.items()}
    whole = {"BOUNDARY": [each["boundary"] for each in boundaries]}
    return {name: spread(values) for name, values in (parts | sums | whole).items()}


def _cells(sides: Mapping[str, Mapping[str, Spread]]) -> Iterator[list[str]]:
    for name in next(iter(sides.values())):
        budget = f"{BUDGET_MS[name]:g}" if name in BUDGET_MS else ""
        if name == "BOUNDARY":
            budget += f", median {GOAL_MS:g}"
        values = [f"{value:.2f}" for found in sides.values() for value in (found[name].median, found[name].p99)]
        yield [name, *values, budget]


# The packet


def _packet(repeats: int) -> dict[str, dict[str, float]]:
    """Bytes and microseconds (median) of building and encoding, by kind of packet."""
    with among(2) as rank:
        report, facts = rank.report(), rank.facts
        kinds = {
            "2 seeds, no metrics": _two_seeds,
            "as sent": lambda: build_packet(report, rank.state, facts, [1.0] * 16, 1),
        }
        found = {n: {"bytes": len(encode_state(f())), "us": _timed_us(f, repeats)} for n, f in kinds.items()}
    found["2 seeds, no metrics"] |= {"budget_bytes": PACKET_BYTES, "budget_us": PACKET_US}
    return found


def _two_seeds() -> SystemState:
    """A packet as large as its fields get in practice."""
    seed = SeedState(
        seed_id="blocks.1", stage=SeedStage.BLENDING, gradient_norm=0.125, learning_rate=1e-3, layer_depth=12,
        age_epochs=300, risk_score=0.25,
    )  # fmt: skip
    return SystemState(
        packet_id="3f2a9c5d7e1b4a60", current_epoch=300, global_step=1_000_000, validation_accuracy=0.91,
        validation_loss=0.31, training_loss=0.29, timestamp_ns=1_790_000_000_000_000_000,
        training_run_id="20260101T120000Z-digits-0a1b2c3d", experiment_name="digits",
        hardware=HardwareContext(
            device_type="cuda", device_id="NVIDIA H100 80GB HBM3", total_memory_gb=79.6, available_memory_gb=41.5,
            temperature_celsius=61.0, utilization_percent=98.0, compute_capability=90,
        ),
        seeds=(seed, replace(seed, seed_id="blocks.2")),
    )  # fmt: skip


def _timed_us(build: Callable[[], SystemState], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = perf_counter_ns()
        encode_state(build())
        times.append((perf_counter_ns() - start) / 1e3)
    return spread(times).median


def _packet_text(packet: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [name, f"{kind['bytes']}", f"{kind['us']:.0f}",
         f"{kind['budget_bytes']} bytes, {kind['budget_us']} us" if "budget_us" in kind else ""]
        for name, kind in packet.items()
    ]  # fmt: skip
    return table(["packet", "bytes", "us", "budget"], rows)


if __name__ == "__main__":
    sys.exit(main())
