"""What a run's files tell of its whole course: curves, seeds, commands, returns. Reads; never raises for a value that
another version wrote differently.

Everything is rank 0's word but what each rank says of itself; where the summary knows more, it counts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tolaria.view.curves import Curve, kept_pieces
from tolaria.view.files import RunFiles
from tolaria.view.values import mapping, numbers, real, rows, text, whole

HOST = "host"
MARKED = {
    "emergency": "emergency", "halted": "emergency", "gave_up": "incident", "paused": "paused",
    "checkpoint_failed": "trouble", "rank_stuck": "trouble", "policy_failed": "trouble", "lr_violation": "trouble",
    "loader_restarted": "trouble", "policy_restarted": "trouble", "mode_changed": "mode", "straggler": "trouble",
    "resumed": "start", "compile_fallback": "trouble", "return_failed": "incident", "run_failed": "incident",
}  # fmt: skip
"""Kinds of events that are shown on the time line, and as what."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """One boundary as rank 0 told it; ``own_ms`` by rank, a step's own work in milliseconds."""

    step: int
    boundary: int
    mode: str
    seeds: Mapping[str, str]
    latency_ms: Mapping[str, float]
    own_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A command and its fate. ``who``: the operator who gave it, empty for the policy. ``outcome``: applied, refused,
    undone, or how it was judged later; ``effect`` says it in numbers, of a refused one the reason."""

    command_id: str
    step: int
    what: str
    outcome: str
    why: str = ""
    effect: str = ""
    who: str = ""


@dataclass(frozen=True, kw_only=True)
class WentBack:
    """A return, or an incident that found nothing to go back to (``to_step`` None)."""

    step: int
    to_step: int | None
    cause: str
    reason: str
    source: str = ""
    milliseconds: float = 0.0
    samples_left_out: int = 0
    conservative: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at a step. ``sort``: one of `MARKED`'s values."""

    step: int
    sort: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stage of a slot, from one boundary to the next change; ``end`` is where the run stands for the last one."""

    stage: str
    start: int
    end: int


@dataclass(kw_only=True)
class History:
    """A run from its first start to where it stands. ``curves`` by name: train, epoch_train, val, accuracy,
    lr/<group>, alpha/<slot>."""

    curves: dict[str, Curve] = field(default_factory=dict)
    boundaries: list[Boundary] = field(default_factory=list)
    commands: dict[str, Asked] = field(default_factory=dict)
    returns: list[WentBack] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    checkpoints: dict[int, tuple[int, bool]] = field(default_factory=dict)
    seeds: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    first_ns: int = 0
    last_ns: int = 0
    end_step: int = 0

    def add(self, name: str, step: int, value: object) -> None:
        """One more point of a curve, unless it is no value at all."""
        number = real(value)
        if number is not None:
            self.curves.setdefault(name, Curve()).add(step, number)

    @property
    def kept_boundaries(self) -> list[Boundary]:
        """Those on the way to the end."""
        steps = [boundary.step for boundary in self.boundaries]
        return [self.boundaries[i] for start, kept, _ in kept_pieces(steps) for i in range(start, kept)]

    def lifelines(self) -> dict[str, list[Span]]:
        """The stages of every slot along the way to the end, without the times in which it was dormant."""
        lines: dict[str, list[Span]] = {}
        for boundary in self.kept_boundaries:
            for slot, stage in boundary.seeds.items():
                spans = lines.setdefault(slot, [])
                if spans and spans[-1].stage == stage:
                    continue
                if spans:
                    spans[-1] = replace(spans[-1], end=boundary.step)
                spans.append(Span(stage=stage, start=boundary.step, end=self.end_step))
        return {slot: [s for s in spans if s.stage not in ("DORMANT", "TERMINATED")] for slot, spans in lines.items()}


def read_history(files: RunFiles) -> History:
    """Everything that the run's files tell. Raises RunDirError for a file that cannot be read."""
    history = History()
    summary, status = files.summary() or {}, files.status() or {}
    for event in files.events():
        _event(history, event)
    _metrics(history, files.metrics())
    _summary(history, summary)
    steps = [whole(summary.get("steps")), whole(status.get("step")), *(b.step for b in history.boundaries[-1:])]
    history.end_step = max([*steps, *(c.steps[-1] for c in history.curves.values())], default=0)
    history.last_ns = max(history.last_ns, whole(status.get("wall_ns")))
    return history


def _metrics(history: History, lines: Iterator[Mapping[str, Any]]) -> None:
    for line in lines:
        step = whole(line.get("step"))
        history.last_ns = max(history.last_ns, whole(line.get("wall_ns")))
        for key, value in line.items():
            if key == "loss_rank0":
                history.add("train", step, value)
            elif key == "lr":
                history.add(f"lr/{HOST}", step, value)
            elif key.startswith(("lr/", "alpha/")):
                history.add(key, step, value)


def _event(history: History, event: Mapping[str, Any]) -> None:
    kind, step, wall_ns = text(event.get("kind")), whole(event.get("step")), whole(event.get("wall_ns"))
    history.first_ns = min(history.first_ns or wall_ns, wall_ns)
    history.last_ns = max(history.last_ns, wall_ns)
    if whole(event.get("rank")) != 0 and kind not in ("rank_stuck", "loader_restarted", "run_failed"):
        return
    history.counts[kind] += 1
    take = _TAKEN.get(kind)
    if take is not None:
        take(history, step, event)
    if kind in MARKED:
        history.marks.append(Mark(step=step, sort=MARKED[kind], text=_in_words(kind, event)))


def _judged(history: History, step: int, event: Mapping[str, Any]) -> None:
    known = history.commands.get(text(event.get("command_id")))
    if known is not None:
        judged = replace(known, outcome=text(event.get("outcome")), effect=text(event.get("effect")))
        history.commands[known.command_id] = judged


def _went_back(history: History, step: int, event: Mapping[str, Any]) -> None:
    history.returns.append(
        WentBack(
            step=whole(event.get("from_step"), step), to_step=whole(event.get("to_step")),
            cause=text(event.get("cause")), reason=text(event.get("reason")), source=text(event.get("source")),
            milliseconds=sum(numbers(event.get("milliseconds")).values()),
            conservative=event.get("conservative") is True,
        )
    )  # fmt: skip


def _saved(history: History, step: int, event: Mapping[str, Any]) -> None:
    history.checkpoints[whole(event.get("seq"))] = (whole(event.get("saved_step"), step), False)


def _found_good(history: History, step: int, event: Mapping[str, Any]) -> None:
    seq = whole(event.get("seq"), -1)
    if seq in history.checkpoints:
        history.checkpoints[seq] = (history.checkpoints[seq][0], True)


def _seed(history: History, step: int, event: Mapping[str, Any]) -> None:
    history.seeds[f"{text(event.get('slot'))} {text(event.get('command_id'))}"] = dict(event)


def _started(history: History, step: int, event: Mapping[str, Any]) -> None:
    history.starts.append(dict(event))


def _in_words(kind: str, event: Mapping[str, Any]) -> str:
    told = text(event.get("reason"))
    if kind == "mode_changed":
        return f"{text(event.get('mode'))}: {told}"
    if kind == "straggler":
        ms = real(event.get("own_ms")) or 0.0
        return f"straggler: rank {whole(event.get('straggler'))}, {ms:.0f} ms a step of its own"
    if kind == "emergency":
        return f"emergency level {whole(event.get('emergency_level'))}: {told}"
    where = f" from {text(event.get('source'))} of step {whole(event.get('saved_step'))}" if kind == "resumed" else ""
    return kind.replace("_", " ") + where + (f": {told}" if told else "")


def _boundary(history: History, step: int, event: Mapping[str, Any]) -> None:
    own = event.get("own_ms")
    history.boundaries.append(
        Boundary(
            step=step, boundary=whole(event.get("boundary")), mode=text(event.get("mode")),
            seeds={slot: text(stage) for slot, stage in mapping(event.get("seeds")).items()},
            latency_ms=numbers(event.get("latency_ms")),
            own_ms=tuple(real(ms) or 0.0 for ms in own) if isinstance(own, list) else (),
        )
    )  # fmt: skip
    history.add("epoch_train", step, event.get("train_loss"))
    history.add("val", step, event.get("val_loss"))
    history.add("accuracy", step, event.get("val_accuracy"))


def _command(history: History, step: int, event: Mapping[str, Any]) -> None:
    if event.get("again") is True:
        return  # made again by a start that came by its step
    kind = text(event.get("kind"))
    applied = kind.endswith("applied")
    # A refused order has no command; what identifies it then is the order.
    command_id = text(event.get("command_id")) or text(event.get("order_id"))
    reason, why = text(event.get("reason")), text(event.get("why"))
    history.commands[command_id] = Asked(
        command_id=command_id, step=step, what=text(event.get("what")), outcome="applied" if applied else "refused",
        why=why or (reason if applied else ""), effect="" if applied else reason,
        who=(text(event.get("who")) or "operator") if kind.startswith("act_") else "",
    )  # fmt: skip


_TAKEN: dict[str, Callable[[History, int, Mapping[str, Any]], None]] = {
    "boundary": _boundary, "command_applied": _command, "command_refused": _command, "act_applied": _command,
    "act_refused": _command, "command_judged": _judged, "went_back": _went_back, "checkpoint_committed": _saved,
    "checkpoint_good": _found_good, "seed_judged": _seed, "run_started": _started,
}  # fmt: skip


def _summary(history: History, summary: Mapping[str, Any]) -> None:
    for record in rows(summary.get("commands")):
        command_id = text(record.get("command_id"))
        known = history.commands.get(command_id)
        step = whole(record.get("step"), known.step if known is not None else 0)
        history.commands[command_id] = Asked(
            command_id=command_id, step=step, what=text(record.get("what")), outcome=text(record.get("outcome")),
            why=text(record.get("reason")), effect=text(record.get("effect")),
            who=text(record.get("by")) or (known.who if known is not None else ""),
        )  # fmt: skip
    told = {(back.step, back.to_step): i for i, back in enumerate(history.returns)}
    for record in rows(summary.get("incidents")):
        to_step = record.get("to_step")
        found = WentBack(
            step=whole(record.get("step")), to_step=whole(to_step) if to_step is not None else None,
            cause=text(record.get("cause")), reason=text(record.get("reason")), source=text(record.get("source")),
            milliseconds=real(record.get("milliseconds")) or 0.0,
            samples_left_out=whole(record.get("samples_left_out")), conservative=record.get("conservative") is True,
        )  # fmt: skip
        at = told.get((found.step, found.to_step))
        if at is None:
            history.returns.append(found)
        else:
            history.returns[at] = replace(found, source=found.source or history.returns[at].source)
    for record in rows(summary.get("seeds")):
        if record.get("blueprint"):
            history.seeds[f"{text(record.get('slot'))} {text(record.get('command_id'))}"] = record
