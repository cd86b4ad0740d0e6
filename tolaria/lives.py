"""The ledger of seeds: one entry for every seed that ever lived, with what it cost and what it gained.

    at each boundary, after its commands   opened      a seed was germinated
                                           brought up  stage, alpha, contribution as measured, steps and their time
                                           closed      it was culled or cancelled; the entry stays

The entries of all ranks are equal but for times. A return to an earlier state takes back what was entered since.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tolaria.kasmina.candidates import flops_of
from tolaria.kasmina.growth import learns
from tolaria.kasmina.seed import Seed
from tolaria.leyline.types import SeedStage
from tolaria.measure import Report, Worth
from tolaria.state import TrainState
from tolaria.telemetry.summary import SeedRecord

# Forward passes' worth of a seed's own work in one training step: forward alone, with the gradient of its input (as
# much again), with that of its parameters.
_IDLE, _FROZEN, _LEARNING = 0, 2, 3
_AT_WORK = (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED)


class SeedLives:
    """Keeps the entries. Local; every rank keeps its own."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self._entries: dict[str, SeedRecord] = {}
        self._work: dict[str, int] = {}
        self._last_step = state.step

    def boundary(self, report: Report) -> list[SeedRecord]:
        """Enter one boundary, after its commands; the entries that were closed or became part of the host by it."""
        steps, self._last_step = self.state.step - self._last_step, self.state.step
        samples = steps * self.state.sampler.group_size
        finished: list[SeedRecord] = []
        for slot, seed in self.state.kasmina.seeds.items():
            for entry in [e for e in self._entries.values() if e.slot == slot and e.ended_step is None]:
                now = _measured(entry, report, self._work.get(entry.command_id, 0) * samples * (entry.flops or 0))
                now = self._ended(now, seed) if seed.command_id != entry.command_id else _present(now, seed)
                self._entries[entry.command_id] = now
                if now.ended_step is not None or (now.stage != entry.stage and now.stage == SeedStage.FOSSILIZED.name):
                    finished.append(now)
            if seed.occupied:
                if seed.command_id not in self._entries:
                    self._entries[seed.command_id] = self._opened(seed, report)
                self._work[seed.command_id] = self._passes(seed)
        return finished

    def records(self) -> list[SeedRecord]:
        """Every entry as it is now, by slot and age; a slot in which nothing ever grew has an empty one."""
        found: list[SeedRecord] = []
        for slot, seed in self.state.kasmina.seeds.items():
            mine = [e for e in self._entries.values() if e.slot == slot]
            found += [
                _present(e, seed) if e.ended_step is None and e.command_id == seed.command_id else e for e in mine
            ]
            if not mine:
                found.append(SeedRecord(slot=slot, blueprint="", stage=seed.stage.name, parameters=0, alpha=0.0))
        return found

    def _opened(self, seed: Seed, report: Report) -> SeedRecord:
        entry = SeedRecord(
            slot=seed.slot, blueprint=seed.blueprint, stage="", parameters=seed.parameter_count, alpha=0.0,
            command_id=seed.command_id, born_step=self.state.step,
            flops=flops_of(seed.blueprint, seed.shape),
            forward_ms=[], step_ms_before=report.step_ms or None,
        )  # fmt: skip
        return _present(entry, seed)

    def _ended(self, entry: SeedRecord, seed: Seed) -> SeedRecord:
        # A cancelled seed's slot has no embargo.
        stage = "CANCELLED" if seed.stage == SeedStage.RESETTING else SeedStage.CULLED.name
        return replace(entry, stage=stage, ended_in=entry.stage, ended_step=self.state.step, alpha=0.0)

    def _passes(self, seed: Seed) -> int:
        if seed.stage not in _AT_WORK:
            return _IDLE
        return _LEARNING if learns(seed, self.state.kasmina.config) else _FROZEN

    def state_dict(self) -> dict[str, Any]:
        """All entries, as JSON."""
        entries = [asdict(entry) for entry in self._entries.values()]
        return {"entries": entries, "work": dict(self._work), "last_step": self._last_step}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, and nothing else."""
        entries: Sequence[Mapping[str, Any]] = saved["entries"]
        self._entries = {str(entry["command_id"]): SeedRecord(**entry) for entry in entries}
        self._work = {str(name): int(passes) for name, passes in saved["work"].items()}
        self._last_step = int(saved["last_step"])


def _present(entry: SeedRecord, seed: Seed) -> SeedRecord:
    return replace(entry, stage=seed.stage.name, alpha=seed.alpha_value)


def _measured(entry: SeedRecord, report: Report, flops: int) -> SeedRecord:
    """The entry with what the interval before a boundary cost and its validation measured."""
    worth = report.worth.get(entry.slot, Worth(math.nan, math.nan))
    known = math.isfinite(worth.contribution)
    times = [pair for pair in (entry.forward_ms, worth.forward_ms) if pair]
    worked = entry.stage in {stage.name for stage in _AT_WORK} and report.step_ms > 0
    return replace(
        entry,
        contribution=worth.contribution if known else entry.contribution,
        contribution_noise=(worth.noise if math.isfinite(worth.noise) else None) if known else entry.contribution_noise,
        forward_ms=[min(both) for both in zip(*times, strict=True)],
        train_flops=entry.train_flops + flops,
        step_ms=report.step_ms if worked else entry.step_ms,
    )
