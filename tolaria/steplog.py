"""The numbers of steps for metrics.jsonl and the sinks, every so many steps. Rank 0."""

from tolaria.state import HOST_GROUP, TrainState
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.metrics import MetricsLog


class StepLog:
    """Counts the steps between two lines and writes the lines, at the steps that ``interval_steps`` divides."""

    def __init__(self, state: TrainState, events: EventLog, metrics: MetricsLog, *, interval_steps: int) -> None:
        self._state = state
        self._events = events
        self._metrics = metrics
        self._interval = interval_steps
        self._seconds = 0.0
        self._steps = 0
        self._samples = 0

    def stepped(self, loss: float, seconds: float) -> None:
        """A step is over, its data included, after ``seconds``. ``loss``: this rank's part of it; the mean over ranks
        is in the boundary's event. Local; less than a microsecond, and some tens where a line is due."""
        state = self._state
        self._seconds += seconds
        self._steps += 1
        self._samples += state.sampler.group_size
        if state.step % self._interval:
            return
        lr, last = state.lr, state.step - 1
        self._metrics.write(
            state.step,
            self._events.branch,
            epoch=state.sampler.epoch,
            loss_rank0=loss,
            step_s=self._seconds / self._steps,
            samples_per_s=self._samples / self._seconds,
            lr=lr.lr_at(HOST_GROUP, last),
            **{f"lr/{group}": lr.lr_at(group, last) for group in lr.groups if group != HOST_GROUP},
            **{f"alpha/{n}": x.alpha_value for n, x in state.kasmina.seeds.items() if x.occupied},
        )
        self._seconds, self._steps, self._samples = 0.0, 0, 0
