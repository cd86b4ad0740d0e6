"""Gradients that know whose samples they are of, in one buffer that all ranks reduce once per step.

    weighted   [ host, weighted | seeds' own | sample weights ]              one backward pass
    pcgrad     [ host of owner 1 | of owner 2 | ... | seeds' own | ... ]     one backward pass for each owner

The sample weights of all owners travel at the end, so that every rank knows them without a collective of their own.
That part has an entry for every slot: what a seed adds to the buffer must not move the host's gradient in it, since
from 3 ranks on the order of a sum depends on the place. What makes one gradient of several is in
`tolaria/optim/aggregate.py`; it works on reduced gradients, as projecting before the sum would be another result.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tolaria.dist import World
from tolaria.errors import TaskError
from tolaria.gradients.owners import HOST_ROW, Owners
from tolaria.gradients.sync import send_from_first
from tolaria.gradients.tally import Tally
from tolaria.objective import Batch
from tolaria.optim.aggregate import (
    combine,
    inner_products,
    projection,
    projection_order,
    relative_weights,
    rescaling,
)
from tolaria.state import TrainState, named_buffers_of
from tolaria.telemetry.goodput import Ledger

WEIGHT_FLOOR = 2.0**-24
"""Stands for a weight of 0, next to the largest: below the rounding of a float32 sum, and a power of 2, so that taking
it off a gradient is exact."""
WEIGHT_FLOOR_FP16 = 2.0**-10
"""The same where gradients are float16: a smaller one would let them vanish before it is taken off again."""


class FusedGradients(ABC):
    """What both modes share: the buffer, its reduction, and what DDP would do besides. See `GradientSync`."""

    def __init__(self, state: TrainState, world: World, owners: Owners, tally: Tally, ledger: Ledger) -> None:
        self.ledger = ledger
        self.state = state
        self.world = world
        self.owners = owners
        self.tally = tally
        self._planned: list[tuple[str, int]] = []
        self._parameters: list[nn.Parameter] = []
        self._rows_in_use = torch.empty(0, dtype=torch.int64)
        self._flat = self._tail = self._shared = torch.empty(0)
        self._views: list[list[Tensor]] = []

    @property
    def module(self) -> nn.Module:
        """The bare objective; its forward pass gives one loss for each sample."""
        return self.state.objective

    @property
    def sends_buffers(self) -> bool:
        """Whether there are buffers that a forward pass may change, and other ranks."""
        return self.world.data_group is not None and next(named_buffers_of(self.state), None) is not None

    def rebuild(self, *, first: bool, afresh: bool) -> None:
        """Lay out the buffer for what is trained now. At ``first`` rank 0's weights and buffers go to all ranks.

        Raises ReplicaMismatch at ``first`` when the ranks have not the same parameters.
        """
        if first:
            objective = self.state.objective
            names = "|".join(f"{n} {p.dtype} {tuple(p.shape)}" for n, p in objective.named_parameters())
            self.world.peers.require_equal(hashlib.sha256(names.encode()).digest(), "the model's list of parameters")
            send_from_first(objective.parameters(), self.world.data_group)
            send_from_first((b for _, b in named_buffers_of(self.state)), self.world.data_group)
        self._plan(afresh=first or afresh)

    def _plan(self, *, afresh: bool) -> None:
        trained = [(name, p) for name, p in self.state.objective.named_parameters() if p.requires_grad]
        wanted = [(name, id(p)) for name, p in trained]
        changed = self.owners.plan()
        if wanted == self._planned and not (changed or afresh):
            return
        self._planned = wanted
        hosts = set(map(id, self.state.host_parameters.values()))
        shared = [p for _, p in trained if id(p) in hosts]
        own = [p for _, p in trained if id(p) not in hosts]
        self._parameters = shared + own
        self._rows_in_use = torch.tensor(self.owners.rows, device=self.world.device)
        self._lay_out(shared, own, num_rows=self._num_rows())

    def _num_rows(self) -> int:
        """Gradients of the host in the buffer."""
        return 1

    def _lay_out(self, shared: Sequence[nn.Parameter], own: Sequence[nn.Parameter], *, num_rows: int) -> None:
        dtype = reduce(torch.promote_types, (p.dtype for p in self._parameters), torch.float32)
        if dtype.is_complex:
            raise TaskError("the model has complex parameters, which only aggregate.mode=sum can train")
        sizes = [sum(p.numel() for p in part) for part in (shared, own)]
        owners = len(self.state.kasmina.seeds) + 1
        self._flat = torch.zeros(num_rows * sizes[0] + sizes[1] + owners, dtype=dtype, device=self.world.device)
        rows, of_own, self._tail = self._flat.split([num_rows * sizes[0], sizes[1], owners])
        self._shared = rows.view(num_rows, sizes[0])
        self._views = [_views(row, shared) + _views(of_own, own) for row in self._shared.unbind()]

    def begin(self) -> None:
        """Begin to count; rank 0's buffers go to all ranks."""
        self._tail.zero_()
        if self.sends_buffers:
            with self.ledger.phases("sync"):
                send_from_first((b for _, b in named_buffers_of(self.state)), self.world.data_group)

    def finish(self) -> None:
        """Reduce the buffer and make one gradient of the host's."""
        self._collect()
        if self.world.data_group is not None:
            self._flat /= self.world.world_size  # before the sum, as DDP does
            dist.all_reduce(self._flat, group=self.world.data_group)
        self._aggregate()
        for parameter, view in zip(self._parameters, self._views[0], strict=True):
            parameter.grad = view if parameter.dtype == view.dtype else view.to(parameter.dtype)
        counts = self._tail[self._rows_in_use]
        self.tally.add("share", self._rows_in_use, counts / counts.sum())

    @abstractmethod
    def _collect(self) -> None:
        """Put into the buffer what is not in it yet."""

    @abstractmethod
    def _aggregate(self) -> None:
        """Turn the reduced gradients of the host into one, in the first row."""

    def apart(self) -> AbstractContextManager[None]:
        """Nothing: neither forward nor backward pass has a collective."""
        return nullcontext()

    def close(self) -> None:
        """Let go of the parameters and the buffer."""
        self._parameters, self._views, self._planned = [], [], []
        self._flat = self._tail = self._shared = torch.empty(0)


class WeightedGradients(FusedGradients):
    """Samples weigh in the host's gradient as the stage of their owner says, all together as much as without weights.

    ``seam``: the weights of the microbatch in hand, (batch,), which the seeds' forms take off again.
    """

    def __init__(
        self, state: TrainState, world: World, owners: Owners, tally: Tally, ledger: Ledger, *, seam: Tensor,
        floor: float,
    ) -> None:  # fmt: skip
        super().__init__(state, world, owners, tally, ledger)
        self._seam = seam
        self._floor = floor
        self._weights: list[float] = []
        self._table = torch.ones(len(state.kasmina.seeds) + 1, device=world.device)

    def begin(self) -> None:
        """Also take note of the owners' weights, which move with alpha."""
        super().begin()
        weights = relative_weights(self.owners.weights(), self._floor)
        if weights != self._weights:
            self._weights = weights
            of_row = dict(zip(self.owners.rows, weights, strict=True))
            self._table.copy_(torch.tensor([of_row.get(row, 1.0) for row in range(len(self._table))]))

    @contextmanager
    def microbatch(self, batch: Batch, position: int, *, last: bool) -> Iterator[None]:
        """Fill the seam, and count whose samples these are."""
        rows, _ = self.owners.of(batch, position)
        self._seam.copy_(self._table[rows])
        self._tail.index_add_(0, rows, batch.weights.to(self._tail.dtype))
        yield

    def backward(self, loss: Tensor) -> Tensor:
        """``loss``: one for each sample, (batch,)."""
        self.state.scaler.scale((loss * self._seam).sum()).backward()
        return loss.detach().sum()

    def _collect(self) -> None:
        found = []
        for view, parameter in zip(self._views[0], self._parameters, strict=True):
            if parameter.grad is not None:
                found.append((view, parameter.grad))
            else:
                view.zero_()
        if found:
            views, gradients = zip(*found, strict=True)
            torch._foreach_copy_(views, gradients)

    def _aggregate(self) -> None:
        if set(self._weights) != {1.0}:  # else it would be a factor of exactly 1
            self._shared *= rescaling(self._table, self._tail)


class ProjectedGradients(FusedGradients):
    """PCGrad: each owner's gradient of the host by itself, conflicting ones projected. Seeds get the plain sum."""

    def __init__(
        self, state: TrainState, world: World, owners: Owners, tally: Tally, ledger: Ledger, *, run_seed: int
    ) -> None:
        super().__init__(state, world, owners, tally, ledger)
        self._run_seed = run_seed
        self._of_sample = torch.empty(0, dtype=torch.int64)
        self._present: tuple[int, ...] = ()

    def _num_rows(self) -> int:
        return len(self.owners.rows)

    def begin(self) -> None:
        """Also empty the buffer, into which the owners' gradients are added."""
        super().begin()
        self._flat.zero_()

    @contextmanager
    def microbatch(self, batch: Batch, position: int, *, last: bool) -> Iterator[None]:
        """Take note of whose samples these are."""
        self._of_sample, self._present = self.owners.of(batch, position)
        self._tail.index_add_(0, self._of_sample, batch.weights.to(self._tail.dtype))
        yield

    def backward(self, loss: Tensor) -> Tensor:
        """``loss``: one for each sample, (batch,). One backward pass for each owner that has samples here."""
        scaled = self.state.scaler.scale(loss)
        for owner in self._present:
            gradients = torch.autograd.grad(
                scaled, self._parameters, (self._of_sample == owner).to(scaled.dtype),
                retain_graph=owner != self._present[-1], allow_unused=True,
            )  # fmt: skip
            views = self._views[self.owners.rows.index(owner)]
            _add(views, gradients)
        return loss.detach().sum()

    def _collect(self) -> None:
        """Nothing: the backward passes have added it."""

    def _aggregate(self) -> None:
        if self.owners.rows == (HOST_ROW,):
            return
        products = inner_products(self._shared)
        order = projection_order(len(products), self._run_seed, self.state.step)
        coefficients, conflicts = projection(products, order.to(products.device))
        if len(products) > 1:
            combine(self._shared, coefficients)
        scale = self.state.scaler.scale(torch.ones((), device=products.device))
        self.tally.add("shared_norm", self._rows_in_use, products.diagonal().sqrt() / scale)
        self.tally.add("conflicts", self._rows_in_use, conflicts)


def _add(views: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    found = [(v, g.to(v.dtype)) for v, g in zip(views, gradients, strict=True) if g is not None]
    if found:
        torch._foreach_add_([v for v, _ in found], [g for _, g in found])


def _views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    # In the parameter's own order in memory: fused optimizers go through both by their addresses.
    pieces = flat.split([p.numel() for p in parameters])
    return [
        piece.as_strided(p.shape, p.stride()) if _is_dense(p) else piece.view(p.shape)
        for piece, p in zip(pieces, parameters, strict=True)
    ]


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie in one piece of memory, each once, in whatever order."""
    strides = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return False
        expected *= size
    return True
