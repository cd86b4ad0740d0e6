"""One run with a boundary after every step, for `boundary.py`, which starts it under torchrun and reads its events.

A tiny classifier with one free slot, two samples of validation, the policy in a process of its own over ipc. With
``--command`` the policy is FOLDER/script.toml, which changes the host's learning rate at every boundary.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

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
from tolaria.task import Task

FEATURES, WIDTH, CLASSES, BATCH = 16, 32, 4, 4
SCRIPT = "script.toml"


def make_task() -> Task:
    """Random vectors in four classes."""
    inputs, targets = torch.randn(64, FEATURES), torch.randint(CLASSES, (64,))
    return Task(
        model=nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)),
        loss=lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none"),
        accuracy=lambda outputs, targets: (outputs.argmax(1) == targets).float(),
        train=TensorDataset(inputs, targets),
        validation=TensorDataset(inputs[:2], targets[:2]),
        slots={"late": "0"},
    )


def make_config(folder: Path, boundaries: int, policy: str) -> Config:
    """No checkpoint but the last: a save has a budget of its own."""
    return Config(
        run=RunConfig(dir=str(folder / "run")),
        train=TrainConfig(epochs=10**6, max_steps=boundaries, batch_size=BATCH, boundary_steps=1),
        precision=PrecisionConfig(amp="off"),
        compile=CompileConfig(enabled=False),
        tamiyo=TamiyoConfig(policy=policy),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(progress="off"),
    )


def write_script(path: Path, boundaries: int) -> None:
    """One command at every boundary: the rate goes up and down by a tenth."""
    path.write_text(
        "".join(
            f'[[command]]\nboundary = {boundary}\nop = "set_lr"\ngroup = "host"\n'
            f"lr = {1e-3 if boundary % 2 else 1.1e-3}\n"
            for boundary in range(1, boundaries + 1)
        )
    )


def main() -> int:
    """Train on this rank; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("boundaries", type=int)
    parser.add_argument("--command", action="store_true", help="one command of learning rate at every boundary")
    options = parser.parse_args()
    policy = f"script:{options.folder / SCRIPT}" if options.command else "noop"
    train(make_config(options.folder, options.boundaries, policy), task=make_task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
