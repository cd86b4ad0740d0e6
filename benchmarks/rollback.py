"""How long does a return take, phase by phase, in a real run? One process; parameters and AdamW's moments.

    fast      a loss spike: PREPARE (find, log), COMMIT (copy back), CONFIRM (hash and compare)    budget 500 ms
    durable   asked for by command: read and verify every hash, swap in, compare                   budget 12 s

The copy alone, next to memcpy, is in snapshot.py.

    python benchmarks/rollback.py            0.1, 0.5, 1 and 2 GB of state
    python benchmarks/rollback.py --quick    0.1 GB
"""

import argparse
import platform
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tolaria.build import train
from tolaria.config import (
    CheckpointConfig,
    CompileConfig,
    Config,
    LogConfig,
    PrecisionConfig,
    RunConfig,
    TamiyoConfig,
    TrainConfig,
)
from tolaria.config_recovery import RecoveryConfig
from tolaria.task import Task
from tolaria.telemetry.events import read_events

WIDTH = 1024
SAMPLES, BATCH, SPIKE_READ = 64, 2, 25
SCRIPT = '[[command]]\nboundary = 3\nop = "rollback"\n'


class Noise(Dataset[tuple[Tensor, Tensor]]):
    """Random vectors and what is added to their loss: nothing, but for one read of a batch a million."""

    def __init__(self) -> None:
        self.inputs = torch.randn(SAMPLES, WIDTH)
        self.reads = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        spike = BATCH * (SPIKE_READ - 1) <= self.reads < BATCH * SPIKE_READ
        return self.inputs[index], torch.tensor(1e6 * spike)


def main() -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.1 GB only")
    sizes = [0.1] if parser.parse_args().quick else [0.1, 0.5, 1.0, 2.0]
    sys.stdout.write(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, torch {torch.__version__}, milliseconds\n")
    for size in sizes:
        if 8 * size * 1e9 > psutil.virtual_memory().available:
            sys.stdout.write(f"{size} GB left out: not enough free memory\n")
            continue
        for event in _returns(size):
            parts = ", ".join(f"{phase} {ms:.0f}" for phase, ms in event["milliseconds"].items())
            total = sum(event["milliseconds"].values())
            name = "fast" if event["source"].startswith("snapshot") else "durable"
            sys.stdout.write(f"{size:.1f} GB  {name:<8}{total:>7.0f}   {parts}\n")
            sys.stdout.flush()
    return 0


def _returns(size: float) -> list[dict[str, Any]]:
    layers = max(1, round(size * 1e9 / 12 / WIDTH**2))

    def make_task() -> Task:
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])
        data = Noise()
        return Task(
            model=model, loss=lambda out, extra: 1 + out.square().mean(1) + extra, train=data, validation=Noise(),
            accuracy=lambda out, _: torch.zeros(len(out)),
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.toml"
        script.write_text(SCRIPT)
        config = Config(
            run=RunConfig(dir=f"{folder}/run"),
            train=TrainConfig(epochs=100, max_steps=40, batch_size=BATCH, boundary_steps=10),
            precision=PrecisionConfig(amp="off"),
            compile=CompileConfig(enabled=False),
            tamiyo=TamiyoConfig(policy=f"script:{script}", deadline_ms=15_000),
            checkpoint=CheckpointConfig(every=1, good_after=0, keep=2),
            log=LogConfig(progress="off"),
            recovery=RecoveryConfig(snapshot_steps=10, prepare_ms=10_000, commit_ms=10_000, confirm_ms=10_000),
        )
        train(replace(config), task=make_task)
        return list(read_events(Path(folder) / "run" / "events.jsonl", "went_back"))


if __name__ == "__main__":
    sys.exit(main())
