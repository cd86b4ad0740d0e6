"""A tap in a slot: lets the value through untouched and keeps it, with the gradient of the loss there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.kasmina.slot import Slot


class _Handle(torch.autograd.Function):
    """Forward: h itself. Backward: the gradient to h, and the same to a handle that nothing else depends on."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, handle: Tensor) -> Tensor:
        # A copy: what follows may work in place (ReLU does, in many models), and h is still needed as it was.
        return h.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


class Tap(nn.Module):
    """What passed through the slot since it was put there: ``values``, and ``handles`` whose gradient is the loss's."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []
        self.handles: list[Tensor] = []

    def forward(self, h: Tensor) -> Tensor:
        """``h`` unchanged, bit for bit."""
        # Without elements of its own: only its gradient is wanted, and that has the shape of h.
        handle = torch.zeros((), dtype=h.dtype, device=h.device).expand_as(h).requires_grad_()
        self.values.append(h.detach())
        self.handles.append(handle)
        return _Handle.apply(h, handle)  # type: ignore[no-any-return,no-untyped-call]


@contextmanager
def tapped(slots: Mapping[str, Slot], names: Iterable[str]) -> Iterator[dict[str, Tap]]:
    """The named slots, which hold no seed, with a tap in each; their own forms are back afterwards."""
    taps = {name: Tap() for name in names}
    forms = {name: slots[name].form for name in taps}
    for name, tap in taps.items():
        slots[name].form = tap
    try:
        yield taps
    finally:
        for name, form in forms.items():
            slots[name].form = form


def passed_through(loss: Tensor, taps: Mapping[str, Tap]) -> dict[str, Sequence[tuple[Tensor, Tensor]]]:
    """(h, v) of every call of every tapped slot; no gradient of any parameter is computed or kept."""
    # Copies: with activation checkpointing the backward pass runs the slots again, and the taps note that too.
    calls = {name: (list(tap.values), list(tap.handles)) for name, tap in taps.items()}
    handles = [handle for _, of_slot in calls.values() for handle in of_slot]
    gradients = iter(torch.autograd.grad(loss, handles, materialize_grads=True))
    return {name: list(zip(values, islice(gradients, len(values)), strict=True)) for name, (values, _) in calls.items()}
