"""What rank 0 runs on, for the state packet and the start of the progress output."""

import psutil
import torch

from tolaria.leyline.types import HardwareContext

_GIB = 1024**3


def hardware_context(device: torch.device) -> HardwareContext:
    """Device, memory and load now. Local; takes well under a millisecond on a CPU."""
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
