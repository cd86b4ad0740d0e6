"""Running means and rates."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean over ``count`` values; NaN when there were none."""

    total: float
    count: float

    @property
    def value(self) -> float:
        """The mean itself."""
        return self.total / self.count if self.count else float("nan")


class Meters:
    """Sums and counts by name. Local; of numbers that the host knows.

    To average over ranks, sum `packed` over them and pass the result to `unpack`: every value then weighs the same on
    any number of ranks, also when their shares are uneven.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"meter names {list(names)}: expected one or more different names")
        self.names = tuple(names)
        self._sums = {name: [0.0, 0.0] for name in names}

    def add(self, name: str, value: float) -> None:
        """Add one value."""
        row = self._sums[name]
        row[0] += value
        row[1] += 1.0

    def packed(self) -> Tensor:
        """Totals and counts as one float64 CPU tensor of shape (2 * number of names,)."""
        return torch.tensor(list(self._sums.values()), dtype=torch.float64).flatten()

    def unpack(self, packed: Tensor) -> dict[str, Mean]:
        """The means by name in a tensor that `packed` made, here or summed over ranks. Local."""
        rows = packed.view(-1, 2).tolist()
        return {name: Mean(total, count) for name, (total, count) in zip(self.names, rows, strict=True)}

    def read(self) -> dict[str, Mean]:
        """This rank's means by name."""
        return {name: Mean(total, count) for name, (total, count) in self._sums.items()}

    def reset(self) -> None:
        """Back to no values."""
        self._sums = {name: [0.0, 0.0] for name in self.names}

    def state_dict(self) -> dict[str, list[float]]:
        """JSON-able [total, count] by name, so that a run resumed inside an epoch reports the whole epoch."""
        return {name: list(row) for name, row in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over what `state_dict` returned. Raises ValueError when the names differ."""
        if set(state) != set(self.names):
            raise ValueError(f"meters {sorted(state)} in the state, {sorted(self.names)} here")
        self._sums = {name: [float(v) for v in state[name]] for name in self.names}


class Rate:
    """Units (samples, tokens) per second since the last reading. Local."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._count = 0.0

    def add(self, count: float) -> None:
        """Count finished units."""
        self._count += count

    def read(self) -> float:
        """Units per second since the last call (or the start), 0 when no time has passed; starts anew."""
        now = self._clock()
        seconds, count = now - self._since, self._count
        self._since, self._count = now, 0.0
        return count / seconds if seconds > 0 else 0.0
