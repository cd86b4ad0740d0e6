"""One GPU: is a step of Tolaria's as fast as a hand-written one, what does a snapshot take, how long is growth?

A byte-level GPT of about 100 M parameters, bfloat16, compiled, over NCCL with one rank. Needs a CUDA device; without
one it says so and exits 2.

    python -m benchmarks.gpu                      the whole, some minutes, most of them compiling
    python -m benchmarks.gpu --quick              fewer steps, same model
    python -m benchmarks.gpu --device cpu --tiny  a model of 30 k parameters on the CPU with gloo: only to see it run

Steps: both sides have the same initial weights, read the same batch and take blocks of steps in turns, A B B A, with
the device waited for at the end of each block.

    ms a step     median over the blocks, with the quartiles
    ratio         to the hand-written loop, block by block, with the quartiles; budget 1.02
    tokens/s      of the median
    MFU           model FLOPs of these tokens (6 for each parameter, and attention) over --peak-tflops; "-" if unknown

Snapshot: the model with its optimizer state, in GB/s of its bytes.

    copy, side stream    one flat copy to pinned memory on a stream of its own, nothing else running: the ceiling
    step beside it       ms of a step while such a copy is under way, as a ratio to one without
    ring, copy and hash  `SnapshotRing.take`: into the slot, hashed, headed
    hash on the device   all of the state, as the comparison of ranks reads it

Growth: seconds of each command of a seed's way, the graphs of the new structure included (structure, then compiling).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import RESULTS, machine_line, ratios, save, say, spread, table
from benchmarks.gpu_sides import HandWritten, Size, Tolaria, joined, wait
from tolaria.compare import tensor_hashes
from tolaria.recovery.snapshots import SnapshotRing
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

BUDGET = 1.02
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""Dense bfloat16, as the makers say, by a part of the device's name."""


LARGE = Size(layers=14, features=768, heads=12, context=1024, batch=16, block_steps=10, blocks=20, repeats=10)
TINY = Size(layers=2, features=32, heads=2, context=32, batch=4, block_steps=2, blocks=4, repeats=3)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    wait(device)
    started = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started


def steps(ours: Tolaria, theirs: HandWritten, size: Size, peak_tflops: float | None) -> dict[str, Any]:
    """The two sides in turns."""
    sides: dict[str, Callable[[], None]] = {"hand-written": lambda: theirs.step(ours.batch), "tolaria": ours.step}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(size.blocks + 1):
        for name in sides if turn % 2 else reversed(sides):
            spent = timed(lambda side=sides[name]: [side() for _ in range(size.block_steps)], ours.world.device)  # type: ignore[misc]
            if turn:  # the first blocks warm up
                seconds[name].append(spent / size.block_steps)
    parameters = ours.state.parameter_count
    rows, found = [], {}
    for name, values in seconds.items():
        times, ratio = spread(values), ratios(values, seconds["hand-written"])
        mfu = size.flops(parameters) / times.median / (peak_tflops * 1e12) if peak_tflops else None
        found[name] = {"seconds": times, "ratio": ratio, "tokens_per_s": size.tokens / times.median, "mfu": mfu}
        rows.append([
            name, f"{times.median * 1e3:.2f}", f"{times.low * 1e3:.2f}-{times.high * 1e3:.2f}", f"{ratio.median:.3f}",
            f"{ratio.low:.3f}-{ratio.high:.3f}", f"{BUDGET}" if name == "tolaria" else "",
            f"{size.tokens / times.median:,.0f}", "-" if mfu is None else f"{mfu:.1%}",
        ])  # fmt: skip
    head = ["step", "ms", "quartiles", "ratio", "quartiles", "budget", "tokens/s", "MFU"]
    say(f"\n{parameters:,} parameters, {size.tokens:,} tokens a step\n\n{table(head, rows)}")
    return {"parameters": parameters, "tokens": size.tokens, **found}


def snapshots(ours: Tolaria, size: Size) -> dict[str, Any]:
    """How fast the state leaves the device, and what a step feels of it."""
    device, cuda = ours.world.device, ours.world.device.type == "cuda"
    tensors = ours.state.tensors()
    total = sum(t.nbytes for t in tensors.values())
    flat = torch.empty(total, dtype=torch.uint8, device=device)
    host = torch.empty(total, dtype=torch.uint8, pin_memory=cuda)
    stream = torch.cuda.Stream(device) if cuda else None

    def aside() -> None:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            host.copy_(flat, non_blocking=True)

    def beside() -> None:
        aside()
        ours.step()

    ring = SnapshotRing(
        run_id="benchmark", generation="0", rank=0, run_dir=Path.cwd(), slots=1, limit_bytes=2 * total + 2**26,
        directory=Path("/dev/shm"), pinned=cuda,  # noqa: S108 - where a run's snapshots lie as well
    )  # fmt: skip

    def take() -> None:
        taken = ring.take(ours.payload())
        if taken is None:
            raise SystemExit(f"no snapshot: {ring.disabled}")
        ring.confirm(taken.info.seq)

    measured: dict[str, Callable[[], object]] = {
        "copy, side stream": aside, "ring, copy and hash": take, "hash on the device": lambda: tensor_hashes(tensors),
        "step": ours.step, "step beside it": beside,
    }  # fmt: skip
    try:
        seconds = {name: [timed(side, device) for _ in range(size.repeats + 1)][1:] for name, side in measured.items()}
    finally:
        ring.close(remove=True)
    rows, found = [], {}
    for name, values in seconds.items():
        times = spread(values)
        found[name] = {"seconds": times, "gb_per_s": total / times.median / 1e9}
        rate = "" if name.startswith("step") else f"{total / times.median / 1e9:.1f}"
        ratio = f"{ratios(values, seconds['step']).median:.2f}" if name.startswith("step") else ""
        rows.append([name, f"{times.median * 1e3:.2f}", f"{times.low * 1e3:.2f}-{times.high * 1e3:.2f}", rate, ratio])
    head = ["snapshot", "ms", "quartiles", "GB/s", "ratio to a step"]
    say(f"\n{total / 1e6:,.1f} MB of state\n\n{table(head, rows)}")
    return {"bytes": total, **found}


def growth(ours: Tolaria) -> dict[str, Any]:
    """A seed from nothing to blending."""
    way = {
        "germinate": do.germinate("middle", "low_rank"),
        "start training": do.start_training("middle"),
        "start grafting": do.start_grafting("middle"),
    }
    rows, found = [], {}
    for number, (name, command) in enumerate(way.items()):
        for _ in range(2):
            ours.step()
        structure, graphs = ours.apply(with_identity(command, f"c{number}", issued_by="benchmark", issued_at_ns=1))
        found[name] = {"structure_s": structure, "compile_s": graphs}
        rows.append([name, f"{structure * 1e3:.1f}", f"{graphs:.2f}"])
    say("\n" + table(["growth", "structure, ms", "compiling, s"], rows))
    return found


def main() -> int:
    """Measure and print; 0, or 2 without a device to measure on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --tiny [cuda]")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains in milliseconds")
    parser.add_argument("--quick", action="store_true", help="a fifth of the blocks")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, dense; known for some")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of gpu.json [{RESULTS}]")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        say("no CUDA device on this machine; --device cpu --tiny runs the same code on a small model")
        return 2
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: expected --tiny, too: the whole model would take hours")
    size = TINY if options.tiny else LARGE
    if options.quick:
        size = replace(size, blocks=max(2, size.blocks // 5), repeats=max(3, size.repeats // 3))
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    known = (
        peak for part, peak in PEAK_TFLOPS.items() if device.type == "cuda" and part in torch.cuda.get_device_name()
    )
    peak_tflops = options.peak_tflops or next(known, None)
    torch.set_float32_matmul_precision("high")
    say(machine_line())
    with tempfile.TemporaryDirectory() as folder, joined(device) as world:
        ours = Tolaria(world, size, Path(folder))
        theirs = HandWritten(world, size, ours.initial)
        results = {
            "device": options.device, "tiny": options.tiny, "target": BUDGET,
            "steps": steps(ours, theirs, size, peak_tflops), "snapshot": snapshots(ours, size), "growth": growth(ours),
        }  # fmt: skip
        ours.close()
        say(f"\n{save('gpu', results, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
