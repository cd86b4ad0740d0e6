"""In which order the elements of 4-D tensors lie in memory: channels last, where convolutions are faster for it.

Names, shapes and values stay as they are, so a checkpoint does not know of it.
"""

from typing import Literal

import torch
from torch import nn


def chosen_format(
    choice: Literal["auto", "on", "off"], model: nn.Module, device: torch.device
) -> torch.memory_format:  # fmt: skip
    """``auto``: channels last on CUDA where there is a Conv2d, whose kernels there are made for it."""
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    last = choice == "on" or (choice == "auto" and device.type == "cuda" and convolves)
    return torch.channels_last if last else torch.preserve_format


def lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Give parameters and buffers of four dimensions this format. The objects stay; call it before gradients exist."""
    if memory_format == torch.preserve_format:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
