"""The control lane: what this rank says at the fence of a step, and whether the coming step has one.

Signals, emergencies and losses reach all ranks by it, see `tolaria/fence.py`.
"""

import signal
import time
from collections.abc import Callable
from statistics import median

from tolaria.alarm import Alarm
from tolaria.config import Config
from tolaria.data import Window
from tolaria.dist import World
from tolaria.fence import CollectiveFence, Fence, SharedFence, Verdict
from tolaria.guard import Guard
from tolaria.process import StopFlag
from tolaria.recovery.page import Page, Phase
from tolaria.state import TrainState

FENCES_TIMED = 9
POLL_S = 0.002
"""How often the policy's emergencies and the page are looked at; once takes as long as 2 % of the smallest steps."""


class ControlLane:
    """One per rank, used by the loop. Every rank calls every method at the same step."""

    def __init__(
        self, config: Config, state: TrainState, world: World, guard: Guard, alarm: Alarm, stop: StopFlag,
        asked: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.config = config
        self.state = state
        self.guard = guard
        self.alarm = alarm
        self.stop = stop
        self._asked = asked
        self._level = 0
        self._polled = 0.0
        self.fence = self._fence(world)

    def _fence(self, world: World) -> Fence:
        page = self.alarm.page
        if world.world_size == 1 or (isinstance(page, Page) and page.ranks == world.world_size):
            return SharedFence(page, world.world_size, timeout_s=self.config.dist.control_timeout_s)
        fence = CollectiveFence(world.peers, self.config.dist)
        fence.cost_s = self._cost_s(fence)
        return fence

    def open(self, window: Window) -> None:
        """Open a fence if the coming step, over the samples of ``window``, has one. Does not wait."""
        if self.fence.due(last=self._look_follows(window)):
            self.alarm.page.enter(Phase.STEP, self.state.step)
            self._tell(self.fence)

    def close(self) -> Verdict | None:
        """The verdict of all ranks before the step's update; None where the step has no fence. Raises PeerLost."""
        return self.fence.close()

    def stepped(self, seconds: float) -> None:
        """A step is over, after so many seconds of this rank."""
        self.fence.stepped(seconds)

    def restart(self) -> None:
        """Have a fence at the next step, with all that is known then: what lies between may have changed everything."""
        self.fence.restart()
        self._polled = 0.0

    def _cost_s(self, fence: Fence) -> float:
        """Seconds of this rank for one fence that is waited for. Collective."""
        times = []
        for _ in range(FENCES_TIMED):
            started = time.perf_counter()
            self._tell(fence)
            fence.close()
            times.append(time.perf_counter() - started)
        fence.restart()
        return median(times)

    def _tell(self, fence: Fence) -> None:
        now = time.monotonic()
        if now - self._polled >= POLL_S:
            self._polled = now
            self._level = self.alarm.level()
        fence.open(
            stop_signal=self._signal(), level=self._level, losses=self.guard.losses,
            lr_changed=self.state.lr.take_found() > 0, asked=self._asked(),
        )  # fmt: skip

    def _look_follows(self, window: Window) -> bool:
        """Whether a boundary, a snapshot or the end follows the coming step: they want all steps before it judged."""
        config, step = self.config, self.state.step + 1
        every, snapshots = config.train.boundary_steps, config.recovery.snapshot_steps
        return bool(
            window[2] >= self.state.sampler.num_samples
            or step == config.train.max_steps
            or (every and step % every == 0)
            or (snapshots and step % snapshots == 0)
        )

    def _signal(self) -> int:
        name = self.stop.signal_name
        if name is None and self.guard.journal.low_space:
            name = signal.SIGTERM.name  # the log lives on its reserve: save and stop while that is possible
        return int(signal.Signals[name]) if name is not None else 0
