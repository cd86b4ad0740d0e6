"""The seam between host and seed, where the weights of samples are taken off a gradient and put on again.

Sample i counts w_i times in the host's gradient, but once in a seed's. So the loss of sample i is multiplied by w_i,
and on the way back the gradient is divided by w_i where it enters a seed (the seed's output) and multiplied again
where it leaves it for the host (the seed's input). The forward pass is the identity. Exact where samples do not mix:
a layer that normalises over the batch passes on gradients of other samples than its own.
"""

from typing import Any

import torch
from torch import Tensor


class _IntoSeed(torch.autograd.Function):
    """Forward: ``f`` itself. Backward: each sample's gradient divided by its weight."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return f.view_as(f)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return (grads[0] / _along(weights, grads[0])).to(grads[0].dtype), None


class _OutOfSeed(torch.autograd.Function):
    """Forward: ``h`` itself. Backward: each sample's gradient multiplied by its weight."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return (grads[0] * _along(weights, grads[0])).to(grads[0].dtype), None


def seed_output(f: Tensor, weights: Tensor | None) -> Tensor:
    """``f``, the output of a seed; its gradient loses the weights of its samples. None: no seam.

    ``weights``: shape (batch,), float32, none of them 0. Read when the backward pass runs.
    """
    return f if weights is None else _IntoSeed.apply(f, weights)  # type: ignore[no-untyped-call]


def seed_input(h: Tensor, weights: Tensor | None) -> Tensor:
    """``h``, the input of a seed; the gradient that leaves the seed by it gets the weights of its samples again."""
    return h if weights is None else _OutOfSeed.apply(h, weights)  # type: ignore[no-untyped-call]


def _along(weights: Tensor, gradient: Tensor) -> Tensor:
    """(batch,) as (batch, 1, ...), to go with a gradient of shape (batch, ...)."""
    return weights.view(-1, *([1] * (gradient.dim() - 1)))
