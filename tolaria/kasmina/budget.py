"""How much may be grown: parameters and device memory, of one seed and of all seeds together."""

from collections.abc import Callable
from dataclasses import dataclass

from tolaria.config import KasminaConfig
from tolaria.kasmina import gates
from tolaria.kasmina.gates import GateResult


@dataclass(frozen=True)
class Budget:
    """The limits of a run.

    ``bytes_each`` tells the device memory of one trained parameter, with its gradient and its share of the state of
    the optimizer in force.
    Not counted: activations, which depend on the batch, and snapshots, which lie in host memory under a limit of their
    own (recovery.snapshot_memory_mb).
    """

    config: KasminaConfig
    bytes_each: Callable[[], int]

    def check(self, parameters: int, grown: int) -> GateResult:
        """The word of gate G0 on a seed of so many parameters beside the ``grown`` ones."""
        return gates.g0_sanity(parameters, grown, self.config, bytes_each=self.bytes_each())

    def left(self, grown: int) -> dict[str, float]:
        """What may still be grown: "budget_parameters", and "budget_mb" (MiB) where memory is limited."""
        left = {"budget_parameters": float(self.config.max_grown_parameters - grown)}
        if self.config.max_grown_mb:
            left["budget_mb"] = self.config.max_grown_mb - grown * self.bytes_each() / 2**20
        return left
