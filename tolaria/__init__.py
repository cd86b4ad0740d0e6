"""Tolaria trains a PyTorch model on N ranks and lets a policy steer it while it trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tolaria.build import train
    from tolaria.config import Config
    from tolaria.kasmina.blueprints import register_blueprint
    from tolaria.kasmina.candidates import describe_blueprint
    from tolaria.kasmina.slot import Slot
    from tolaria.task import Task

__version__ = "0.1.0"
__all__ = ["Config", "Slot", "Task", "describe_blueprint", "register_blueprint", "train"]

_HOMES = {
    "Config": "tolaria.config",
    "Slot": "tolaria.kasmina.slot",
    "Task": "tolaria.task",
    "describe_blueprint": "tolaria.kasmina.candidates",
    "register_blueprint": "tolaria.kasmina.blueprints",
    "train": "tolaria.build",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: a wrong flag must be answered before torch is loaded.
    if name not in _HOMES:
        raise AttributeError(f"module 'tolaria' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
