"""What does agreeing on signals and losses cost, at which distance, beside the step and not?

Two ranks train a model of step_latency.py by hand, with DDP. Before the update of every so many steps they agree as a
run over several machines does (`tolaria.fence.CollectiveFence`; the ranks of one machine share memory instead).
"Overlapped" starts the sum before the forward pass and reads it before the update, "in the way" does both before the
update. All variants take turns in the same two processes.

    steps       from one agreement to the next
    us a step   above a step without any agreement, median over rounds; and as a share of that step
    delay       milliseconds until all ranks know of a signal, at most
    chosen      the distance that Tolaria takes for this step by default (at most 0.5 % of it, at most 50 ms)

    python -m benchmarks.control_lane            some two minutes
    python -m benchmarks.control_lane --quick    the tiny model, few rounds
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.figures import machine_line, make_parser, save, say, spread, table
from benchmarks.latency_sides import LR
from benchmarks.latency_workloads import WORKLOADS, mean_loss
from benchmarks.step_latency import free_port
from tolaria.config import DistConfig
from tolaria.dist import Peers
from tolaria.fence import MAX_STEPS, CollectiveFence, steps_apart
from tolaria.process import keep_freed_memory

DISTANCES = (1, 2, 4, 8, 16, 32, 64)
COST_REPEATS = 50


@dataclass(frozen=True)
class Variant:
    """``steps`` from one agreement to the next, 0: none."""

    steps: int
    overlapped: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; 0."""
    options = make_parser(__doc__, quick="the tiny model, 6 rounds").parse_args(argv)
    say(machine_line())
    results = {}
    for workload in ("mlp",) if options.quick else ("mlp", "cnn", "gpt"):
        times, cost_s = _measure(workload, 6 if options.quick else 40)
        results[workload] = _report(workload, times, cost_s)
    say(f"\nwritten to {save('control_lane', results, options.out)}")
    return 0


def _measure(workload: str, rounds: int) -> tuple[dict[Variant, list[float]], float]:
    """Seconds of a step in each round by variant, as rank 0 saw it, and of one agreement that is waited for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.control_lane"])
    mine, theirs = context.Pipe()
    port = free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, workload, rounds, theirs)) for rank in range(2)]
    for process in ranks:
        process.start()
    theirs.close()
    try:
        told: tuple[dict[Variant, list[float]], float] = mine.recv()
    except EOFError as error:
        raise SystemExit(f"{workload}: the ranks ended before they had measured") from error
    finally:
        for process in ranks:
            process.join()
    return told


def _rank(rank: int, port: int, workload: str, rounds: int, driver: Connection) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    peers = Peers(dist.new_group(backend="gloo"), rank, 2)
    fence = CollectiveFence(peers, DistConfig())
    step = _training(workload)
    variants = [Variant(0, False), *(Variant(d, o) for d in DISTANCES for o in (True, False))]
    times: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for turn in range(rounds + 1):
        for variant in variants if turn % 2 else variants[::-1]:
            peers.barrier()
            started = time.perf_counter()
            _take(step, fence, variant, WORKLOADS[workload].block)
            if turn:
                times[variant].append((time.perf_counter() - started) / max(MAX_STEPS, WORKLOADS[workload].block))
    costs = [_timed(lambda: _agree(fence)) for _ in range(COST_REPEATS)]
    if rank == 0:
        driver.send((times, median(costs)))
    dist.destroy_process_group()


def _training(name: str) -> Callable[[Callable[[], None]], None]:
    """One step of a hand-written loop; what it is called with comes between gradients and update."""
    workload = WORKLOADS[name]
    task = workload.task(None)
    model = DistributedDataParallel(task.model, gradient_as_bucket_view=True)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    inputs, targets = (tensor[: workload.batch] for tensor in workload.make_data())

    def step(between: Callable[[], None]) -> None:
        mean_loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        between()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _take(step: Callable[[Callable[[], None]], None], fence: CollectiveFence, variant: Variant, block: int) -> None:
    """As many steps as have at least one agreement at the largest distance."""
    for at in range(max(MAX_STEPS, block)):
        due = variant.steps and at % variant.steps == 0
        if due and variant.overlapped:
            fence.open(stop_signal=0, level=0, losses=[1.0] * variant.steps, lr_changed=False, asked=False)
            step(fence.close)  # type: ignore[arg-type]
        elif due:
            step(lambda: _agree(fence, variant.steps))
        else:
            step(_nothing)


def _nothing() -> None:
    pass


def _agree(fence: CollectiveFence, losses: int = 1) -> None:
    fence.open(stop_signal=0, level=0, losses=[1.0] * losses, lr_changed=False, asked=False)
    fence.close()


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _report(workload: str, times: dict[Variant, list[float]], cost_s: float) -> dict[str, object]:
    plain = times[Variant(0, False)]
    step_s = spread(plain).median
    config = DistConfig()
    chosen = steps_apart(cost_s, step_s, share=config.fence_share, delay_s=config.fence_delay_ms / 1000)
    say(f"\n{workload}, 2 ranks: {step_s * 1e6:.0f} us a step without, {cost_s * 1e6:.0f} us an agreement by itself")
    rows, found = [], []
    for steps in DISTANCES:
        cells = [str(steps)]
        for overlapped in (True, False):
            over = spread([a - b for a, b in zip(times[Variant(steps, overlapped)], plain, strict=True)])
            cells += [f"{over.median * 1e6:+.1f}", f"{over.median / step_s:+.2%}"]
            found.append({"steps": steps, "overlapped": overlapped, "over_us": over.median * 1e6})
        rows.append([*cells, f"{steps * step_s * 1e3:.1f}", "<" if steps <= chosen < 2 * steps else ""])
    say(table(["steps", "overlapped: us a step", "share", "in the way: us a step", "share", "delay", "chosen"], rows))
    say(f"chosen: {chosen}, {cost_s / chosen / step_s:.2%} at most, {chosen * step_s * 1e3:.1f} ms")
    return {"step_us": step_s * 1e6, "agreement_us": cost_s * 1e6, "chosen": chosen,
            "share_budget": config.fence_share, "distances": found}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
