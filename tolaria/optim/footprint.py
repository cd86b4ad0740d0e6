"""What a trained parameter costs in memory."""

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.optim.groups import blank_like, options_of, state_of

_SIDE = 64


def bytes_per_parameter(optimizer: Optimizer) -> int:
    """Device memory of one float32 parameter: itself, its gradient, and its share of the optimizer's state.

    Found by one step of an optimizer like this one on a stand-in matrix, since only the class knows what it keeps;
    of state that is not one tensor per parameter (factored moments) it is an estimate. Local.
    """
    device = optimizer.param_groups[0]["params"][0].device
    stand_in = torch.zeros(_SIDE, _SIDE, device=device, requires_grad=True)
    stand_in.grad = torch.zeros_like(stand_in)
    probe = blank_like(optimizer, [{**options_of(optimizer.param_groups[0]), "params": [stand_in]}])
    probe.step()
    # Counters and the like are held once for a whole parameter, whatever its size.
    held = [v for v in state_of(probe, stand_in).values() if isinstance(v, Tensor) and v.numel() > 1]
    state = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return 2 * stand_in.element_size() + math.ceil(state / stand_in.numel())
