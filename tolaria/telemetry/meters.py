"""Running means kept on the device, so that the training loop never waits to add to them."""

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
    """Sums and counts by name in one float64 tensor on ``device``.

    `add` only enqueues device work. `read` is the one place where the host waits for the device; call it at the
    logging interval or the boundary. To average over ranks, sum `packed` over them and pass the result to `unpack`:
    every value then weighs the same on any number of ranks, also when their shares are uneven.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"meter names {list(names)}: expected one or more different names")
        self.names = tuple(names)
        self._sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
        self._rows = dict(zip(self.names, self._sums.unbind(), strict=True))

    def add(self, name: str, values: Tensor) -> None:
        """Add every element of a tensor of any shape and dtype on the meters' device. Does not wait."""
        row = self._rows[name]
        row[0] += values.detach().sum(dtype=torch.float64)
        row[1] += values.numel()

    def add_total(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum over ``count`` values that was formed elsewhere (0-D tensors or numbers). Does not wait."""
        row = self._rows[name]
        row[0] += total.detach() if isinstance(total, Tensor) else total
        row[1] += count

    def packed(self) -> Tensor:
        """Totals and counts as one float64 CPU tensor of shape (2 * number of names,). Waits for the device."""
        return self._sums.flatten().cpu().clone()

    def unpack(self, packed: Tensor) -> dict[str, Mean]:
        """The means by name in a tensor that `packed` made, here or summed over ranks. Local."""
        rows = packed.view(-1, 2).tolist()
        return {name: Mean(total, count) for name, (total, count) in zip(self.names, rows, strict=True)}

    def read(self) -> dict[str, Mean]:
        """This rank's means by name. Waits for the device."""
        return self.unpack(self.packed())

    def reset(self) -> None:
        """Back to no values. Does not wait."""
        self._sums.zero_()

    def state_dict(self) -> dict[str, list[float]]:
        """JSON-able [total, count] by name, so that a run resumed inside an epoch reports the whole epoch."""
        return {name: [mean.total, mean.count] for name, mean in self.read().items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over what `state_dict` returned. Raises ValueError when the names differ."""
        if set(state) != set(self.names):
            raise ValueError(f"meters {sorted(state)} in the state, {sorted(self.names)} here")
        rows = [[float(v) for v in state[name]] for name in self.names]
        self._sums.copy_(torch.tensor(rows, dtype=torch.float64))


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
