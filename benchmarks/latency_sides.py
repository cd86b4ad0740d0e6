"""The sides of step_latency.py: five ways to train the same model, each with what its own documentation recommends.

All use fused AdamW, a cosine schedule, clipping at norm 1, float32 or bf16 autocast, `module.compile()` where compiled,
DDP with two ranks. Each runs until it is ended from outside.
"""

import math
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.latency_workloads import WORKLOADS, Gate, Timer, Workload, mean_loss
from tolaria.phases import Phases, unseen
from tolaria.process import keep_freed_memory
from tolaria.task import Task

WARM_UP_STEPS = 30
TIMED = ", timed"
TOTAL_STEPS = 1_000_000
LR = 1e-3


@dataclass(frozen=True)
class Cell:
    """One situation in which the sides are compared. ``seed``: none, dormant, training or blending."""

    workload: str
    ranks: int
    compiled: bool = False
    amp: bool = False
    accumulation: int = 1
    seed: str = "none"

    @property
    def name(self) -> str:
        """Short, for tables."""
        parts = [self.workload, f"{self.ranks} rank{'s' * (self.ranks > 1)}", "compiled" if self.compiled else "eager"]
        parts += ["bf16"] * self.amp + [f"accumulate {self.accumulation}"] * (self.accumulation > 1)
        return ", ".join(parts + [self.seed] * (self.seed != "none"))


@dataclass(frozen=True)
class Seat:
    """Where one rank of one side sits."""

    cell: Cell
    rank: int
    port: int
    folder: str
    driver: Connection
    timer: Timer | None = None

    @property
    def workload(self) -> Workload:
        """The problem."""
        return WORKLOADS[self.cell.workload]

    def gate(self) -> Gate:
        """This rank's gate, to be asked before each microbatch."""
        return Gate(self.driver, WARM_UP_STEPS * self.cell.accumulation, self.timer)


def sit(side: str, seat: Seat) -> None:
    """The process of one rank: run ``side`` until killed."""
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    if seat.cell.ranks > 1:
        os.environ.update(
            RANK=str(seat.rank), LOCAL_RANK=str(seat.rank), WORLD_SIZE=str(seat.cell.ranks), MASTER_PORT=str(seat.port),
            LOCAL_WORLD_SIZE=str(seat.cell.ranks), GROUP_RANK="0", MASTER_ADDR="127.0.0.1", LOCAL_ADDR="127.0.0.1",
        )  # fmt: skip
    SIDES[side.removesuffix(TIMED)](replace(seat, timer=Timer()) if side.endswith(TIMED) else seat)


def _share(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / TOTAL_STEPS)))


def _model(seat: Seat, task: Task) -> nn.Module:
    """The host; with a seed grown into it where the cell asks for one that takes part in the output."""
    model = task.model
    if seat.cell.seed == "blending":
        from benchmarks.latency_seeds import with_seed  # noqa: PLC0415 - only this cell needs it

        with_seed(model, seat.workload)
    if seat.cell.compiled:
        model.compile()
    return model


def _loader(seat: Seat, task: Task) -> DataLoader[Any]:
    data: Any = task.train
    size = seat.workload.batch
    if seat.cell.ranks == 1:
        # Sampling in order: a random order of so many samples is no part of a step.
        return DataLoader(data, batch_size=size, collate_fn=task.collate)
    sampler = DistributedSampler(data, seat.cell.ranks, seat.rank, shuffle=False)
    return DataLoader(data, batch_size=size, sampler=sampler, collate_fn=task.collate)


def _parts(seat: Seat) -> tuple[nn.Module, torch.optim.Optimizer, LambdaLR, DataLoader[Any]]:
    task = seat.workload.task(seat.gate())
    model = _model(seat, task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return model, optimizer, LambdaLR(optimizer, _share), _loader(seat, task)


def hand(seat: Seat) -> None:
    """A loop as a careful person writes it by hand."""
    cell = seat.cell
    model, optimizer, schedule, loader = _parts(seat)
    parameters = list(model.parameters())
    if cell.ranks > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    phases: Phases = seat.timer or unseen
    total = torch.zeros(())
    batches = iter(loader)
    for at in count(1):
        with phases("data"):
            inputs, targets = next(batches)
        last = at % cell.accumulation == 0
        with nullcontext() if last or cell.ranks == 1 else model.no_sync():  # type: ignore[operator]
            with phases("forward"), torch.autocast("cpu", torch.bfloat16) if cell.amp else nullcontext():
                loss = mean_loss(model(inputs), targets)
                if cell.accumulation > 1:
                    loss = loss / cell.accumulation
            with phases("backward"):
                loss.backward()
        with phases("bookkeeping"):
            total += loss.detach()
        if last:
            with phases("clip"):
                nn.utils.clip_grad_norm_(parameters, 1.0)
            with phases("optimizer"):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)


def accelerate(seat: Seat) -> None:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator  # noqa: PLC0415 - an optional package

    cell = seat.cell
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if cell.amp else "no", gradient_accumulation_steps=cell.accumulation
    )
    # The loader as for one process: Accelerate deals batches out itself.
    task = seat.workload.task(seat.gate())
    model = _model(seat, task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    loader = DataLoader(task.train, batch_size=seat.workload.batch, collate_fn=task.collate)  # type: ignore[var-annotated]
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, LambdaLR(optimizer, _share))
    total = torch.zeros(())
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = mean_loss(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        total += loss.detach()


def fabric(seat: Seat) -> None:
    """Lightning Fabric."""
    os.environ["TORCHELASTIC_RUN_ID"] = "bench"  # so that it takes the ranks for torchrun's
    from lightning import Fabric  # noqa: PLC0415 - an optional package

    cell = seat.cell
    fabric = Fabric(
        accelerator="cpu", devices=cell.ranks, strategy="ddp" if cell.ranks > 1 else "auto",
        precision="bf16-mixed" if cell.amp else "32-true",
    )  # fmt: skip
    fabric.launch()
    plain, made, schedule, loader = _parts(seat)
    model, optimizer = fabric.setup(plain, made)
    batches = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    total = torch.zeros(())
    for at, (inputs, targets) in enumerate(batches):
        last = (at + 1) % cell.accumulation == 0
        with fabric.no_backward_sync(model, enabled=not last):
            loss = mean_loss(model(inputs), targets) / cell.accumulation
            fabric.backward(loss)
        total += loss.detach()
        if last:
            fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def lightning(seat: Seat) -> None:
    """Lightning's Trainer, with all that costs time by default turned off."""
    os.environ["TORCHELASTIC_RUN_ID"] = "bench"
    import lightning as pl  # noqa: PLC0415 - an optional package

    cell = seat.cell
    model, optimizer, schedule, loader = _parts(seat)

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _index: int) -> Tensor:
            inputs, targets = batch
            return mean_loss(self.model(inputs), targets)

        def configure_optimizers(self) -> Any:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer = pl.Trainer(
        accelerator="cpu", devices=cell.ranks, strategy="ddp" if cell.ranks > 1 else "auto", max_epochs=1,
        precision="bf16-mixed" if cell.amp else "32-true", accumulate_grad_batches=cell.accumulation,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=seat.folder, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Module(), loader)


def tolaria(seat: Seat) -> None:
    """Tolaria with everything idle that can be."""
    from benchmarks.latency_seeds import run_tolaria  # noqa: PLC0415

    run_tolaria(seat, recovery=False)


def tolaria_defaults(seat: Seat) -> None:
    """Tolaria with snapshots in memory and comparisons of the ranks as they are by default."""
    from benchmarks.latency_seeds import run_tolaria  # noqa: PLC0415

    run_tolaria(seat, recovery=True)


SIDES: dict[str, Callable[[Seat], None]] = {
    "hand-written": hand,
    "tolaria": tolaria,
    "tolaria, defaults": tolaria_defaults,
    "accelerate": accelerate,
    "fabric": fabric,
    "lightning": lightning,
}
