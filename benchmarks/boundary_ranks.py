"""What rank 0 works at a boundary when there are many ranks, for `boundary.py`. Simulated: the others are not there.

All that rank 0's own code does with what comes from N ranks is done for real, with the parts of a run: the report's sum
(one entry for each rank), the comparison of the ranks and the vote (one row each), stragglers, the lines of telemetry.
What is simulated is the network: a collective returns at once, with N ranks' worth of data.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.boundary_run import make_config, make_task
from tolaria.build import Config
from tolaria.coordinator.coordinator import Coordinator
from tolaria.coordinator.packet import RunFacts
from tolaria.data import Loader
from tolaria.dist import Gathering, Peers, World
from tolaria.frames import FRAME_CAPACITY_BYTES, make_frame, read_frame
from tolaria.hardware import Hardware
from tolaria.measure import TRAIN_METERS, Evaluator, Report
from tolaria.record import RunRecord
from tolaria.recovery.journal import Journal
from tolaria.recovery.sentinel import Sentinel
from tolaria.recovery.timeline import Timeline
from tolaria.replica import Replica
from tolaria.setup import build_state
from tolaria.state import TrainState
from tolaria.task import load_task
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.meters import Meters
from tolaria.telemetry.pace import StepTimes
from tolaria.telemetry.progress import Progress
from tolaria.telemetry.split import Split

OWN_MS = 7.0
WARM_UP = 5


class Crowd(Peers):
    """Ranks that answer at once, and all alike."""

    def __init__(self, world_size: int) -> None:
        super().__init__(None, 0, world_size)

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        """The report's sum: every rank has its own time in the tail."""
        if tensor.is_floating_point():
            tensor[-self.world_size :] = OWN_MS
        return tensor

    def send_frame(self, payload: bytes | None, capacity: int = FRAME_CAPACITY_BYTES) -> bytes | None:
        """Packed and read, as rank 0 does it."""
        return read_frame(make_frame(payload, capacity))

    def _start_gather(self, mine: torch.Tensor) -> Gathering:
        rows = torch.empty(self.world_size, len(mine), dtype=mine.dtype)
        for row in rows.unbind():
            row.copy_(mine)
        return Gathering(rows, None)


class Boundaries:
    """Rank 0 of a run among many ranks, at its boundaries."""

    def __init__(self, config: Config, world: World, state: TrainState, evaluator: Evaluator, events: EventLog) -> None:
        self.state, self.evaluator = state, evaluator
        self.sentinel = Sentinel(state, world.peers, slice_bytes=config.recovery.drift_mb * 2**20)
        self.record = RunRecord(state, events, Progress("off"), straggler_ratio=config.log.straggler_ratio)
        self.facts = RunFacts(
            run_id="simulated", experiment="boundary", hardware=Hardware(world.device).now, boundaries_left=lambda: 1
        )
        self.coordinator = Coordinator(
            state, evaluator.replica, world, config.tamiyo, events, facts=self.facts, client=None, revive=None,
            journal=Journal(Timeline(), wal=None, good_after=1), rest_boundaries=1, sample=self._no_sample,
        )  # fmt: skip
        self._meters = Meters(TRAIN_METERS)

    def take(self) -> float:
        """One boundary as `tolaria/loop.py` goes through it; its milliseconds without what is outside the budget."""
        split = Split()
        self.state.boundary += 1
        look = self.sentinel.look(self.state.boundary)
        split.lap("guard")
        report = self.report()
        split.lap("report")
        if self.sentinel.judge(look) is not None:
            raise RuntimeError("ranks that are all alike were found to differ")
        split.lap("guard")
        applied = self.coordinator.exchange(report)
        self.record.boundary(report, applied, split)
        return self.record.latencies[-1]["boundary"]

    def report(self) -> Report:
        """What all ranks have measured."""
        self._meters.add("loss", 1.0)
        return self.evaluator.measure(self._meters, StepTimes(own_ms=OWN_MS, whole_ms=2 * OWN_MS))

    @staticmethod
    def _no_sample(_: int) -> None:
        raise RuntimeError("nothing changes that would have to be tried")


@contextmanager
def among(ranks: int) -> Iterator[Boundaries]:
    """Rank 0 of so many."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(folder, 1000, "noop")
        # It acts alone where the simulated ranks would have to compute.
        alone = World(
            global_rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), generation="0" * 16,
            peers=Peers(None, 0, 1), background=Peers(None, 0, 1), data_group=None,
        )  # fmt: skip
        world = replace(alone, world_size=ranks, peers=Crowd(ranks))
        task = load_task(make_task, {}, config.run.seed)
        loader = Loader(task, config.data, world.device, emit=lambda *_, **__: None)
        state, _ = build_state(config, task, alone, loader)
        events = EventLog(folder / "events.jsonl", 0, run_id="simulated")
        replica = Replica(state, alone, config, events)
        replica.rebuild(first=True)
        try:
            yield Boundaries(config, world, state, Evaluator(task, state, replica, loader, world, 2), events)
        finally:
            replica.close()
            events.close()


def work(ranks: Sequence[int], boundaries: int) -> dict[int, float]:
    """Rank 0's milliseconds of work at a boundary by number of ranks, medians."""
    found = {}
    for count in ranks:
        with among(count) as simulated:
            found[count] = median([simulated.take() for _ in range(WARM_UP + boundaries)][WARM_UP:])
    return found


def fitted(found: dict[int, float]) -> tuple[float, float]:
    """The line through the points: milliseconds at no rank, microseconds for each."""
    slope, base = np.polyfit(list(found), list(found.values()), 1)
    return float(base), float(slope) * 1e3
