"""What a run leaves on its way that two runs can be compared by, and where they first differ. Pure but for reading.

    every logged step    loss of rank 0's samples             metrics.jsonl
    every boundary       losses, accuracy, metrics             events.jsonl
                         structure after its commands          the log
                         mode, stages of the seeds             events.jsonl
    every act            structure after it                    the log, events.jsonl
    the end              the whole state of every rank         summary.json

Digests and numbers are compared bit for bit. What a return made void is passed over.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from tolaria.errors import MessageRejected
from tolaria.leyline.codec import decode_command, decode_decision
from tolaria.leyline.words import describe
from tolaria.recovery.timeline import Return, Timeline
from tolaria.recovery.wal import WalKind, WalRecord
from tolaria.view.files import RunFiles

_LOSS, _MEASURED, _UNKNOWN, _CHANGED, _AFTER, _ACT = range(6)
_FIELDS = {
    "train_loss": (_MEASURED, "training loss"), "val_loss": (_MEASURED, "validation loss"),
    "val_accuracy": (_MEASURED, "accuracy"), "metrics": (_MEASURED, "metrics"),
    "mode": (_AFTER, "mode"), "seeds": (_AFTER, "stages of the seeds"),
}  # fmt: skip


class Place(NamedTuple):
    """Where something was seen; sorts in the order of a run. ``number``: of the boundary or act, 0 for a mere step."""

    step: int
    order: int
    number: int
    what: str

    @property
    def kind(self) -> str:
        """For counting: "loss", "boundary", "command" or "act"."""
        kinds = {_LOSS: "loss", _CHANGED: "command", _ACT: "act"}
        return kinds.get(self.order, "boundary")

    def in_words(self) -> str:
        """ "boundary 4 (step 40): validation loss"."""
        if not self.number:
            return f"step {self.step:,}: {self.what}"
        return f"{'act' if self.order == _ACT else 'boundary'} {self.number} (step {self.step:,}): {self.what}"


Trace: TypeAlias = dict[Place, Any]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One place where a replay is not as recorded. ``commands``: what was decided there, in words."""

    place: Place
    recorded: Any
    replayed: Any
    commands: tuple[str, ...] = ()


def trace_of(files: RunFiles, records: Iterable[WalRecord], last_step: int) -> Trace:
    """What a run left up to ``last_step``. ``records``: of its log, without those that it was given to begin with."""
    found = _of_metrics(files) | _of_events(files) | _of_log(records)
    return {place: value for place, value in found.items() if place.step <= last_step}


def differences(recorded: Trace, replayed: Trace, records: Iterable[WalRecord]) -> list[Difference]:
    """Where the two differ, in the order of the run. ``records``: the log, to name what was decided."""
    commands = _commands(records)
    only_replayed = [p for p in replayed if p.order == _UNKNOWN]
    unequal = [p for p in recorded.keys() & replayed.keys() if recorded[p] != replayed[p]]
    return [
        Difference(
            place=place, recorded=recorded.get(place), replayed=replayed[place],
            commands=commands.get((place.order == _ACT, place.number), ()),
        )
        for place in sorted({*only_replayed, *unequal})
    ]  # fmt: skip


def _of_metrics(files: RunFiles) -> Trace:
    # The course goes through a step that is in here twice once more, so the last line counts.
    return {
        Place(int(line["step"]), _LOSS, 0, "loss of rank 0's samples"): line["loss_rank0"]
        for line in files.metrics() if "loss_rank0" in line
    }  # fmt: skip


def _of_events(files: RunFiles) -> Trace:
    found: Trace = {}
    for event in files.events({"boundary", "went_back", "act_applied", "act_refused"}):
        if event["rank"] != 0:
            continue
        if event["kind"] == "went_back":
            found = {place: value for place, value in found.items() if place.step <= int(event["to_step"])}
        elif event["kind"] == "boundary":
            for name, (order, what) in _FIELDS.items():
                found[Place(int(event["step"]), order, int(event["boundary"]), what)] = event[name]
        elif event["act"]:
            found[_act(int(event["step"]), int(event["act"]))] = event["digest"]
    return found


def _of_log(records: Iterable[WalRecord]) -> Trace:
    listed = list(records)
    found: dict[int, Any] = {}
    for record in listed:
        if record.kind in (WalKind.APPLIED, WalKind.ABORTED):
            body = record.document
            found[int(body["boundary"])] = [sorted(body["applied"]), body["digest"]]
        elif record.kind == WalKind.VOID:
            last = Return.from_json(record.document).to_boundary
            found = {boundary: value for boundary, value in found.items() if boundary <= last}
    steps = {b: decode_decision(raw).step_effective for b, raw in Timeline.of(listed).decisions.items()}
    return {Place(steps[b], _CHANGED, b, "structure after its commands"): v for b, v in found.items() if b in steps}


def unknown_place(step: int, boundary: int, what: str) -> Place:
    """Where a replay does what the log knows nothing of."""
    return Place(step, _UNKNOWN, boundary, what)


def _act(step: int, number: int) -> Place:
    return Place(step, _ACT, number, "structure after it")


def _commands(records: Iterable[WalRecord]) -> Mapping[tuple[bool, int], tuple[str, ...]]:
    """(of an act?, number) -> what was asked for there."""
    timeline = Timeline.of(records)
    found = {
        (False, boundary): tuple(map(_in_words, decode_decision(raw).commands))
        for boundary, raw in timeline.decisions.items()
    }
    for number, act in timeline.acts.items():
        body = act.body or {}
        raw = bytes.fromhex(body.get("command", ""))
        found[True, number] = (_in_words(raw) if raw else str(body.get("action")),)
    return found


def _in_words(raw: bytes) -> str:
    try:
        return describe(decode_command(raw))
    except MessageRejected:
        return "a command that no rank could read"
