"""Everything the training loop works with, built in `tolaria/build.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tolaria.alarm import Alarm
from tolaria.comeback import Comeback
from tolaria.config import Config
from tolaria.coordinator.coordinator import Coordinator
from tolaria.data import Loader
from tolaria.dist import World
from tolaria.guard import Guard
from tolaria.measure import Evaluator
from tolaria.orders.desk import OrderDesk
from tolaria.process import StopFlag
from tolaria.profiling import Unprofiled
from tolaria.record import RunRecord
from tolaria.saving import Saver
from tolaria.state import TrainState
from tolaria.status import RunStatus
from tolaria.step import TrainStep
from tolaria.task import Task
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One of each, on this rank. ``desk``: where orders come in, on rank 0 only."""

    config: Config
    world: World
    task: Task
    state: TrainState
    loader: Loader
    step: TrainStep
    evaluator: Evaluator
    coordinator: Coordinator
    guard: Guard
    comeback: Comeback
    saver: Saver
    alarm: Alarm
    record: RunRecord
    status: RunStatus
    events: EventLog
    progress: Progress
    profiler: Unprofiled
    stop: StopFlag
    desk: OrderDesk | None
    facts: Mapping[str, Any]
