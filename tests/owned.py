"""A host in double precision with four slots and data that says whose each sample is, for tests of the aggregation.

Seeds are put into their slots at once, in the stage that a test asks for, instead of being grown.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.rig import CLASSES, FEATURES, WIDTH, Rig, per_sample_accuracy, per_sample_loss, tiny_config
from tolaria.config import CompileConfig, Config
from tolaria.config_aggregate import AggregateConfig
from tolaria.dist import World
from tolaria.kasmina.blueprints import register_blueprint
from tolaria.kasmina.growth import build_seed
from tolaria.kasmina.slot import Slot
from tolaria.leyline.types import SeedStage
from tolaria.objective import Batch
from tolaria.task import Task

SLOTS = ("a", "b", "c", "d")
SAMPLES = 48
Gradients: TypeAlias = dict[str, Tensor]
Owner: TypeAlias = Callable[[int], int]
"""The seed id of a sample by its index."""


class WideSeed(nn.Module):
    """tanh layer in double precision, not zero at its start."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[-1], shape[-1], dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        f: Tensor = torch.tanh(self.layer(h.double())).to(h.dtype)
        return f


class Stack(nn.Module):
    """Layers with slots "a", "b", "c" and "d" between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inlet = nn.Linear(FEATURES, WIDTH, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in SLOTS)
        self.slots = nn.ModuleList(map(Slot, SLOTS))
        self.head = nn.Linear(WIDTH, CLASSES, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, FEATURES) -> logits (batch, CLASSES)."""
        h = torch.tanh(self.inlet(x))
        for layer, slot in zip(self.layers, self.slots, strict=True):
            h = slot(h + torch.tanh(layer(h)))
        logits: Tensor = self.head(h)
        return logits


def make_task(*, owner: Owner | None = None, dtype: torch.dtype = torch.float64, opposed: bool = False) -> Task:
    """Classes by chance. ``owner`` makes triples. ``opposed``: the same points are of one class when even, of another
    when odd.
    """
    register_blueprint("wide", WideSeed, ranks=[1])
    generator = torch.Generator().manual_seed(7)
    points = torch.randn(SAMPLES, FEATURES, generator=generator).to(dtype)
    classes = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    if opposed:
        points[1::2], classes[::2], classes[1::2] = points[::2], 0, 1
    tensors = [points, classes]
    if owner is not None:
        tensors.append(torch.tensor([owner(i) for i in range(SAMPLES)]))
    return Task(
        model=Stack(dtype), loss=per_sample_loss, train=TensorDataset(*tensors), validation=TensorDataset(*tensors),
        accuracy=per_sample_accuracy,
    )  # fmt: skip


def owned_config(
    mode: str, attribution: str = "data", *, batch_size: int = 8, accumulation: int = 1, compiled: bool = False,
    **kasmina: Any,
) -> Config:  # fmt: skip
    """No clipping, so that gradients are seen as they are."""
    config = tiny_config(batch_size=batch_size, accumulation=accumulation, **kasmina)
    return replace(
        config,
        train=replace(config.train, clip_norm=0.0),
        compile=CompileConfig(enabled=compiled),
        aggregate=AggregateConfig(mode=mode, attribution=attribution),  # type: ignore[arg-type]
    )


@contextmanager
def owned_rig(
    folder: Path, config: Config, seeds: Mapping[str, SeedStage] | None = None, *, world: World | None = None,
    **task: Any,
) -> Iterator[Rig]:  # fmt: skip
    """A rig of `make_task` with seeds in these stages, before its first step."""
    folder.mkdir(parents=True, exist_ok=True)
    with Rig.build(folder, world=world, config=config, make=make_task, **task) as rig:
        for slot, stage in (seeds or {}).items():
            plant(rig, slot, stage)
        yield rig


def plant(rig: Rig, slot: str, stage: SeedStage, *, alpha: float = 0.25, fine_tuning: bool = True) -> None:
    """Put a seed into a slot, in a stage; BLENDING at ``alpha``, which stands still."""
    kasmina = rig.state.kasmina
    seed = kasmina.seeds[slot]
    seed.module = build_seed(
        "wide", slot, seed.shape, run_seed=rig.config.run.seed, command_id=slot, device=rig.world.device
    )
    seed.blueprint, seed.command_id, seed.fine_tuning = "wide", slot, fine_tuning
    if stage == SeedStage.BLENDING:
        seed.schedule, seed.blend_steps, seed.blend_position = "linear", 1_000_000, int(alpha * 1_000_000)
        seed.alpha.fill_(alpha)
    seed.enter(stage)
    kasmina._settle(seed)
    rig.state.regroup()
    rig.replica.rebuild()


def gradients(rig: Rig, steps: int = 1) -> Gradients:
    """Take steps; the gradients that the optimizer got in the last one, by name, of host and seeds."""
    seen: Gradients = {}
    named = dict(rig.state.host_parameters)
    for seed in rig.state.kasmina.seeds.values():
        named |= seed.named_parameters()

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in named.items() if p.grad is not None})

    hook = rig.state.optimizer.register_step_pre_hook(note)
    rig.train(steps)
    hook.remove()
    return seen


def of_host(found: Gradients) -> Gradients:
    """The gradients of the host alone."""
    return {name: g for name, g in found.items() if not name.startswith("seed/")}


def vector(found: Gradients) -> Tensor:
    """All of them in one vector, float64."""
    return torch.cat([found[name].double().flatten() for name in sorted(found)])


def distance(one: Gradients, other: Gradients) -> float:
    """Norm of the difference over the norm of the second."""
    assert one.keys() == other.keys() and one
    return float((vector(one) - vector(other)).norm() / vector(other).norm())


def losses(rig: Rig, batch: Batch) -> Tensor:
    """The loss of each sample of a batch, float64, with the graph to all parameters. No weights, no sync."""
    logits = rig.state.objective.model(batch.inputs)
    return per_sample_loss(logits, batch.targets).double()


def ids(batches: Sequence[Batch]) -> list[int]:
    """The seed ids of the samples of a step."""
    return [i for batch in batches if batch.seed_ids is not None for i in batch.seed_ids.tolist()]
