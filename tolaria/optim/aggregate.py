"""How the gradients of several owners become one: pure functions of weights, counts, gradients and a random order.

An owner is the host or a seed; each sample of a step has one.

    weighted   sum_o c_o g_o with c_o = w_o N / sum_o(w_o n_o): equal weights change nothing, whatever they are
    pcgrad     sum_i g_i', each g_i without its components against the other owners (Yu et al. 2020, arXiv 2001.06782)

Every rank computes the same bits from the same reduced gradients: sums have one order, however many threads there are.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_ROUNDING = 1e-12
"""Cosines closer to 0 than this are no conflict: what is left of a gradient that was projected away is rounding."""
_BLOCK = 1024
"""Elements that are added up in one go; sums of blocks are then added up the same way."""


def relative_weights(weights: Sequence[float], floor: float) -> list[float]:
    """The owners' weights over the largest of them, none below ``floor``; all 1 where all are 0.

    Only ratios matter, and so weights that are equal become exactly 1. A weight of 0 can not be divided by, so it
    becomes the floor.
    """
    largest = max(weights)
    return [max(weight / largest, floor) for weight in weights] if largest > 0 else [1.0] * len(weights)


def rescaling(weights: Tensor, counts: Tensor) -> Tensor:
    """N / sum_o(w_o n_o), 0-D float64: what makes a weighted gradient as large as that of N samples of weight 1.

    ``weights`` and ``counts`` (sample weight of each owner in the step): shape (owners,).
    """
    counts = counts.double()
    return counts.sum() / (weights.double() * counts).sum()


def projection_order(owners: int, run_seed: int, step: int) -> Tensor:
    """For each owner (row) a random order of all owners, shape (owners, owners), int64, on the CPU.

    The same on every rank and whenever this step is taken again. Moves no global generator.
    """
    generator = torch.Generator().manual_seed((run_seed * 1_000_003 + step) % 2**63)
    return torch.rand(owners, owners, generator=generator).argsort(dim=1)


def inner_products(rows: Tensor) -> Tensor:
    """The inner product of every two rows, float64, shape (rows, rows). ``rows``: shape (rows, size)."""
    count = len(rows)
    blocks = [
        torch.cat([(piece[i:] * piece[i]).sum(-1) for i in range(count)])
        for piece in (functional.pad(p, (0, -p.shape[1] % _BLOCK)).view(count, -1, _BLOCK) for p in _pieces(rows))
    ]
    products = _added_up(torch.cat(blocks, dim=1))
    found = torch.empty(count, count, dtype=torch.float64, device=rows.device)
    first, second = torch.triu_indices(count, count, device=rows.device)
    found[first, second] = products
    found[second, first] = products
    return found


def projection(products: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """PCGrad from the inner products of the gradients alone: what each counts in the sum, and its conflicts.

    Each gradient in turn, for the others in its row of ``order``, loses its component along an other one (as that was
    before any projection) where their product is negative. All of it happens in the span of the gradients, so the
    result is ``sum_j coefficients[j] * g_j``; conflicts[i] counts the projections of gradient i. Both float64.
    """
    count = len(products)
    own = torch.arange(count, device=products.device)
    mixed = torch.eye(count, dtype=torch.float64, device=products.device)  # row i: what g_i has become
    conflicts = torch.zeros(count, dtype=torch.float64, device=products.device)
    squares = products.diagonal()
    norms = squares.sqrt()
    for other in order.unbind(1):
        along = (mixed * products[other]).sum(1)
        conflicting = (along < -_ROUNDING * norms * norms[other]) & (other != own)
        share = along / torch.where(squares[other] > 0, squares[other], 1.0)
        mixed[own, other] -= torch.where(conflicting, share, 0.0)
        conflicts += conflicting
    return mixed.sum(0), conflicts


def combine(rows: Tensor, coefficients: Tensor) -> None:
    """Overwrite the first row by ``sum_j coefficients[j] * rows[j]``, added up in float64."""
    for piece, target in zip(_pieces(rows), _split(rows[:1]), strict=True):
        target.copy_((piece * coefficients[:, None]).sum(0, keepdim=True))


def _split(rows: Tensor) -> Iterator[Tensor]:
    # Pieces that stay in a processor's cache; on a GPU few kernels matter more.
    width = _BLOCK * (16 if rows.device.type == "cpu" else 4096)
    yield from rows.split(width, dim=1)


def _pieces(rows: Tensor) -> Iterator[Tensor]:
    for piece in _split(rows):
        yield piece.double()


def _added_up(values: Tensor) -> Tensor:
    """Sums of the rows of (rows, n), block by block: a long row in one call would be split among threads."""
    while values.shape[1] > 1:
        padded = functional.pad(values, (0, -values.shape[1] % _BLOCK))
        values = padded.view(len(values), -1, _BLOCK).sum(-1)
    return values[:, 0]
