"""One seed: what grows in one slot, with its stage, alpha and evidence."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from tolaria.kasmina.gates import Evidence
from tolaria.kasmina.lifecycle import HOLDS_SEED, alpha_at, gradient_weight
from tolaria.leyline.types import SeedStage


class NormRing:
    """The last ``size`` gradient norms."""

    def __init__(self, size: int) -> None:
        self._norms: deque[float] = deque(maxlen=size)

    def add(self, norm: float) -> None:
        """Append a norm."""
        self._norms.append(norm)

    def read(self) -> list[float]:
        """The norms, oldest first."""
        return list(self._norms)

    def load(self, norms: Iterable[float]) -> None:
        """Replace the content by ``norms``, oldest first."""
        self._norms.clear()
        self._norms.extend(norms)


@dataclass
class Seed:
    """What one slot holds. A DORMANT slot has no module. Owned by Kasmina; others read it.

    ``alpha`` is a 0-D float32 tensor that the compiled graph reads; `advance` is its only writer. ``seam``: weights of
    the samples in hand, (batch,), one tensor for all seeds, where they are weighted; None: not.
    """

    slot: str
    shape: tuple[int, ...]
    alpha: Tensor
    norms: NormRing
    seam: Tensor | None = None
    stage: SeedStage = SeedStage.DORMANT
    blueprint: str = ""
    command_id: str = ""
    module: nn.Module | None = None
    schedule: str = "sigmoid"
    blend_steps: int = 1
    blend_position: int = 0
    boundaries_in_stage: int = 0
    age_boundaries: int = 0
    fine_tuning: bool = False
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def occupied(self) -> bool:
        """Whether the slot holds parameters now."""
        return self.stage in HOLDS_SEED

    @property
    def group(self) -> str:
        """Name of the seed's parameter group."""
        return f"seed/{self.slot}"

    @property
    def parameter_count(self) -> int:
        """Number of parameters the seed holds now."""
        return sum(p.numel() for p in self.module.parameters()) if self.module is not None else 0

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The seed's parameters by their name in optimizer and checkpoint: ``seed/<slot>/<name>``."""
        if self.module is None:
            return {}
        return {f"{self.group}/{name}": p for name, p in self.module.named_parameters()}

    def named_buffers(self) -> dict[str, Tensor]:
        """The seed's buffers by their name in the checkpoint."""
        if self.module is None:
            return {}
        return {f"{self.group}/{name}": b for name, b in self.module.named_buffers()}

    def advance(self) -> None:
        """One optimizer step further on the way from alpha 0 to 1. Only in BLENDING."""
        if self.stage == SeedStage.BLENDING and self.blend_position < self.blend_steps:
            self.blend_position += 1
            self.alpha.fill_(alpha_at(self.schedule, self.blend_position, self.blend_steps))

    @property
    def alpha_value(self) -> float:
        """Alpha as a number, without asking the device."""
        if self.stage in (SeedStage.PROBATIONARY, SeedStage.FOSSILIZED):
            return 1.0
        if self.stage != SeedStage.BLENDING:
            return 0.0
        return alpha_at(self.schedule, self.blend_position, self.blend_steps)

    @property
    def gradient_weight(self) -> float:
        """Weight of its samples in the host's gradient now."""
        return gradient_weight(self.stage, alpha=self.alpha_value, fine_tuning=self.fine_tuning)

    def enter(self, stage: SeedStage) -> None:
        """Change the stage and start counting boundaries anew."""
        self.stage = stage
        self.boundaries_in_stage = 0

    def memento(self) -> dict[str, Any]:
        """A shallow copy of every field, enough to undo a change of structure."""
        kept = {name: getattr(self, name) for name in self.__dataclass_fields__}
        kept["alpha_number"] = float(self.alpha)  # a boundary may read the device
        kept["evidence"] = replace(self.evidence)
        kept["norm_history"] = self.norms.read()
        return kept

    def restore(self, memento: dict[str, Any]) -> None:
        """Put back what `memento` kept, with the same module and tensor objects."""
        for name in self.__dataclass_fields__:
            setattr(self, name, memento[name])
        self.alpha.fill_(memento["alpha_number"])
        self.norms.load(memento["norm_history"])

    def state_dict(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON; numbers as hexadecimal floats, so that nothing is rounded."""
        evidence = {k: v.hex() if isinstance(v, float) else v for k, v in vars(self.evidence).items()}
        evidence["gradient_norms"] = [n.hex() for n in self.evidence.gradient_norms]
        return {
            "stage": self.stage.name,
            "shape": list(self.shape),
            "blueprint": self.blueprint,
            "command_id": self.command_id,
            "schedule": self.schedule,
            "blend_steps": self.blend_steps,
            "blend_position": self.blend_position,
            "boundaries_in_stage": self.boundaries_in_stage,
            "age_boundaries": self.age_boundaries,
            "fine_tuning": self.fine_tuning,
            "evidence": evidence,
            "norms": [n.hex() for n in self.norms.read()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict`'s values; the module is built by Kasmina."""
        self.stage = SeedStage[state["stage"]]
        for name in ("blueprint", "command_id", "schedule"):
            setattr(self, name, str(state[name]))
        for name in ("blend_steps", "blend_position", "boundaries_in_stage", "age_boundaries"):
            setattr(self, name, int(state[name]))
        self.fine_tuning = bool(state["fine_tuning"])
        floats = (
            "loss_before_graft", "loss_now", "loss_with", "loss_without", "contribution_noise", "output_ratio"
        )  # fmt: skip
        saved = state["evidence"]
        self.evidence = Evidence(
            gradient_norms=[float.fromhex(n) for n in saved["gradient_norms"]],
            non_finite_outputs=int(saved["non_finite_outputs"]),
            shape_mismatch=str(saved["shape_mismatch"]),
            **{name: float.fromhex(saved[name]) for name in floats},
        )
        self.norms.load([float.fromhex(n) for n in state["norms"]])
        self.alpha.fill_(alpha_at(self.schedule, self.blend_position, self.blend_steps))
