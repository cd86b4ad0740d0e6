"""What every way to a step's gradients has in common, and the usual one: DDP.

All are made anew when seeds come or go: a parameter that was added after that is silently never reduced.
"""

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, cat, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from tolaria.dist import World
from tolaria.objective import Batch
from tolaria.state import TrainState, named_buffers_of
from tolaria.telemetry.goodput import Ledger

# The newer name keeps the sync of buffers at construction, the older one is all that torch 2.11 knows.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


class GradientSync(Protocol):
    """From the losses of a step's microbatches to the gradients that the optimizer reads. All ranks call it alike."""

    @property
    def module(self) -> nn.Module:
        """What runs the forward pass."""

    @property
    def sends_buffers(self) -> bool:
        """Whether a step begins by sending rank 0's buffers to all ranks."""

    def rebuild(self, *, first: bool, afresh: bool) -> None:
        """Follow the structure as `Replica.rebuild` says. No collective but at ``first``."""

    def begin(self) -> None:
        """Start a step."""

    def microbatch(self, batch: Batch, position: int, *, last: bool) -> AbstractContextManager[None]:
        """The context of forward and backward pass of the step's microbatch at ``position``, from 0."""

    def backward(self, loss: Tensor) -> Tensor:
        """Add the microbatch's gradients to the step's. Returns its loss, 0-D, without a graph."""

    def finish(self) -> None:
        """End a step: ``.grad`` of every trained parameter is the mean over ranks, scaled as the loss was."""

    def apart(self) -> AbstractContextManager[None]:
        """The context of a trial: no collective, of gradients or of buffers."""

    def close(self) -> None:
        """Let go of parameters and hooks."""


class _Ddp(DistributedDataParallel):
    """DDP whose waiting for rank 0's buffers is seen."""

    waiting: AbstractContextManager[None] = nullcontext()

    def _sync_buffers(self) -> None:
        with self.waiting:
            super()._sync_buffers()  # type: ignore[no-untyped-call]


class DdpGradients:
    """Every sample counts the same: one backward pass, reduced by DDP; in one process without it.

    ``ledger``: is told of the waiting for other ranks. On the CPU the wait for their gradients is at the end of the
    backward pass, after everything of this rank's own; on CUDA it is no wait of the host's.
    """

    def __init__(self, state: TrainState, world: World, bucket_mb: int, ledger: Ledger) -> None:
        self.ledger = ledger
        self._reduces = False
        self._own_over = math.inf
        self.state = state
        self.world = world
        self.bucket_mb = bucket_mb
        self.sends_buffers = False
        self._ddp: DistributedDataParallel | None = None
        self._wrapped: list[str] = []

    @property
    def module(self) -> nn.Module:
        """The wrapper, or the bare objective."""
        return self._ddp if self._ddp is not None else self.state.objective

    def rebuild(self, *, first: bool, afresh: bool) -> None:
        """Wrap the objective again if it trains other parameters than before."""
        wanted = [name for name, p in self.state.objective.named_parameters() if p.requires_grad]
        if self.world.data_group is None or (wanted == self._wrapped and not (first or afresh)):
            return
        # The old wrapper must be gone before the new one: its hooks would reduce every gradient a second time.
        self._ddp = None
        self._wrapped = wanted
        if wanted:
            self._ddp = self._wrap(init_sync=first)

    def _wrap(self, *, init_sync: bool) -> DistributedDataParallel:
        objective = self.state.objective
        alphas = [name for name, _ in objective.named_buffers() if name.endswith(".form.alpha")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, alphas)
        device = self.world.device
        self.sends_buffers = next(named_buffers_of(self.state), None) is not None
        sync_buffers: dict[str, Any] = {_SYNC_BUFFERS: self.sends_buffers}
        ddp = _Ddp(
            objective,
            device_ids=[device.index] if device.type == "cuda" else None,
            process_group=self.world.data_group,
            init_sync=init_sync,
            **sync_buffers,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.bucket_mb,
        )
        ddp.waiting = self.ledger.inside("sync wait")
        return ddp

    def begin(self) -> None:
        """Nothing: DDP's forward pass sends the buffers."""

    def microbatch(self, batch: Batch, position: int, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced in the last microbatch only."""
        self._reduces = last and self._ddp is not None and self.world.device.type == "cpu"
        return self._ddp.no_sync() if self._ddp is not None and not last else nullcontext()

    def backward(self, loss: Tensor) -> Tensor:
        """``loss``: 0-D."""
        scaled = self.state.scaler.scale(loss)
        if not self._reduces:
            scaled.backward()
            return loss.detach()
        self._own_over = math.inf
        scaled.register_hook(self._at_the_end)
        scaled.backward()
        self.ledger.since(self._own_over, "sync wait")
        return loss.detach()

    def _at_the_end(self, gradient: Tensor) -> None:
        # What is queued first is called first: before DDP's own, which waits for the other ranks.
        Variable._execution_engine.queue_callback(self._note_end)

    def _note_end(self) -> None:
        self._own_over = self.ledger.now()

    def finish(self) -> None:
        """Nothing: DDP has reduced all in the last backward pass."""

    @contextmanager
    def apart(self) -> Iterator[None]:
        """DDP without any collective."""
        if self._ddp is None:
            yield
            return
        with self._ddp.no_sync():
            self._ddp.require_forward_param_sync = False
            try:
                yield
            finally:
                self._ddp.require_forward_param_sync = True

    def close(self) -> None:
        """Let go of DDP's hooks."""
        self._ddp = None


def send_from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Overwrite tensors by those of rank 0, one broadcast for each type. All ranks call it, with the same shapes."""
    if group is None:
        return
    for _, same_type in groupby(sorted(tensors, key=lambda t: str(t.dtype)), key=lambda t: t.dtype):
        found = [t.detach() for t in same_type]
        flat = cat([t.reshape(-1) for t in found])
        dist.broadcast(flat, src=0, group=group)
        for tensor, piece in zip(found, flat.split([t.numel() for t in found]), strict=True):
            tensor.copy_(piece.view_as(tensor))
