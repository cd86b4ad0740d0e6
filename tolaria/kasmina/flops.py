"""Counting what a forward pass costs: floating-point operations of matrix products, convolutions and attention.

Elementwise operations are not counted, as is usual: they take time, but few operations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_flops(run: Callable[[], object]) -> int:
    """Operations of whatever ``run()`` calls, eager, without gradients; a multiplication and an addition are two."""
    counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH)
    with torch.no_grad(), counter:
        run()
    return int(counter.get_total_flops())


def _cpu_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Both matrix products in full, causal or not, as torch counts the other kernels of attention."""
    return int(sdpa_flop_count(query, key, value))


# torch counts attention's kernels for CUDA and not the one for the CPU.
_UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
