"""Trying a structure before training runs it: forward and backward pass of what is new, and no trace of them.

whole       the batch of a step, into ``.grad``: what is compiled, and what memory has to hold
one sample  down to the seeds only: enough where the host runs already, and a tenth of the time
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from tolaria.errors import TaskError
from tolaria.kasmina.shadow import random_streams_kept, refresh_buffers
from tolaria.objective import Batch, Objective
from tolaria.state import TrainState, named_buffers_of

MODEL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What a model fails with, and what compiles it."""

Autocast: TypeAlias = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Reach:
    """A module to run, and the parameters that its loss must give a gradient to."""

    module: Objective
    parameters: Sequence[nn.Parameter]


def host_reach(state: TrainState, *, cuts: bool) -> Reach:
    """The objective with the seeds in it. ``cuts``: a seed may keep the gradient from the host before it."""
    known = set(map(id, state.host_parameters.values()))
    trained = [p for p in state.objective.parameters() if p.requires_grad]
    return Reach(state.objective, [p for p in trained if cuts or id(p) not in known])


def fine_on_one(
    state: TrainState,
    reaches: Sequence[Reach],
    batch: Batch,
    autocast: Autocast,
    moved: set[str],
) -> bool:
    """Whether all parameters get their gradient from this batch. Local; False also for whatever the model raises."""
    try:
        with without_a_trace(state, batch.weights.device, moved):
            return all(_gets_there(state, reach, batch, autocast) for reach in reaches)
    except (TaskError, *MODEL_ERRORS):
        return False


def _gets_there(state: TrainState, reach: Reach, batch: Batch, autocast: Autocast) -> bool:
    if reach.module is not state.objective:
        refresh_buffers(reach.module, state.objective)
    with autocast():
        loss = reach.module(batch.inputs, batch.targets, batch.weights).sum()
    # Not into .grad: the weight gradients of the host are most of a backward pass, and nobody asks for them.
    gradients = torch.autograd.grad(loss, reach.parameters, allow_unused=True) if reach.parameters else ()
    return all(gradient is not None for gradient in gradients)


@contextmanager
def without_a_trace(state: TrainState, device: torch.device, moved: set[str]) -> Iterator[None]:
    """Afterwards gradients are gone, buffers and random streams as before; adds to ``moved`` which buffers moved."""
    buffers = [(name, b, b.clone()) for name, b in named_buffers_of(state)]
    try:
        with random_streams_kept(device):
            yield
    finally:
        for members in (state.host_parameters, *state.kasmina.groups().values()):
            for parameter in members.values():
                parameter.grad = None
        moved.update(name for name, buffer, kept in buffers if not torch.equal(buffer, kept))
        with torch.no_grad():
            for _, buffer, kept in buffers:
                buffer.copy_(kept)
