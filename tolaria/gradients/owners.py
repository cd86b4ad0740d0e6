"""Whose the samples of a step are: the host's or a seed's.

    attribution = "data"      as the data says, by the third entry of its items; the rest is the host's
    attribution = "kasmina"   dealt to the seeds in turn, by the sample's position in the step

Owners are rows: 0 is the host, 1 + i the i-th slot by name. A slot without a seed owns nothing; what the data says is
its own is the host's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tolaria.config_aggregate import AggregateConfig
from tolaria.data import EpochSampler
from tolaria.kasmina.seed import Seed
from tolaria.objective import Batch

HOST_ROW = 0


class Owners:
    """The owners of samples on this rank. Local; the same for a sample on any number of ranks."""

    def __init__(
        self, seeds: Mapping[str, Seed], sampler: EpochSampler, config: AggregateConfig, device: torch.device
    ) -> None:
        self.seeds = seeds
        self.sampler = sampler
        self.dealt = config.attribution == "kasmina"
        self.device = device
        self.rows: tuple[int, ...] = ()
        """Who may own samples now, in order."""
        self._active: tuple[int, ...] | None = None
        self._row_of_id: list[int] = []
        self._table = torch.empty(0, dtype=torch.int64)
        self._deals: dict[int, tuple[Tensor, tuple[int, ...]]] = {}

    def plan(self) -> bool:
        """Take note of which slots hold a seed. True if that changed who may own samples."""
        active = tuple(row for row, seed in enumerate(self.seeds.values(), 1) if seed.occupied)
        if active == self._active:
            return False
        self._active = active
        self.rows = (active or (HOST_ROW,)) if self.dealt else (HOST_ROW, *active)
        self._row_of_id = [row if row in active else HOST_ROW for row in range(len(self.seeds) + 1)]
        self._table = torch.tensor(self._row_of_id, device=self.device)
        self._deals = {}
        return True

    def of(self, batch: Batch, position: int) -> tuple[Tensor, tuple[int, ...]]:
        """The row of each sample, (batch,), int64, on the device; and the rows that occur, without asking the device.

        ``position``: of the microbatch in the step, from 0.
        """
        if self.dealt:
            if position not in self._deals:
                self._deals[position] = self._deal(position, batch.weights.shape[0])
            return self._deals[position]
        if batch.seed_ids is None:
            return torch.zeros(batch.weights.shape[0], dtype=torch.int64, device=self.device), (HOST_ROW,)
        return self._table[batch.seed_ids + 1], tuple(sorted({self._row_of_id[i + 1] for i in batch.seeds_present}))

    def _deal(self, position: int, size: int) -> tuple[Tensor, tuple[int, ...]]:
        first = (position * self.sampler.world_size + self.sampler.rank) * size
        rows = [self.rows[sample % len(self.rows)] for sample in range(first, first + size)]
        return torch.tensor(rows, device=self.device), tuple(sorted(set(rows)))

    def weights(self) -> list[float]:
        """Weight in the host's gradient of each of `rows`."""
        seeds = list(self.seeds.values())
        return [seeds[row - 1].gradient_weight if row != HOST_ROW else 1.0 for row in self.rows]
