"""Where the wall time of a run goes: a clock that is in exactly one category at any moment.

compute      forward, backward, clipping, the update, and the loop's own work between two steps
data wait    blocked for the next batch
sync wait    waiting for other ranks in a step: see below
compile      tracing and compiling, when a structure is new and whenever the compiler starts by itself
validation   passes over the validation data, and measuring what growth promises
boundary     the rest of a boundary: report, policy, decision, applying it
checkpoint   the training thread blocked by a snapshot or a checkpoint; writing goes on beside training
rollback     going back to an earlier state
replayed     everything at steps that had been reached before: after a return, or after a restart
restart      from the last sign of life of the start before to the first step of this one
paused       standing still because somebody asked for it
rehearsal    everything while something is tried out, and coming back from it
start-up     from the beginning of the process to the first step

Categories nest: what is inside another one is its own, and the outer one goes on behind it. Every switch reads the
clock once and books the time up to it, so the sum is the wall time, whatever happens.

On the CPU, sync wait is the time from the moment at which this rank's own backward pass is over to the reduced
gradients, the broadcast of buffers before a forward pass, and the fence. What the reduction costs while the backward
pass goes on is compute. On CUDA the host runs ahead and waits once, for the loss and the norm, which need the device's
own work and everybody's gradients: that wait is compute, and only broadcast and fence are sync wait. Who holds the
others up on a GPU, tell the ranks' own times (`tolaria/telemetry/pace.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from types import TracebackType
from typing import Literal, TypeAlias, get_args

from tolaria.phases import Phase, Phases, unseen

Category: TypeAlias = Literal[
    "compute", "data wait", "sync wait", "compile", "validation", "boundary", "checkpoint", "rollback", "replayed",
    "restart", "paused", "rehearsal", "start-up",
]  # fmt: skip
CATEGORIES: tuple[Category, ...] = get_args(Category)

OF_PHASE: Mapping[Phase, Category] = {
    "data": "data wait", "sync": "sync wait", "fence": "sync wait", "boundary": "boundary", "compile": "compile",
    "validation": "validation", "checkpoint": "checkpoint", "rollback": "rollback", "paused": "paused",
    "rehearsal": "rehearsal",
}  # fmt: skip
"""The other phases are compute."""

STEP_CATEGORIES: tuple[Category, ...] = ("compute", "data wait", "sync wait")
"""What steps are made of."""

AGAIN: tuple[Category, ...] = ("compute", "data wait", "sync wait", "compile", "validation", "boundary", "checkpoint")
"""What is replayed while steps are done again; a pause, a rehearsal and a further return stay what they are."""

_NOTHING = nullcontext()


class Ledger:
    """The clock of one rank. Local; belongs to the training thread, other threads may call `seconds` and `activity`.

    ``began``: when the time begins, on ``clock``. ``former``: the seconds of earlier starts by category; ``furthest``:
    the furthest step that they reached; ``gap_s``: how long nothing was running before ``began``. A run that has been
    under way before is in "restart" until its first step, a new one in "start-up".
    """

    def __init__(
        self,
        *,
        began: float | None = None,
        former: Mapping[str, float] | None = None,
        furthest: int = 0,
        gap_s: float = 0.0,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._clock = clock
        self._since = self.began = clock() if began is None else began
        self._former = {category: (former or {}).get(category, 0.0) for category in CATEGORIES}
        self._former["restart"] += gap_s
        self._restarted = former is not None
        self.furthest = furthest
        self._opening, self._again, self._done, self._tried = (dict.fromkeys(CATEGORIES, 0.0) for _ in range(4))
        self._book = self._opening
        self.category: Category = "start-up"
        self._held: Category | None = None
        self._stack: list[Category] = []
        inside = {category: _Inside(self, category) for category in CATEGORIES}
        contexts: dict[Phase, AbstractContextManager[None]] = {
            phase: inside[OF_PHASE[phase]] if phase in OF_PHASE else _NOTHING for phase in get_args(Phase)
        }
        contexts["rehearsal"] = _Trial(self)
        # The bare method of a dict: a step asks nine times, and most of its phases are compute.
        self.phases: Phases = contexts.__getitem__

    def beside(self, other: Phases) -> Phases:
        """Phases that the clock sees and somebody else (the profiler) too."""
        if other is unseen:
            return self.phases
        return lambda phase: _Both(self.phases(phase), other(phase))

    def inside(self, category: Category) -> AbstractContextManager[None]:
        """The time in this context is of ``category``."""
        return _Inside(self, category)

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Inside, all time is of the category that is open now, whatever is entered."""
        self._held = self.category
        try:
            yield
        finally:
            self._held = None

    def begin(self, step: int) -> None:
        """The loop begins after so many steps: what came before was start-up or restart."""
        self._switch("compute")
        self.at(step)

    def at(self, step: int) -> None:
        """So many steps are done. Called after each, and after a return. Some 0.1 microseconds."""
        if step >= self.furthest:
            self.furthest = step
            if self._book is not self._done:
                self._rebook(self._done)
        elif self._book is not self._again:
            self._rebook(self._again)

    def since(self, moment: float, category: Category) -> None:
        """The time from ``moment`` (on the ledger's clock) to now was of ``category``, not of the one that is open."""
        now = self._clock()
        moment = min(max(moment, self._since), now)
        self._book[self.category] += moment - self._since
        self._book[self._held or category] += now - moment
        self._since = now

    def now(self) -> float:
        """This moment on the ledger's clock."""
        return self._clock()

    # Reading

    @property
    def activity(self) -> Category:
        """What the rank is doing: the category that time goes into now."""
        category = self.category
        if self._book is self._opening and self._restarted:
            return "restart"
        if self._book is self._tried:
            return "rehearsal"
        return "replayed" if self._book is self._again and category in AGAIN else category

    def own(self, category: Category) -> float:
        """Seconds of this start in a category that it is not in now, replayed steps included. Cheap."""
        return self._opening[category] + self._done[category] + self._again[category]

    def seconds(self) -> dict[str, float]:
        """Seconds by category over all starts of the run; their sum is the run's wall time."""
        # Another thread may be asked in the middle of a switch: then the time up to it is counted a moment later.
        book, category, since = self._book, self.category, self._since
        running = max(0.0, self._clock() - since)
        opening, again, done, tried = (
            {**part, category: part[category] + (running if part is book else 0.0)}
            for part in (self._opening, self._again, self._done, self._tried)
        )
        found: dict[str, float] = {c: self._former[c] + done[c] + (0.0 if c in AGAIN else again[c]) for c in CATEGORIES}
        found["replayed"] += sum(again[c] for c in AGAIN)
        found["rehearsal"] += sum(tried.values())
        if self._restarted:
            found["restart"] += sum(opening.values())
        else:
            for c in CATEGORIES:
                found[c] += opening[c]
        return found

    def _switch(self, category: Category) -> None:
        now = self._clock()
        self._book[self.category] += now - self._since
        self.category = category
        self._since = now

    def _rebook(self, book: dict[Category, float]) -> None:
        self._switch(self.category)
        self._book = book


class _Inside:
    """One category as a context. Enters and leaves as often as it likes, also inside itself."""

    def __init__(self, ledger: Ledger, category: Category) -> None:
        self._ledger = ledger
        self._category = category

    def __enter__(self) -> None:
        ledger = self._ledger
        now = ledger._clock()
        former = ledger.category
        ledger._book[former] += now - ledger._since
        ledger._stack.append(former)
        ledger.category = ledger._held or self._category
        ledger._since = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ledger = self._ledger
        now = ledger._clock()
        ledger._book[ledger.category] += now - ledger._since
        ledger.category = ledger._stack.pop()
        ledger._since = now


class _Trial:
    """Everything inside is of a rehearsal, whatever the phase; not to be entered inside itself."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._former = ledger._book

    def __enter__(self) -> None:
        self._former = self._ledger._book
        self._ledger._rebook(self._ledger._tried)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ledger._rebook(self._former)


class _Both:
    """Two contexts as one."""

    def __init__(self, outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> None:
        self._outer = outer
        self._inner = inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
        self._outer.__exit__(kind, error, trace)
