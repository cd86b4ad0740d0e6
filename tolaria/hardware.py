"""What rank 0 runs on, for the state packet and the start of the progress output."""

import math
import time
from collections.abc import Callable

import psutil
import torch

from tolaria.leyline.types import HardwareContext

_GIB = 1024**3
FRESH_S = 1.0


class Hardware:
    """A device as the policy is told of it, looked at once a second at most: on a CPU a look takes 0.2 ms. Local."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._clock = clock
        self._looked = -math.inf
        self._seen = HardwareContext(device_type=device.type)

    def now(self) -> HardwareContext:
        """Device, memory and load, `FRESH_S` old at most."""
        now = self._clock()
        if now - self._looked >= FRESH_S:
            self._looked, self._seen = now, hardware_context(self._device)
        return self._seen


def hardware_context(device: torch.device) -> HardwareContext:
    """Device, memory and load now. Local."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        return HardwareContext(
            device_type="cuda",
            device_id=str(device.index),
            total_memory_gb=total / _GIB,
            available_memory_gb=free / _GIB,
            compute_capability=major * 10 + minor,
        )
    memory = psutil.virtual_memory()
    return HardwareContext(
        device_type="cpu",
        total_memory_gb=memory.total / _GIB,
        available_memory_gb=memory.available / _GIB,
        utilization_percent=psutil.cpu_percent(),
    )


def device_text(device: torch.device, world_size: int) -> str:
    """For people: "2 ranks on cpu"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{world_size} rank{'s' if world_size > 1 else ''} on {name}"
