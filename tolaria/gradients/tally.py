"""What the aggregation of a step's gradients did, counted on the device from boundary to boundary."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_KINDS = ("share", "shared_norm", "conflicts")
_TOTALS, _COUNTS = range(2)


class Tally:
    """Means of each owner's share and norm, and its conflicts, since the last boundary. Equal on every rank.

    ``values``: float64, shape (kinds, 2, owners), sums and how many were summed; owners are rows as in
    `tolaria.gradients.owners`, the host first. Adding does not wait for the device.
    """

    def __init__(self, slots: Sequence[str], device: torch.device) -> None:
        self.slots = tuple(slots)
        self.values = torch.zeros(len(_KINDS), 2, len(slots) + 1, dtype=torch.float64, device=device)

    def add(self, kind: str, rows: Tensor, values: Tensor) -> None:
        """Add one step's ``values`` of the owners ``rows``, both of shape (n,); what is not finite is left out."""
        found = self.values[_KINDS.index(kind)]
        ok = values.isfinite()
        found[_TOTALS].index_add_(0, rows, torch.where(ok, values.double(), 0.0))
        found[_COUNTS].index_add_(0, rows, ok.double())

    def take(self) -> dict[str, dict[str, float]]:
        """What was counted, by slot and kind, and begin anew. Waits for the device."""
        found: dict[str, dict[str, float]] = {}
        for kind, (totals, counts) in zip(_KINDS, self.values.tolist(), strict=True):
            for row, slot in enumerate(self.slots, 1):
                if counts[row]:
                    whole = kind == "conflicts"
                    found.setdefault(slot, {})[kind] = totals[row] if whole else totals[row] / counts[row]
        self.values.zero_()
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, so that a run resumed between two boundaries reports all of it. Waits for the device."""
        return {"slots": list(self.slots), "values": [v.hex() for v in self.values.flatten().tolist()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError when the slots differ."""
        if tuple(state["slots"]) != self.slots:
            raise ValueError(f"a tally of slots {state['slots']}, here they are {list(self.slots)}")
        values = [float.fromhex(v) for v in state["values"]]
        self.values.copy_(torch.tensor(values, dtype=torch.float64).view_as(self.values))
