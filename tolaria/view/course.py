"""What a run's events say of its course, taken in one at a time, so that a view of a live run only reads on.

A return to an earlier state, or a start from one, takes the measurements behind it off the course; what happened stays.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from tolaria.view.tail import Tail
from tolaria.view.values import items, mapping, numbers, real, text, whole

Event: TypeAlias = Mapping[str, Any]

MAX_REMEMBERED = 4000
"""Events that are kept whole; the oldest go first. What is counted and measured is never forgotten."""

MAX_UNANSWERED = 1000

ROUTINE = frozenset({"boundary", "decision", "checkpoint_good", "signal_failed", "seed_gradient_not_finite"})
"""Kinds that come too often to be kept whole; the last of each is."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """One boundary as rank 0 told it; losses are means per sample, accuracy in [0, 1], ``own_ms`` by rank."""

    step: int
    boundary: int
    epoch: int
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    val_noise: float | None
    mode: str
    wall_ns: int
    latency_ms: Mapping[str, float]
    seeds: Mapping[str, str]
    own_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One command of the policy or of a person. ``outcome``: applied, refused, undone, or how it was judged later.

    ``why``: the one who asked says; ``reason``: of a refusal. ``who`` is empty for the policy.
    """

    command_id: str
    step: int
    what: str
    outcome: str
    code: str = ""
    reason: str = ""
    effect: str = ""
    who: str = ""
    why: str = ""


@dataclass(kw_only=True)
class Checkpoint:
    """One committed checkpoint; ``good`` after enough healthy boundaries."""

    name: str
    step: int
    good: bool = False


@dataclass(kw_only=True)
class Course:
    """All that the events have told so far. ``starts``: the run_started events of rank 0; ``paused``: the event since
    which the run stands still because somebody wants it so, None while nobody does."""

    boundaries: list[Boundary] = field(default_factory=list)
    commands: dict[str, Asked] = field(default_factory=dict)
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    seeds: dict[str, Event] = field(default_factory=dict)
    starts: list[Event] = field(default_factory=list)
    remembered: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_REMEMBERED))
    last: dict[str, Event] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    since_start: Counter[str] = field(default_factory=Counter)
    paused: Event | None = None
    unanswered: list[Event] = field(default_factory=list)
    step: int = 0

    def take(self, event: Event) -> None:
        """One more event, of any rank."""
        kind, rank = text(event.get("kind")), whole(event.get("rank"))
        if kind not in ROUTINE:
            self.remembered.append(event)
        if rank == 0:
            self._first(kind, event)
        elif kind not in self.last or whole(self.last[kind].get("rank")) != 0:
            self.last[kind] = event
        self.counts[kind] += 1
        self.since_start[kind] += 1

    def of_kind(self, *kinds: str, rank: int | None = None, this_start: bool = False) -> list[Event]:
        """The remembered events of these kinds, oldest first; only a rank's, only since the last start where asked."""
        after = self.started_ns if this_start else 0
        return [
            event for event in self.remembered
            if event.get("kind") in kinds and (rank is None or event.get("rank") == rank)
            and whole(event.get("wall_ns")) >= after
        ]  # fmt: skip

    @property
    def started_ns(self) -> int:
        """When the last start began, by the wall clock; 0 before the first."""
        return whole(self.starts[-1].get("wall_ns")) if self.starts else 0

    @property
    def world_size(self) -> int | None:
        """How many ranks the last start has."""
        return whole(self.starts[-1].get("world_size")) if self.starts else None

    def _first(self, kind: str, event: Event) -> None:
        """An event of rank 0, who tells what all ranks do."""
        self.last[kind] = event
        # What a start tells before its first step carries no step of its own.
        self.step = whole(event.get("step")) or self.step
        if (meaning := _MEANINGS.get(kind)) is not None:
            meaning(self, event)

    def _started(self, event: Event) -> None:
        self.starts.append(event)
        self.since_start.clear()
        self.step = 0

    def _measured(self, event: Event) -> None:
        point = _boundary(event)
        # Gone through again, by a start from the beginning: the later one counts.
        while self.boundaries and self.boundaries[-1].step >= point.step:
            self.boundaries.pop()
        self.boundaries.append(point)

    def _resumed(self, event: Event) -> None:
        if "saved_step" in event:
            self._back_to(whole(event.get("saved_step")))
        else:
            self._stand("resume", event)

    def _committed(self, event: Event) -> None:
        name = text(event.get("path")).rsplit("/", 1)[-1]
        self.checkpoints[whole(event.get("seq"))] = Checkpoint(name=name, step=whole(event.get("saved_step")))

    def _decided(self, event: Event) -> None:
        if event.get("source") != "fallback":
            self.unanswered.clear()
        else:
            self.unanswered = [*self.unanswered[:MAX_UNANSWERED], event]

    def _good(self, event: Event) -> None:
        if (known := self.checkpoints.get(whole(event.get("seq")))) is not None:
            known.good = True

    def _stand(self, what: str, event: Event) -> None:
        if what == "pause":
            if self.paused is None or event.get("kind") != "paused":  # the order told who, too
                self.paused = event
        elif what in ("resume", "stop"):
            self.paused = None

    def _back_to(self, step: int) -> None:
        self.step = step
        if self.paused is not None and whole(self.paused.get("step")) > step:
            self.paused = None
        self.boundaries = [point for point in self.boundaries if point.step <= step]
        self.checkpoints = {seq: saved for seq, saved in self.checkpoints.items() if saved.step <= step}

    def _asked(self, event: Event) -> None:
        kind = text(event.get("kind"))
        by_person, applied = kind.startswith("act_"), kind.endswith("applied")
        name = text(event.get("command_id")) or text(event.get("order_id")) or text(event.get("request_id"))
        told = text(event.get("reason"))
        self.commands.pop(name, None)  # an order that comes again counts as the newest
        self.commands[name] = Asked(
            command_id=name, step=whole(event.get("step")) or self.step, what=text(event.get("what")),
            outcome="applied" if applied else "refused", code=text(event.get("code")),
            reason=told if by_person or not applied else "", who=text(event.get("who")) if by_person else "",
            why=text(event.get("why")) if by_person else told if applied else "",
        )  # fmt: skip
        if kind == "act_applied":
            self._stand(text(event.get("what")).partition(" ")[0], event)

    def _judged(self, event: Event) -> None:
        name = text(event.get("command_id"))
        if (known := self.commands.get(name)) is not None and known.outcome == "applied":
            outcome, effect = text(event.get("outcome")).lower(), text(event.get("effect"))
            self.commands[name] = replace(known, outcome=outcome or known.outcome, effect=effect)


_MEANINGS: Mapping[str, Callable[[Course, Event], None]] = {
    "boundary": Course._measured,
    "run_started": Course._started,
    "decision": Course._decided,
    "went_back": lambda course, event: course._back_to(whole(event.get("to_step"))),
    "resumed": Course._resumed,
    "paused": lambda course, event: course._stand("pause", event),
    "command_applied": Course._asked,
    "command_refused": Course._asked,
    "act_applied": Course._asked,
    "act_refused": Course._asked,
    "command_judged": Course._judged,
    "checkpoint_committed": Course._committed,
    "checkpoint_good": Course._good,
    "seed_judged": lambda course, event: course.seeds.update({text(event.get("slot")): event}),
}
"""What an event of rank 0 means for the course, by kind."""


SECONDARY = frozenset({"PeerLost"})
"""What ranks say when another one is the cause."""


def root_cause(failures: Sequence[Event]) -> Event | None:
    """The failure that the others follow from: the first that does not speak of another rank."""
    own = [event for event in failures if event.get("error") not in SECONDARY]
    return next(iter(own or failures), None)


class CourseReader:
    """A run's course, brought up to date by reading on in its events."""

    def __init__(self, tail: Tail) -> None:
        self.course = Course()
        self._tail = tail

    def read(self) -> Course:
        """The course up to now."""
        for event in self._tail.new():
            self.course.take(event)
        return self.course


def _boundary(event: Event) -> Boundary:
    return Boundary(
        step=whole(event.get("step")), boundary=whole(event.get("boundary")), epoch=whole(event.get("epoch")),
        train_loss=real(event.get("train_loss")), val_loss=real(event.get("val_loss")),
        val_accuracy=real(event.get("val_accuracy")), val_noise=real(event.get("val_noise")),
        mode=text(event.get("mode")), wall_ns=whole(event.get("wall_ns")),
        latency_ms=numbers(event.get("latency_ms")),
        seeds={slot: text(stage) for slot, stage in mapping(event.get("seeds")).items()},
        own_ms=tuple(real(ms) or 0.0 for ms in items(event.get("own_ms"))),
    )  # fmt: skip
