"""What a run says of itself while it goes: steps on the terminal and in metrics.jsonl, and its state on the board.

Rank 0 says it; elsewhere there is nobody to say it to, and only the clock runs. What costs more than a step may bear is
said when the board asks for it, about once a second.
"""

import math
from collections import deque
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import psutil
import torch

from tolaria.alarm import Alarm
from tolaria.config import Config
from tolaria.config_tamiyo import POLICY_NONE
from tolaria.coordinator.coordinator import Coordinator
from tolaria.dist import World
from tolaria.measure import Report
from tolaria.record import RunRecord
from tolaria.recovery.journal import Journal
from tolaria.setup import planned_steps
from tolaria.state import HOST_GROUP, TrainState
from tolaria.step import StepResult
from tolaria.steplog import StepLog
from tolaria.telemetry.board import Board, Clock
from tolaria.telemetry.meters import Rate
from tolaria.telemetry.progress import Progress, StepInfo
from tolaria.telemetry.report import balance_line, share_line
from tolaria.telemetry.summary import Score

WINDOW = 30
"""Files on the board over which the speed of steps is taken."""


class RunStatus:
    """One per rank, called by the loop. Local; nothing here waits."""

    def __init__(
        self,
        config: Config,
        world: World,
        state: TrainState,
        clock: Clock,
        *,
        coordinator: Coordinator,
        journal: Journal,
        alarm: Alarm,
        record: RunRecord,
        steplog: StepLog | None,
        progress: Progress,
    ) -> None:
        self.config = config
        self.world = world
        self.state = state
        self.ledger, self.board = clock
        self.coordinator = coordinator
        self.journal = journal
        self.alarm = alarm
        self.record = record
        self.steplog = steplog
        self.progress = progress
        self._samples = Rate()
        self._step = state.step
        self._loss: float | None = None
        self._over = False
        self._planned = planned_steps(config.train, state.sampler)
        self._process = psutil.Process()
        self._speed: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._began = (state.step, perf_counter())
        self._goodput: dict[str, float] = {}

    # Called by the loop

    def begin(self) -> None:
        """The first step is about to be taken."""
        self.ledger.begin(self.state.step)
        self._goodput = self.ledger.seconds()
        self._began = (self.state.step, perf_counter())
        if self.board is not None:
            self._say(self.board)
            self.board.tell(state="running")
            self.board.look = self._look
            self.board.show()

    def stepped(self, result: StepResult, seconds: float) -> None:
        """A step is over, its data included, after ``seconds``."""
        state = self.state
        self.ledger.at(state.step)
        self._step = state.step
        if result.verdict is not None and result.verdict.losses:
            self._loss = result.verdict.losses[-1]
        self._samples.add(state.sampler.group_size)
        if self.board is not None and self.board.wanted:
            self._say(self.board)
        if self.steplog is not None:
            self.steplog.stepped(result.loss, seconds)
        if self.progress.step_due():
            self._show_step(result)

    def boundary(self, report: Report) -> None:
        """A boundary is over."""
        if self.progress.detail == "verbose":
            before, self._goodput = self._goodput, self.ledger.seconds()
            balance = balance_line(report.own_ms, report.data_ms, report.wait_ms)
            self.progress.details([("time", share_line(self._goodput, before)), ("ranks", balance)])
        if self.board is None:
            return
        final, best = self.record.final, self.record.best
        rows = zip(report.own_ms, report.wait_ms, report.data_ms, strict=True)
        self.board.tell(
            ranks=[{"rank": rank, "own_ms": round(own, 3), "wait_ms": round(wait, 3), "data_ms": round(data, 3)}
                   for rank, (own, wait, data) in enumerate(rows)],
            validation={**_score(final), "noise": _known(report.val_noise)}, best=_score(best),
        )  # fmt: skip
        self._say(self.board)
        self.board.show()

    def went_back(self) -> None:
        """The run is at an earlier step."""
        self.ledger.at(self.state.step)
        self._step = self.state.step
        if self.board is not None:
            self._say(self.board)
            self.board.show()

    def ended(self, state: str, reason: str = "") -> None:
        """The run is over: ``state`` as of `Board.end`."""
        self._over = True
        if self.board is not None:
            self._say(self.board)
            self.board.end(state, reason)

    # What the board says

    def _say(self, board: Board) -> None:
        """All that belongs to the training thread: some tens of microseconds."""
        state, sampler, breaker = self.state, self.state.sampler, self.coordinator.breaker
        level = self.alarm.page.level()
        board.wanted = False
        board.tell(
            epoch=min(sampler.epoch + 1, self.config.train.epochs), epochs=self.config.train.epochs,
            steps_per_epoch=sampler.steps_per_epoch, max_steps=self._planned, boundary=state.boundary,
            lr={group: state.lr.lr_at(group, state.step) for group in state.lr.groups},
            seeds=[self._seed(slot) for slot in state.kasmina.seeds],
            policy={"source": self._source, "breaker": breaker.state.name, "reason": breaker.last_code},
            emergency={"level": level, "reason": self.alarm.page.reason() if level else ""},
            checkpoints=[{"name": f"c{rung.seq}", "step": rung.step, "good": rung.good}
                         for rung in self.journal.ladder.rungs.values()],
            counters={**self.record.counters, "skipped_steps": state.skipped_steps},
        )  # fmt: skip

    def _look(self) -> Mapping[str, object]:
        """What changes with every step, and what the machine says. Called by the board's thread: reads numbers, and
        objects that are replaced as a whole."""
        ledger, step, now = self.ledger, self._step, perf_counter()
        done, since = self._began
        in_steps = sum(ledger.own(category) for category in ("compute", "data wait", "sync wait"))
        if self._speed and self._speed[-1][0] > step:
            self._speed.clear()
        self._speed.append((step, in_steps))
        first, earlier = self._speed[0]
        each_s = (in_steps - earlier) / (step - first) if step > first else None
        under_way = now - since - ledger.own("paused")
        left = 0 if self._over else self._planned - step
        eta_s = left * under_way / (step - done) if step > done else None
        memory = {"rss_mb": round(self._process.memory_info().rss / 2**20, 1), "device_mb": self._device_mb()}
        mode = {"conservative": self.state.mode.conservative, "reason": self.state.mode.reason,
                "paused": self.state.hand.paused}  # fmt: skip
        return {
            "step": step, "mode": mode, "train_loss": self._loss, "eta_s": None if eta_s is None else round(eta_s, 1),
            "step_ms": round(each_s * 1e3, 3) if each_s else None,
            "samples_per_s": round(self.state.sampler.group_size / each_s, 1) if each_s else None, "memory": memory,
        }  # fmt: skip

    @property
    def _source(self) -> str:
        if self.config.tamiyo.endpoint:
            return "endpoint"
        return "none" if self.config.tamiyo.policy == POLICY_NONE else "embedded"

    def _seed(self, slot: str) -> dict[str, Any]:
        seed = self.state.kasmina.seeds[slot]
        return {
            "slot": slot, "stage": seed.stage.name, "blueprint": seed.blueprint, "alpha": seed.alpha_value,
            "parameters": seed.parameter_count, "contribution": _known(seed.evidence.contribution),
            "contribution_noise": _known(seed.evidence.contribution_noise),
        }  # fmt: skip

    def _device_mb(self) -> float:
        if self.world.device.type != "cuda":
            return 0.0
        return round(torch.cuda.memory_allocated(self.world.device) / 2**20, 1)

    def _show_step(self, result: StepResult) -> None:
        state, sampler = self.state, self.state.sampler
        self.progress.step(
            StepInfo(
                epoch=sampler.epoch + 1, epochs=self.config.train.epochs,
                epoch_step=sampler.cursor // sampler.group_size, epoch_steps=sampler.steps_per_epoch,
                loss=result.loss, lr=state.lr.lr_at(HOST_GROUP, state.step), rate=self._samples.read(),
            )
        )  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _score(score: Score | None) -> dict[str, Any]:
    if score is None:
        return {}
    return {"step": score.step, "loss": score.loss, "accuracy": score.accuracy}
