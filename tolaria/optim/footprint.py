"""What a trained parameter costs in memory."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.optim.groups import MACHINE_KEYS, blank_like, state_of

_SIDE = 64


class Footprint:
    """`bytes_per_parameter` of the optimizer in force, tried out once for each class and its settings. Local."""

    def __init__(self, present: Callable[[], Optimizer]) -> None:
        """``present`` gives the optimizer in force, which is another one after a change of structure or class."""
        self._present = present
        self._known: dict[str, int] = {}

    def __call__(self) -> int:
        """Bytes; raises what the optimizer raises in a first step."""
        optimizer = self._present()
        # The class's own settings: those of a group that joins now. A rate changes often, and nothing that is kept.
        settings = {k: v for k, v in sorted(optimizer.defaults.items()) if k != "lr" and k not in MACHINE_KEYS}
        key = repr((type(optimizer), settings))
        if key not in self._known:
            self._known[key] = bytes_per_parameter(optimizer)
        return self._known[key]


def bytes_per_parameter(optimizer: Optimizer) -> int:
    """Device memory of one float32 parameter: itself, its gradient, and its share of the optimizer's state.

    Found by one step of an optimizer like this one on a stand-in matrix, since only the class knows what it keeps;
    of state that is not one tensor per parameter (factored moments) it is an estimate. Local.
    """
    device = optimizer.param_groups[0]["params"][0].device
    stand_in = torch.zeros(_SIDE, _SIDE, device=device, requires_grad=True)
    stand_in.grad = torch.zeros_like(stand_in)
    probe = blank_like(optimizer, [{"params": [stand_in]}])
    probe.step()
    # Counters and the like are held once for a whole parameter, whatever its size.
    held = [v for v in state_of(probe, stand_in).values() if isinstance(v, Tensor) and v.numel() > 1]
    state = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return 2 * stand_in.element_size() + math.ceil(state / stand_in.numel())
