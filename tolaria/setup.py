"""From a task to the `TrainState` of a new run: slots found and probed, optimizer, LR, sampler."""

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import nn

from tolaria.config import Config, OptimConfig, TrainConfig
from tolaria.config_aggregate import AggregateConfig
from tolaria.data import EpochSampler, Loader, dataset_size
from tolaria.dist import World
from tolaria.errors import ConfigError, TaskError
from tolaria.kasmina.host import Kasmina
from tolaria.kasmina.slot import Slot, attach, find_slots, probe_shapes
from tolaria.leyline.limits import is_name
from tolaria.memory_layout import chosen_format, lay_out
from tolaria.objective import Batch, Objective
from tolaria.optim.footprint import Footprint
from tolaria.optim.lr import LRController
from tolaria.optim.rebuild import build_optimizer
from tolaria.optim.tuning import Tuner
from tolaria.replica import evaluating
from tolaria.state import HOST_GROUP, TrainState
from tolaria.task import Task, users_code

MAX_OBSERVED = 200
"""Slots and metrics together: as many as a packet to the policy has room for."""


def build_state(config: Config, task: Task, world: World, loader: Loader) -> tuple[TrainState, OptimConfig]:
    """The state of a run that has not begun, and its optimizer settings. Local; raises TaskError, ConfigError."""
    model = task.model.to(world.device)
    loader.memory_format = chosen_format(config.precision.channels_last, model, world.device)
    lay_out(model, loader.memory_format)
    slots = _slots(model, {**task.slots, **config.kasmina.slots})
    host_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    host_buffers = dict(model.named_buffers()) | {n: p for n, p in model.named_parameters() if not p.requires_grad}
    if not host_parameters:
        raise TaskError("the task's model has no parameter that requires a gradient")
    _check_metrics(task, len(slots))
    _check_loss(task)
    size = dataset_size(task.train, "training")
    loader.num_slots = len(slots)
    batch = next(iter(loader.batches(task.train, [([0, 0], [0.5, 0.5])])))
    _check_owners(config.aggregate, len(slots), batch)
    objective = Objective(task, slots, summed=config.aggregate.mode == "sum")
    shapes = _probe(objective, slots, batch, debug=config.train.debug)
    weighted = config.aggregate.mode == "weighted"
    seam = torch.ones(config.train.batch_size, device=world.device) if weighted else None
    optim = _optimizer_settings(config.optim, task)
    optimizer = build_optimizer(optim, {HOST_GROUP: host_parameters}, world.device)
    footprint = Footprint(lambda: state.optimizer)
    kasmina = Kasmina(
        slots, shapes, config.kasmina, config.run.seed, world.device,
        bytes_per_parameter=footprint, seam=seam, memory_format=loader.memory_format,
    )  # fmt: skip
    sampler = EpochSampler(
        size, seed=config.run.seed, rank=world.global_rank,
        world_size=world.world_size, batch_size=config.train.batch_size, accumulation=config.train.accumulation,
    )  # fmt: skip
    lr = LRController(config.lr, optim.lr, planned_steps(config.train, sampler))
    lr.add_group(HOST_GROUP, "host", 0)
    state = TrainState(
        objective=objective,
        host_parameters=host_parameters,
        host_buffers=host_buffers,
        kasmina=kasmina,
        optimizer=optimizer,
        optim=optim,
        lr=lr,
        tuner=Tuner(config.tuning, config.lr),
        clip_norm=config.train.clip_norm,
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.precision.amp == "fp16"),
        sampler=sampler,
    )
    with users_code(f"optim.name={optim.name!r}: a first step(), without a closure,", debug=config.train.debug):
        footprint()
    return state, optim


def planned_steps(config: TrainConfig, sampler: EpochSampler) -> int:
    """Optimizer steps of the whole run."""
    total = config.epochs * sampler.steps_per_epoch
    return min(total, config.max_steps) if config.max_steps else total


def boundaries_left(config: TrainConfig, state: TrainState) -> int:
    """Boundaries from here to the planned end of the run."""
    every = config.boundary_steps or state.sampler.steps_per_epoch
    return max(0, -(-(planned_steps(config, state.sampler) - state.step) // every))


def _probe(objective: Objective, slots: dict[str, Slot], batch: Batch, *, debug: bool) -> dict[str, tuple[int, ...]]:
    """The per-sample shape at every slot, from one forward pass over two samples."""
    with evaluating(objective), users_code("the model, run on two samples,", debug=debug):
        return probe_shapes(slots, lambda: objective.model(batch.inputs))


def _check_owners(config: AggregateConfig, num_slots: int, batch: Batch) -> None:
    """Raise ConfigError where every sample would be the host's, so that the mode could do nothing."""
    if config.mode == "sum":
        return
    if not num_slots:
        raise ConfigError(f"aggregate.mode={config.mode!r}: the model has no slot to grow a seed in; expected 'sum'")
    if config.attribution == "data" and batch.seed_ids is None:
        raise ConfigError(
            f"aggregate.mode={config.mode!r}: the task's items are pairs and do not say which seed a sample belongs "
            "to; give triples (input, target, seed id), or set aggregate.attribution='kasmina'"
        )


def _check_loss(task: Task) -> None:
    if isinstance(task.loss, nn.Module):
        learned = [name for name, p in task.loss.named_parameters() if p.requires_grad]
        if learned:
            raise TaskError(
                f"the task's loss has parameters of its own ({', '.join(learned[:3])}); move them to the model"
            )


def _check_metrics(task: Task, num_slots: int) -> None:
    if len(task.metrics) + num_slots > MAX_OBSERVED:
        raise TaskError(f"{num_slots} slots and {len(task.metrics)} metrics: expected at most {MAX_OBSERVED} together")
    for name in task.metrics:
        if name in ("loss", "accuracy"):
            raise TaskError(f"the task's metric {name!r} has the name of a built-in value; choose another")
        # Sent to the policy under this name.
        if not is_name(f"metric/{name}"):
            raise TaskError(f"the task's metric {name!r}: expected a name of up to 121 of a-z A-Z 0-9 _ . : / @ + -")


def _slots(model: torch.nn.Module, paths: Mapping[str, str]) -> dict[str, Slot]:
    slots = find_slots(model)
    for name, path in paths.items():
        if name in slots:
            raise TaskError(f"two slots are named {name!r}: the model has one already, and {path!r} asks for another")
        slots[name], _ = attach(model, name, path)
    return slots


def _optimizer_settings(config: OptimConfig, task: Task) -> OptimConfig:
    known = {f.name for f in fields(OptimConfig)}
    unknown = sorted(set(task.optimizer) - known)
    if unknown:
        raise TaskError(f"the task's optimizer has unknown keys {unknown}; known: {', '.join(sorted(known))}")
    try:
        return replace(config, **task.optimizer)
    except (TypeError, ValueError) as error:
        raise TaskError(f"the task's optimizer: {error}") from error
