"""The seam between host and seed, where the weights of samples are taken off a gradient and put on again.

Sample i counts w_i times in the host's gradient, but once in a seed's. So the loss of sample i is multiplied by w_i,
and on the way back the gradient is divided by w_i where it enters a seed (the seed's output) and multiplied again
where it leaves it for the host (the seed's input). The forward pass is the identity. Exact where samples do not mix:
a layer that normalises over the batch passes on gradients of other samples than its own.
"""

from typing import Any

import torch
from torch import Tensor


class _Reweighted(torch.autograd.Function):
    """Forward: the value itself. Backward: a sample's gradient divided by its weight, or out of the seed times it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weights: Tensor, into_seed: bool) -> Tensor:
        ctx.save_for_backward(weights)
        ctx.into_seed = into_seed
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        along = weights.view(-1, *([1] * (grads[0].dim() - 1)))  # (batch, 1, ...), for gradients of (batch, ...)
        changed = grads[0] / along if ctx.into_seed else grads[0] * along
        return changed.to(grads[0].dtype), None, None


def seed_output(f: Tensor, weights: Tensor | None) -> Tensor:
    """``f``, the output of a seed; its gradient loses the weights of its samples. None: no seam.

    ``weights``: shape (batch,), float32, none of them 0. Read when the backward pass runs.
    """
    return f if weights is None else _Reweighted.apply(f, weights, True)  # type: ignore[no-untyped-call]


def seed_input(h: Tensor, weights: Tensor | None) -> Tensor:
    """``h``, the input of a seed; the gradient that leaves the seed by it gets the weights of its samples again."""
    return h if weights is None else _Reweighted.apply(h, weights, False)  # type: ignore[no-untyped-call]
