"""The two sides of gpu.py, the same model on one rank: Tolaria's step, and the loop that one would write by hand."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tolaria.config import CompileConfig, Config, KasminaConfig, LRConfig, OptimConfig, PrecisionConfig, TrainConfig
from tolaria.data import Loader
from tolaria.dist import Peers, World
from tolaria.fence import Verdict
from tolaria.leyline.types import Command
from tolaria.objective import Batch
from tolaria.recovery.staging import Payload
from tolaria.replica import Replica
from tolaria.setup import build_state
from tolaria.step import TrainStep
from tolaria.task import Task
from tolaria.tasks import stdlib_gpt
from tolaria.telemetry.events import EventLog

CLIP_NORM = 1.0


@dataclass(frozen=True)
class Size:
    """The model, the batch, and how long each part is measured."""

    layers: int
    features: int
    heads: int
    context: int
    batch: int
    block_steps: int
    blocks: int
    repeats: int

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.context

    def flops(self, parameters: int) -> float:
        """Of one step, forward and backward: 6 for each parameter and token, and the products of causal attention."""
        attention = 6 * self.layers * self.features * self.context
        return float(self.tokens) * (6.0 * parameters + attention)


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """A world of one rank whose gradients go through DDP."""
    with tempfile.TemporaryDirectory() as folder:
        cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1,
            device_id=device if cuda else None,
        )  # fmt: skip
        peers = Peers(None, 0, 1)
        try:
            yield World(
                global_rank=0, local_rank=0, world_size=1, device=device, generation="0" * 16, peers=peers,
                background=peers, data_group=dist.group.WORLD,
            )  # fmt: skip
        finally:
            dist.destroy_process_group()


class Tolaria:
    """A run's state, replica and step, without the loop around them."""

    def __init__(self, world: World, size: Size, folder: Path) -> None:
        config = Config(
            train=TrainConfig(batch_size=size.batch, clip_norm=CLIP_NORM),
            precision=PrecisionConfig(amp="bf16"),
            compile=CompileConfig(enabled=True),
            optim=OptimConfig(lr=3e-4, weight_decay=0.1),
            lr=LRConfig(policy="constant"),
            kasmina=KasminaConfig(gradient_window=1, max_seed_parameters=20_000_000, max_grown_parameters=20_000_000),
        )
        task = make_task(size)
        loader = Loader(task, config.data, world.device, emit=lambda *_, **__: None)
        self.world = world
        self.initial = {n: p.detach().to(world.device, copy=True) for n, p in task.model.named_parameters()}
        self.state, _ = build_state(config, task, world, loader)
        self.events = EventLog(folder / "events.jsonl", 0, run_id="benchmark")
        self.replica = Replica(self.state, world, config, self.events)
        self.replica.rebuild(first=True)
        self.group = list(loader.batches(task.train, self.state.sampler.remaining()[:1]))
        self.sample = lambda count: next(
            iter(loader.batches(task.train, [(list(range(count)), [1.0 / count] * count)]))
        )
        self.replica.warm_up(self.sample)
        self._step = TrainStep(self.state, self.replica, self.events, debug=False)

    @property
    def batch(self) -> Batch:
        """What both sides train on."""
        return self.group[0]

    def step(self) -> None:
        """One optimizer step."""
        result = self._step(self.group, Verdict)
        self.state.after_step(taken=result.taken)

    def apply(self, command: Command) -> tuple[float, float]:
        """A command of growth; seconds for the structure and for the graphs."""
        kasmina = self.state.kasmina
        kasmina.read_norms()
        started = time.perf_counter()
        kasmina.apply(kasmina.plan(command))
        self.state.regroup()
        self.replica.rebuild()
        wait(self.world.device)
        changed = time.perf_counter()
        self.replica.warm_up(self.sample)
        wait(self.world.device)
        return changed - started, time.perf_counter() - changed

    def payload(self) -> Payload:
        """What a snapshot holds, without the rank's own part."""
        return Payload(step=1, tensors=self.state.tensors(), meta={}, local_tensors={}, local_meta={})

    def close(self) -> None:
        """Let go of hooks and files."""
        self.replica.close()
        self.events.close()


class _WithLoss(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.loss = task.loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Inputs and targets (batch, time) -> their mean loss, 0-D."""
        return self.loss(self.model(inputs), targets).mean()


class HandWritten:
    """The loop that one would write: DDP around a compiled model and loss, autocast, clipping, a fused optimizer."""

    def __init__(self, world: World, size: Size, weights: dict[str, Tensor]) -> None:
        task = make_task(size)
        with torch.no_grad():
            for name, parameter in task.model.named_parameters():
                parameter.copy_(weights[name])
        model = _WithLoss(task).to(world.device)
        model.compile()
        self.device = world.device
        devices = [world.device.index] if world.device.type == "cuda" else None
        self.model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.model(batch.inputs, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make_task(size: Size) -> Task:
    """The GPT; the same weights each time."""
    torch.manual_seed(0)
    task = stdlib_gpt.make_task(
        layers=size.layers, features=size.features, heads=size.heads, context=size.context,
        max_train_bytes=size.tokens * 2 + 1000, max_validation_bytes=size.context * 4 + 10,
    )  # fmt: skip
    return replace(task, slots={"middle": f"blocks.{size.layers // 2 - 1}"})


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
