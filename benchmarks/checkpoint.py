"""What a durable checkpoint costs: how long training waits, until it is on the disk, and to load it again.

    memcpy      a copy into memory that was touched before: what no copy can beat
    tolaria     every tensor hashed, every file synced, committed by rename; loading checks every hash
    torch       torch.save and fsync, torch.load: training waits for all of it, nothing is checked
    dcp         torch.distributed.checkpoint: save, async_save (training waits for its copy), load

One process, float32 tensors of 16 MB, sides interleaved, median of the repeats. Files are in the page cache when they
are loaded. Also: the rates of the hashes, and an append to the log of decisions.

    python benchmarks/checkpoint.py                 0.1, 0.5, 1 and 2 GB, 3 repeats: about three minutes
    python benchmarks/checkpoint.py --quick         0.1 GB, 1 repeat
    python benchmarks/checkpoint.py --device cuda   tensors on a GPU
"""

import argparse
import hashlib
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tolaria.dist import Peers
from tolaria.recovery.checkpoint import CheckpointWriter, Payload, load_newest
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.wal import Wal, WalKind

TENSOR_BYTES = 16_000_000
SIZES_GB = (0.1, 0.5, 1.0, 2.0)
ALONE = Peers(None, 0, 1)
Times = dict[str, list[float]]


def make_state(size_gb: float, device: str) -> dict[str, torch.Tensor]:
    """Tensors of random numbers, together of this size."""
    count = max(1, round(size_gb * 1e9 / TENSOR_BYTES))
    return {f"layer.{i}.weight": torch.randn(TENSOR_BYTES // 4, device=device) for i in range(count)}


def measure(work: Callable[[], object]) -> float:
    """Seconds of wall time, with the device idle before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Tolaria:
    """Our checkpoints of one state, again and again."""

    def __init__(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        self.state = state
        self.root = folder / "ckpt"
        self.wal, _ = Wal.open(
            folder / "wal", run_id="bench", generation="g", facts={}, fs=FileOps(), check_owner=lambda: None
        )
        self.writer = CheckpointWriter(
            self.root, run_id="bench", generation="g", peers=ALONE, fs=FileOps(), keep=1, wal=self.wal
        )
        self.step = 0

    def save(self) -> tuple[float, float]:
        """Seconds that training waits, and until the checkpoint is durable."""
        self.step += 1
        payload = Payload(step=self.step, tensors=self.state, meta={}, local_tensors={}, local_meta={})
        start = time.perf_counter()
        blocked = measure(lambda: self.writer.save(payload))
        self.writer.wait(600)
        total = time.perf_counter() - start
        (outcome,) = self.writer.poll()
        if outcome.error is not None:
            raise RuntimeError(outcome.error)
        return blocked, total

    def load(self) -> None:
        """Load and check the newest."""
        load_newest(self.root, ALONE, FileOps(), report=lambda kind, details: None)

    def close(self) -> None:
        """End the thread and close the log."""
        self.writer.close()
        self.wal.close()


def save_torch(state: dict[str, torch.Tensor], path: Path) -> None:
    """torch.save, durable."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def one_size(size_gb: float, device: str, repeats: int, folder: Path) -> Times:
    """Seconds of every side, in turns."""
    state = make_state(size_gb, device)
    times: Times = defaultdict(list)
    touched = {
        name: torch.zeros_like(tensor, device="cpu", pin_memory=device != "cpu") for name, tensor in state.items()
    }
    tolaria = Tolaria(state, folder)
    times["tolaria: training waits, first"].append(tolaria.save()[0])
    for _ in range(repeats):
        times["memcpy"].append(measure(lambda: [touched[n].copy_(t, non_blocking=True) for n, t in state.items()]))
        blocked, total = tolaria.save()
        times["tolaria: training waits"].append(blocked)
        times["tolaria: until durable"].append(total)
        times["tolaria: load"].append(measure(tolaria.load))
        times["torch: save + fsync"].append(measure(lambda: save_torch(state, folder / "torch.pt")))
        times["torch: load"].append(measure(lambda: torch.load(folder / "torch.pt", map_location="cpu")))
        one_dcp(state, folder / "dcp", times)
    tolaria.close()
    return times


def one_dcp(state: dict[str, torch.Tensor], place: Path, times: Times) -> None:
    """The three operations of torch.distributed.checkpoint."""
    times["dcp: save"].append(measure(lambda: dcp.save(state, checkpoint_id=str(place))))
    shutil.rmtree(place)
    start = time.perf_counter()
    future = dcp.async_save(state, checkpoint_id=str(place))
    times["dcp: async_save, training waits"].append(time.perf_counter() - start)
    (future if isinstance(future, Future) else future.upload_completion).result()
    times["dcp: async_save, until written"].append(time.perf_counter() - start)
    into = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in state.items()}
    times["dcp: load (in place)"].append(measure(lambda: dcp.load(into, checkpoint_id=str(place))))
    shutil.rmtree(place)


def hash_rates() -> dict[str, float]:
    """GB per second on one core."""
    tensor = torch.randn(64_000_000)
    view = tensor.numpy().data.cast("B")
    sides: dict[str, Callable[[], object]] = {
        "sha256": lambda: hashlib.sha256(view),
        "crc32": lambda: zlib.crc32(view),
        "torch.hash_tensor": lambda: torch.hash_tensor(tensor),
    }
    return {name: view.nbytes / 1e9 / min(measure(work) for _ in range(3)) for name, work in sides.items()}


def wal_latency(folder: Path, count: int) -> tuple[float, float, float]:
    """Milliseconds of an append of 600 bytes: median, 99th percentile, largest."""
    wal, _ = Wal.open(folder / "log", run_id="bench", generation="g", facts={}, fs=FileOps(), check_owner=lambda: None)
    body = bytes(600)
    times = sorted(measure(lambda: wal.append(WalKind.DECISION, body)) * 1e3 for _ in range(count))
    wal.close()
    return times[count // 2], times[count * 99 // 100], times[-1]


def print_table(results: dict[float, Times]) -> None:
    """Milliseconds, one column per size, and the rate at the largest."""
    sizes = list(results)
    largest = sizes[-1]
    print("| milliseconds | " + " | ".join(f"{size:g} GB" for size in sizes) + f" | GB/s at {largest:g} GB |")
    print("|---|" + "---:|" * (len(sizes) + 1))
    for side in results[largest]:
        medians = [statistics.median(results[size][side]) for size in sizes]
        cells = " | ".join(f"{seconds * 1e3:,.0f}" for seconds in medians)
        print(f"| {side} | {cells} | {largest / medians[-1]:.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a durable checkpoint costs.")
    parser.add_argument("--quick", action="store_true", help="0.1 GB, one repeat")
    parser.add_argument("--device", default="cpu", help="where the tensors are: cpu or cuda")
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure")
    options = parser.parse_args()
    sizes, repeats = ((0.1,), 1) if options.quick else (SIZES_GB, 3)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads, tensors on {options.device}",
          file=sys.stderr)  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
        results = {}
        for size in sizes:
            (folder / f"{size:g}").mkdir()
            results[size] = one_size(size, options.device, repeats, folder / f"{size:g}")
            shutil.rmtree(folder / f"{size:g}")
            print(f"{size:g} GB done", file=sys.stderr)
        print_table(results)
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in hash_rates().items())
        print(f"\nHashes, GB/s on one core: {rates}")
        median, p99, largest = wal_latency(folder, 200 if options.quick else 2000)
        print(f"An append to the log, milliseconds: median {median:.2f}, p99 {p99:.2f}, largest {largest:.2f}")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
