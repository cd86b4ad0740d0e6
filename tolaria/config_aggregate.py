"""The configuration of how the gradients of several seeds become one step of the host."""

from dataclasses import dataclass
from typing import Literal

from tolaria.config_fields import doc


@dataclass(frozen=True, kw_only=True)
class AggregateConfig:
    """Whose samples count how much in the host's gradient."""

    mode: Literal["sum", "weighted", "pcgrad"] = doc(
        "sum", "host's gradient: all samples alike, by the stage of their seed, or without conflicts between seeds"
    )
    attribution: Literal["data", "kasmina"] = doc(
        "data", "which seed a sample belongs to: what the data says, or dealt to the active seeds in turn"
    )
