"""A run in miniature for tests: a tiny host with two slots and every part of training around it, without the loop.

rig = Rig.build(folder)                 one process, or the ranks that a World joins
rig.train(3)                            optimizer steps, as the loop takes them
rig.command(do.germinate("early", "low_rank"))
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tolaria.config import (
    CompileConfig,
    Config,
    KasminaConfig,
    LRConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from tolaria.coordinator.apply import Applied
from tolaria.coordinator.delivery import obey
from tolaria.data import Loader
from tolaria.dist import Peers, World
from tolaria.fence import Verdict
from tolaria.kasmina.slot import Slot
from tolaria.leyline.codec import encode_command, encode_decision
from tolaria.leyline.types import Command, Decision, SeedStage
from tolaria.measure import TRAIN_METERS, Evaluator
from tolaria.objective import Batch
from tolaria.optim.persist import state_tensors
from tolaria.replica import Replica
from tolaria.setup import build_state
from tolaria.state import TrainState
from tolaria.step import StepResult, TrainStep
from tolaria.streams import seed_rank
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity
from tolaria.task import Task, load_task
from tolaria.telemetry.events import EventLog, read_events
from tolaria.telemetry.meters import Meters
from tolaria.telemetry.split import Split

FEATURES, WIDTH, CLASSES = 5, 8, 3
TRAIN_SAMPLES, VALIDATION_SAMPLES = 45, 11


class TinyHost(nn.Module):
    """tanh layer, slot "early" inside, relu layer to which slot "late" is attached by path, dropout, head."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.inlet = nn.Linear(FEATURES, WIDTH)
        self.early = Slot("early")
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.norm: nn.Module = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, FEATURES) -> logits (batch, CLASSES)."""
        h = self.early(torch.tanh(self.inlet(x)))
        h = self.dropout(self.norm(torch.relu(self.middle(h))))
        logits: Tensor = self.head(h)
        return logits


def make_task(dropout: float = 0.0, batch_norm: bool = False, train_samples: int = TRAIN_SAMPLES) -> Task:
    """Classify points by a fixed random rule; the slots are "early" and "late"."""
    return Task(
        model=TinyHost(dropout, batch_norm),
        loss=per_sample_loss,
        train=_samples(train_samples, seed=1),
        validation=_samples(VALIDATION_SAMPLES, seed=2),
        accuracy=per_sample_accuracy,
        slots={"late": "middle"},
    )


def per_sample_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, (batch,)."""
    return functional.cross_entropy(logits, targets, reduction="none")


def per_sample_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit is the target's, (batch,)."""
    return (logits.argmax(1) == targets).float()


def _samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(points, (points[:, 0] * points[:, 1] > 0).long() + (points[:, 2] > 1).long())


def tiny_config(*, compiled: bool = False, accumulation: int = 1, batch_size: int = 4, **kasmina: Any) -> Config:
    """fp32, eager unless ``compiled``, gates that a tiny run can pass; ``kasmina`` overrides that section."""
    gates = {"gradient_window": 2, "blend_steps": 3, "min_contribution": -10.0, "max_loss_ratio": 100.0}
    return Config(
        run=RunConfig(seed=3),
        train=TrainConfig(epochs=100, batch_size=batch_size, accumulation=accumulation),
        precision=PrecisionConfig(amp="off"),
        compile=CompileConfig(enabled=compiled),
        optim=OptimConfig(lr=0.02),
        lr=LRConfig(policy="constant", seed_warmup_steps=3),
        kasmina=KasminaConfig(**{**gates, **kasmina}),
    )


def alone(generation: str = "0" * 16) -> World:
    """A world of one process on the CPU."""
    peers = Peers(None, 0, 1)
    return World(
        global_rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), generation=generation,
        peers=peers, background=peers, data_group=None,
    )  # fmt: skip


@dataclass
class Rig:
    """The parts of one rank's run, ready to train. With a world of several ranks every method is collective."""

    config: Config
    world: World
    task: Task
    state: TrainState
    loader: Loader
    replica: Replica
    step: TrainStep
    evaluator: Evaluator
    events: EventLog
    events_path: Path
    moved: list[tuple[str, SeedStage, SeedStage]] = field(default_factory=list)
    commands: int = 0

    @classmethod
    def build(
        cls,
        folder: Path,
        *,
        world: World | None = None,
        config: Config | None = None,
        make: Callable[..., Task] = make_task,
        **task_args: Any,
    ) -> Self:
        """A run of ``make(**task_args)`` at its start; it depends on ``config.run.seed`` alone."""
        world, config = world or alone(), config or tiny_config()
        task = load_task(make, task_args, config.run.seed)
        loader = Loader(task, config.data, world.device, emit=lambda *_, **__: None)
        state, _ = build_state(config, task, world, loader)
        events = EventLog(folder / "events.jsonl", world.global_rank, run_id="rig")
        replica = Replica(state, world, config, events)
        replica.rebuild(first=True)
        seed_rank(config.run.seed, 0, world.global_rank)
        step = TrainStep(state, replica, events, debug=False)
        evaluator = Evaluator(task, state, replica, loader, world, config.data.validation_batch_size)
        return cls(config, world, task, state, loader, replica, step, evaluator, events, folder / "events.jsonl")

    def sample(self, batch_size: int) -> Batch:
        """A batch of so many samples, for a trial; the sampler does not move."""
        plan = [(list(range(batch_size)), [1.0 / batch_size] * batch_size)]
        return next(iter(self.loader.batches(self.task.train, plan)))

    def batches(self) -> list[Batch]:
        """The microbatches of the next optimizer step."""
        plan = self.state.sampler.remaining()[: self.state.sampler.accumulation]
        return list(self.loader.batches(self.task.train, plan))

    def take_step(self, group: list[Batch] | None = None) -> StepResult:
        """One optimizer step; nothing is counted, and the verdict before the update is this rank's alone."""
        told = Verdict(stop_signal=0, level=0, lr_changed=self.state.lr.take_found() > 0)
        return self.step(self.batches() if group is None else group, lambda: told)

    def train(self, steps: int = 1) -> None:
        """Take optimizer steps, as the loop does."""
        for _ in range(steps):
            result = self.take_step()
            self.state.after_step(taken=result.taken)
            self.events.step = self.state.step

    def boundary(self, *commands: Command) -> Applied:
        """Count a boundary, validate, and carry out the commands."""
        self.state.boundary += 1
        self.moved += self.state.kasmina.tick(self.state.left_overs)
        self.evaluator.measure(Meters(TRAIN_METERS))
        return self.apply(*commands)

    def identified(self, command: Command) -> Command:
        """The command with the next id of this rig: c1, c2, ..."""
        self.commands += 1
        return with_identity(command, f"c{self.commands}", issued_by="test", issued_at_ns=1)

    def apply(self, *commands: Command) -> Applied:
        """Carry out a decision with these commands, of which a policy would have signed the bytes."""
        signed = [encode_command(self.identified(command)) for command in commands]
        state = self.state
        decision = Decision(
            boundary=state.boundary, step_effective=state.step, source="policy", reason="answered",
            conservative=state.mode.conservative, commands=tuple(signed),
        )  # fmt: skip
        applied = obey(
            encode_decision(decision) if self.world.is_coordinator else None, state, self.replica, self.world.peers,
            healthy_boundaries=2, sample=self.sample, split=Split(),
        )  # fmt: skip
        assert applied is not None
        return applied

    def grow(self, slot: str, to: SeedStage, blueprint: str = "low_rank") -> None:
        """Bring the seed of a DORMANT slot to a stage, one boundary and four steps for each move."""
        self.train(2)
        for stage, command in way(slot, blueprint):
            applied = self.boundary(command)
            assert applied.outcomes[0].applied, applied.outcomes
            self.train(4)
            if stage == to:
                return

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind so far, of all ranks that share the folder."""
        return list(read_events(self.events_path, kind))

    def close(self) -> None:
        """Close what holds files and hooks."""
        self.replica.close()
        self.events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def way(slot: str, blueprint: str) -> list[tuple[SeedStage, Command]]:
    """The way of a seed from DORMANT to FOSSILIZED: (stage that a command leads to, command)."""
    return [
        (SeedStage.GERMINATED, do.germinate(slot, blueprint)),
        (SeedStage.TRAINING, do.start_training(slot)),
        (SeedStage.BLENDING, do.start_grafting(slot)),
        (SeedStage.SHADOWING, do.stabilize(slot)),
        (SeedStage.PROBATIONARY, do.evaluate(slot)),
        (SeedStage.FOSSILIZED, do.fossilize(slot)),
    ]


def host_momentum(state: TrainState) -> dict[str, Tensor]:
    """A copy of every optimizer state tensor of the host."""
    return {n: t.clone() for n, t in state_tensors(state.optimizer).items() if not n.startswith("seed/")}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    first, second = (t.detach().cpu().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)
