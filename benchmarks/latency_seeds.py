"""Tolaria's side of step_latency.py, with its slot in the state that a cell asks for."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.latency_sides import LR, Seat
from benchmarks.latency_workloads import WORKLOADS, Timer, Workload
from tolaria import build
from tolaria.config import (
    CheckpointConfig,
    CompileConfig,
    Config,
    DistConfig,
    KasminaConfig,
    LogConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    TamiyoConfig,
    TrainConfig,
)
from tolaria.config_recovery import RecoveryConfig, WatchdogConfig
from tolaria.kasmina.blueprints import get_blueprint
from tolaria.process import keep_freed_memory
from tolaria.step import TrainStep

BOUNDARY_STEPS = 6
STEPS = {"training": 3 * BOUNDARY_STEPS, "blending": 4 * BOUNDARY_STEPS}
SCRIPT = """
[[command]]
boundary = 1
op = "germinate"
slot = "grown"
blueprint = "{blueprint}"

[[command]]
boundary = 2
op = "start_training"
slot = "grown"

[[command]]
boundary = 3
op = "{last}"
slot = "grown"
blend_steps = 1000000
"""


def with_seed(model: nn.Module, workload: Workload) -> None:
    """Put the seed that Tolaria grows into a model by hand, as it takes part in BLENDING."""
    seed = get_blueprint(workload.blueprint).build(workload.shape)
    place = model.get_submodule(workload.slot)
    place.add_module("seed", seed)
    place.register_buffer("alpha", torch.full((), 0.5))

    def blend(_place: nn.Module, _inputs: Any, h: Tensor) -> Tensor:
        return h + place.alpha * seed(h.detach())

    place.register_forward_hook(blend)


def grow(workload_name: str, stage: str, folder: str) -> None:
    """A run of one process that ends with its seed in ``stage``; its checkpoint is where `run_tolaria` goes on."""
    torch.set_num_threads(1)
    keep_freed_memory()
    workload = WORKLOADS[workload_name]
    script = Path(folder) / f"{workload_name}-{stage}.toml"
    text = SCRIPT.format(blueprint=workload.blueprint, last="start_grafting")
    script.write_text(text if stage == "blending" else text[: text.rindex("[[command]]")])
    config = Config(
        run=RunConfig(dir=grown_run(folder, workload_name, stage)),
        train=TrainConfig(
            epochs=1000, batch_size=workload.batch, boundary_steps=BOUNDARY_STEPS, max_steps=STEPS[stage]
        ),
        precision=PrecisionConfig(amp="off"),
        compile=CompileConfig(enabled=False),
        optim=OptimConfig(name="adamw", lr=LR),
        kasmina=KasminaConfig(max_loss_ratio=100.0),
        tamiyo=TamiyoConfig(policy=f"script:{script}"),
        dist=DistConfig(device="cpu", threads=1),
        log=LogConfig(progress="off"),
    )
    build.train(config, task=partial(workload.task, None, slots=True))


def grown_run(folder: str, workload: str, stage: str) -> str:
    """The run directory of `grow`."""
    return f"{folder}/{workload}-{stage}"


def _timed_step(timer: Timer, *parts: Any, **settings: Any) -> TrainStep:
    """In place of TrainStep, whose phases are otherwise the profiler's."""
    return TrainStep(*parts, **{**settings, "phases": timer})


def run_tolaria(seat: Seat, *, recovery: bool) -> None:
    """Run until killed. ``recovery``: with snapshots in memory and comparisons of the ranks, as they are by default."""
    cell, workload = seat.cell, seat.workload
    if seat.timer is not None:
        build.TrainStep = partial(_timed_step, seat.timer)  # type: ignore[misc,assignment]
    grown = cell.seed in STEPS
    config = Config(
        run=RunConfig(
            root=f"{seat.folder}/runs", name="bench", accept_changes=True,
            resume=grown_run(seat.folder, workload.name, cell.seed) if grown else "no",
        ),
        train=TrainConfig(epochs=1000, batch_size=workload.batch, accumulation=cell.accumulation),
        precision=PrecisionConfig(amp="bf16" if cell.amp else "off"),
        compile=CompileConfig(enabled=cell.compiled),
        optim=OptimConfig(name="adamw", lr=LR),
        tamiyo=TamiyoConfig(policy="none"),
        checkpoint=CheckpointConfig(every=0),
        recovery=RecoveryConfig(snapshot_dir=seat.folder)
        if recovery
        else RecoveryConfig(snapshot_steps=0, drift_steps=0),
        watchdog=WatchdogConfig(mode="on"),
        dist=DistConfig(device="cpu", threads=1),
        log=LogConfig(progress="off"),
    )  # fmt: skip
    build.train(config, task=partial(workload.task, seat.gate(), slots=cell.seed != "none"))
