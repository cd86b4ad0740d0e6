"""The profiler: some steps of a run in torch.profiler, with a range for every phase, and a page that sums them up.

    <run>/profile/rank0.json            trace of the chosen steps, for chrome://tracing or ui.perfetto.dev
    <run>/profile/rank0-boundary.json   of the first boundary after them, where none came in them
    <run>/profile/rank0-memory.pickle   allocations on CUDA in the chosen steps, for pytorch.org/memory_viz
    <run>/profile/rank0.txt             the rank's page
    <run>/profile/summary.txt           the pages of all traced ranks

It only watches: what a run computes is the same with it and without. When it fails, that is an event and the run goes
on without it.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from tolaria.config_profile import ProfileConfig
from tolaria.dist import World
from tolaria.phases import Phase, unseen
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.trace import PREFIX, STEP, page, times_of

FOLDER = "profile"
_MEMORY_ENTRIES = 200_000


class Unprofiled:
    """What a rank that is not traced has in place of a `Profiler`; does nothing."""

    phases = staticmethod(unseen)

    def step(self, step: int) -> None:
        """A step begins."""

    def close(self) -> None:
        """No further step begins."""


class Profiler(Unprofiled):
    """Traces this rank. Local; belongs to the training thread."""

    def __init__(
        self, config: ProfileConfig, events: EventLog, folder: Path, rank: int, device: torch.device,
        *, clock: Callable[[], float] = perf_counter,
    ) -> None:  # fmt: skip
        self.config = config
        self.events = events
        self.folder = folder
        self.rank = rank
        self._cuda = device.type == "cuda"
        self._clock = clock
        self._begun = 0
        self._began_at: float | None = None
        self._untraced: list[float] = []
        self._torch: profile | None = None
        self._traced: list[int] = []
        self._range: record_function | None = None
        self._pages: list[str] = []
        self._boundary_seen = self._over = False

    def phases(self, phase: Phase) -> AbstractContextManager[None]:
        """A range of this name in the trace; nothing where none is made."""
        if self._range is not None:
            self._boundary_seen = self._boundary_seen or phase == "boundary"
            return record_function(PREFIX + phase)
        if phase == "boundary" and self._over and not self._boundary_seen:
            self._boundary_seen = True
            return self._boundary()
        return unseen(phase)

    def step(self, step: int) -> None:
        """Step ``step`` begins, and with that the one before it ends. Writes the traces when it was the last one."""
        if self._over:
            return
        first, now = self.config.after_steps, self._clock()
        self._end_range()
        if self._torch is None and self._began_at is not None:
            self._untraced.append((now - self._began_at) * 1e3)
        self._begun += 1
        with self._failing_softly():
            if self._begun == first:
                self._torch = self._start()
            elif self._torch is not None:
                self._torch.step()
            if self._begun > first + self.config.steps:
                self._stop()
            elif self._begun > first:
                self._traced.append(step)
                self._range = record_function(f"{STEP}{step}")
                self._range.__enter__()
        self._began_at = self._clock()

    def close(self) -> None:
        """The run ends, or has ended: what was traced so far is written. Safe to call twice."""
        self._end_range()
        if not self._over:
            with self._failing_softly():
                self._stop()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _start(self) -> profile:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._cuda and self.config.memory:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_ENTRIES)
        # The step before the first traced one bears what the profiler needs to get going.
        started = self._profile(
            schedule=schedule(wait=0, warmup=1, active=self.config.steps, repeat=1), on_trace_ready=self._write_steps
        )
        started.start()
        return started

    def _profile(self, **settings: Any) -> profile:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        details = self.config.details
        return profile(activities=activities, record_shapes=details, with_stack=details, acc_events=True, **settings)

    def _stop(self) -> None:
        self._over, started, self._torch = True, self._torch, None
        if started is not None:
            started.stop()

    def _write_steps(self, traced: profile) -> None:
        if not self._traced:
            return
        steps = f"step {self._traced[0]}" + (f" to {self._traced[-1]}" if len(self._traced) > 1 else "")
        self._write(traced, f"rank{self.rank}.json", steps, "step", self._untraced)
        if self._cuda and self.config.memory:
            # The one format that the viewer takes; nothing here ever reads it.
            torch.cuda.memory._dump_snapshot(str(self.folder / f"rank{self.rank}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    @contextmanager
    def _boundary(self) -> Iterator[None]:
        traced = None
        with self._failing_softly():
            traced = self._profile()
            traced.start()
        try:
            with record_function(f"{PREFIX}boundary"):
                yield
        finally:
            with self._failing_softly():
                if traced is not None:
                    traced.stop()
                    self._write(traced, f"rank{self.rank}-boundary.json", "one boundary", "boundary")

    def _write(self, traced: profile, name: str, title: str, what: str, before_ms: Sequence[float] = ()) -> None:
        started, path = self._clock(), self.folder / name
        unfinished = path.with_name(f"{name}.tmp")
        try:
            traced.export_chrome_trace(str(unfinished))
            # The profiler says nothing of a disk that is full; a trace that cannot be read back is none.
            times = times_of(json.loads(unfinished.read_text(encoding="utf-8"))["traceEvents"])
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._pages.append(page(f"rank {self.rank}, {title}", times, before_ms, what=what))
        (self.folder / f"rank{self.rank}.txt").write_text("\n\n".join(self._pages))
        self.events.emit("profile_written", path=str(path), seconds=round(self._clock() - started, 3))

    @contextmanager
    def _failing_softly(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            self._over, self._torch = True, None
            self._boundary_seen = True
            self.events.emit("profile_failed", "warning", reason=f"{type(error).__name__}: {error}")


def make_profiler(config: ProfileConfig, events: EventLog, run: Path, world: World) -> Unprofiled:
    """The profiler of this rank, or nothing in the form of one. ``run``: the run's folder."""
    rank = world.global_rank
    if not config.traces(rank):
        return Unprofiled()
    # Its library writes two lines to stderr at each start, whatever went well.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return Profiler(config, events, run / FOLDER, rank, world.device)


def join_pages(run: Path) -> Path | None:
    """Write summary.txt from the pages of all ranks that are there; None without any, or where it cannot be written."""
    folder = run / FOLDER
    pages = sorted(folder.glob("rank*.txt"), key=lambda path: int(path.stem.removeprefix("rank")))
    if not pages:
        return None
    try:
        summary = folder / "summary.txt"
        summary.write_text("\n\n".join(path.read_text() for path in pages))
    except OSError:
        return None
    return summary
