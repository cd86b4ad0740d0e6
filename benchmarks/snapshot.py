"""What does a snapshot in memory cost, and how fast does it come back?

Sides take turns within one run; the state is float32 tensors of 16 MB, in one process.

    memcpy          `torch._foreach_copy_` between two states in memory
    first, later    SnapshotRing.take: the first one also makes and touches the memory
    hashing         of it, the hashes that the ranks are compared by
    copy back       what a return does with it; CONFIRM hashes once more
    torch           torch.save and torch.load to /dev/shm

    python benchmarks/snapshot.py            0.1, 0.5, 1 and 2 GB
    python benchmarks/snapshot.py --quick    0.1 GB
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from torch import Tensor

from tolaria.compare import tensor_hashes
from tolaria.recovery.snapshots import SnapshotRing, copy_back
from tolaria.recovery.staging import Payload

SHM = Path("/dev/shm")  # noqa: S108 - where snapshots lie
TENSOR_ELEMENTS = 4 * 1024 * 1024
REPEATS = 7


def main() -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.1 GB only")
    sizes = [0.1] if parser.parse_args().quick else [0.1, 0.5, 1.0, 2.0]
    torch.set_num_threads(1)
    _say(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, torch {torch.__version__}, one thread, ms (GB/s)\n")
    _say(f"{'side':<16}" + "".join(f"{size:>10.1f} GB" for size in sizes))
    columns = []
    for size in sizes:
        # Two states, two snapshots, and what torch.save writes.
        if 5 * size * 1e9 > psutil.virtual_memory().available:
            _say(f"{size} GB left out: not enough free memory")
            continue
        columns.append((size, _measure(size)))
    for side in columns[0][1]:
        cells = (f"{ms[side]:>7.0f} ({size / ms[side] * 1e3:4.1f})" for size, ms in columns)
        _say(f"{side:<16}" + "".join(f"{cell:>13}" for cell in cells))
    ratios = ", ".join(f"{ms['memcpy'] / ms['copy back']:.2f}" for _, ms in columns)
    _say(f"\ncopy back, as a share of memcpy's bandwidth: {ratios}")
    return 0


def _measure(size: float) -> dict[str, float]:
    count = max(1, round(size * 1e9 / 4 / TENSOR_ELEMENTS))
    live = {f"t{i}": torch.randn(TENSOR_ELEMENTS) for i in range(count)}
    other = {name: tensor.clone() for name, tensor in live.items()}
    ring = SnapshotRing(
        run_id="benchmark", generation="0", rank=0, run_dir=Path.cwd(), slots=2, limit_bytes=2**40, directory=SHM,
        pinned=False,
    )  # fmt: skip
    file = SHM / "tolaria-benchmark.pt"
    try:
        spent = {"first": _timed(lambda: _take(ring, live))}
        _take(ring, live)
        sides: dict[str, Callable[[], object]] = {
            "memcpy": lambda: torch._foreach_copy_(list(other.values()), list(live.values())),
            "later": lambda: _take(ring, live),
            "hashing": lambda: tensor_hashes(live),
            "copy back": lambda: copy_back(ring.get(ring.held()[-1].seq).tensors, live, lambda: False),
            "torch.save": lambda: torch.save(live, file),
            "torch.load": lambda: torch.load(file, weights_only=True),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(REPEATS):
            for name, side in sides.items():
                times[name].append(_timed(side))
        return {"memcpy": 0.0, **spent, **{name: statistics.median(values) for name, values in times.items()}}
    finally:
        ring.close(remove=True)
        file.unlink(missing_ok=True)


def _take(ring: SnapshotRing, tensors: dict[str, Tensor]) -> None:
    taken = ring.take(Payload(step=1, tensors=tensors, meta={}, local_tensors={}, local_meta={}))
    if taken is None:
        raise SystemExit(f"no snapshot: {ring.disabled}")
    ring.confirm(taken.info.seq)


def _timed(side: Callable[[], object]) -> float:
    start = time.perf_counter()
    side()
    return (time.perf_counter() - start) * 1e3


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
