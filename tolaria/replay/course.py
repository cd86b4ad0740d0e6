"""What a run's files say of its course: what was decided on the way, where it ended, what state it ended with.

summary.json      the state of every rank at the end, if the run ended in order
a checkpoint      the newest on the run's course, if it was cut off
the log           up to there: decisions, returns and acts, but nothing that a start would load
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tolaria.compare import digest_of
from tolaria.dist import Peers
from tolaria.errors import CheckpointError, RunDirError, RunLocked, WalError
from tolaria.leyline.codec import decode_command, decode_decision, encode_decision
from tolaria.leyline.types import RollbackCommand
from tolaria.orders.words import PAUSE, RESUME
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.manifest import checkpoint_name
from tolaria.recovery.reader import load_path
from tolaria.recovery.timeline import LoggedCheckpoint, Return, Timeline, made, on_timeline
from tolaria.recovery.wal import WalKind, WalRecord, read_log
from tolaria.state import HAND, without_hand
from tolaria.view.files import RunFiles

_NOT_COPIED = frozenset(
    {WalKind.OPEN, WalKind.START, WalKind.CHECKPOINT, WalKind.GOOD, WalKind.CLOSE, WalKind.SIGNAL, WalKind.HALT}
)
_OF_BOUNDARIES = (WalKind.APPLIED, WalKind.ABORTED)


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run that is over.

    outcome: "finished", "stopped", or "cut off" without a word of its own. step: the last one that can be compared.
    until: the step to stop after, 0 where the run came to its own end. digests: rank -> its whole state there, hex;
    empty where nothing was kept, ``source`` says where they are from. records: the log up to there.
    """

    path: Path
    world_size: int
    facts: Mapping[str, Any]
    starts: int
    outcome: str
    step: int
    until: int
    digests: Mapping[int, str]
    source: str
    records: tuple[WalRecord, ...]
    seconds: float | None
    changed: tuple[str, ...]

    @property
    def returns(self) -> list[Return]:
        """The returns to earlier states that were made."""
        return made(Timeline.of(self.records).returns)


@dataclass(frozen=True)
class _End:
    """A point of the course and all that had happened by then; numbers beyond any for the very end."""

    outcome: str
    step: int
    until: int
    digests: Mapping[int, str]
    source: str
    branch: int = 2**62
    boundary: int = 2**62
    acts: int = 2**62
    seconds: float | None = None


def read_course(files: RunFiles, fs: FileOps) -> Course:
    """The course of the run in this directory. Local; reads only, and hashes a checkpoint where it has to.

    Raises RunLocked for a run that is still going, RunDirError for one that cannot be replayed, WalError for a damaged
    log.
    """
    if files.alive:
        raise RunLocked(f"{files.path}: still training; what is not over cannot be compared. Stop it, or wait")
    records = log_of(files.path, fs)
    timeline = Timeline.of(records)
    facts = [record.document["facts"] for record in records if record.kind == WalKind.OPEN]
    _check_start(files.path, timeline, facts)
    end = _end_of(files, records, timeline, int(facts[0]["ranks"]), fs)
    return Course(
        path=files.path, world_size=int(facts[0]["ranks"]), facts=facts[0], starts=len(timeline.starts),
        outcome=end.outcome, step=end.step, until=end.until, digests=end.digests, source=end.source,
        records=_copied(records, end), seconds=end.seconds, changed=_changed(facts),
    )  # fmt: skip


def log_of(run: Path, fs: FileOps) -> list[WalRecord]:
    """All records of a run's log. Raises RunDirError where there is none, WalError for one that cannot be trusted."""
    root = run / "wal"
    if not fs.is_dir(root):
        raise RunDirError(f"{run}: has no log of decisions (wal/), so there is nothing to replay")
    try:
        return read_log(root, fs).records
    except OSError as error:
        raise WalError(f"{root}: the log cannot be read ({error.strerror or error})") from error
    except WalError as error:
        raise WalError(f"{root}: {error}") from error


def _check_start(path: Path, timeline: Timeline, facts: list[dict[str, Any]]) -> None:
    if not timeline.starts:
        raise RunDirError(f"{path}: it never began to train, so there is nothing to replay")
    if timeline.starts[0].step:
        raise RunDirError(
            f"{path}: it began at step {timeline.starts[0].step}, from a checkpoint of another run; only a run that "
            "began at step 0 can be replayed"
        )
    if len(ranks := {int(fact["ranks"]) for fact in facts}) > 1:
        counts = " and ".join(map(str, sorted(ranks)))
        raise RunDirError(f"{path}: it trained on {counts} ranks in turns; a replay has one number of them")


def _changed(facts: list[dict[str, Any]]) -> tuple[str, ...]:
    """What one start of the run did otherwise than the one before: only the last one's configuration is kept."""
    return tuple(
        f"{key} {before.get(key)!r} -> {value!r}"
        for before, after in pairwise(facts)
        for key, value in after.items() if before.get(key) != value
    )  # fmt: skip


# Where it ended


def _end_of(
    files: RunFiles, records: list[WalRecord], timeline: Timeline, world_size: int, fs: FileOps
) -> _End:  # fmt: skip
    summary = files.summary()
    if summary is not None and timeline.closed and summary.get("outcome") in ("finished", "stopped"):
        step = int(summary["steps"])
        return _End(
            outcome=summary["outcome"], step=step, until=0 if summary["outcome"] == "finished" else step,
            digests={int(rank): str(digest) for rank, digest in summary["state_digest"].items()},
            source="summary.json", seconds=float(summary["seconds"]),
        )  # fmt: skip
    for known in sorted(timeline.checkpoints.values(), key=lambda known: known.seq, reverse=True):
        folder = files.path / "ckpt" / checkpoint_name(known.seq, known.step)
        if on_timeline(timeline.returns, known.branch, known.step) and fs.is_dir(folder):
            return _at_checkpoint(folder, known, world_size, fs)
    if not timeline.decisions:
        raise RunDirError(
            f"{files.path}: it was cut off before its first boundary and checkpoint; there is nothing to compare"
        )
    last = decode_decision(timeline.decisions[max(timeline.decisions)])
    return _End(
        outcome="cut off", step=last.step_effective, until=last.step_effective, digests={}, source="",
        boundary=last.boundary,
    )  # fmt: skip


def _at_checkpoint(folder: Path, known: LoggedCheckpoint, world_size: int, fs: FileOps) -> _End:
    """The state in a checkpoint, by the same digest that a run ends with. Raises CheckpointError."""
    loaded = load_path(folder, Peers(None, 0, 1), fs)
    if loaded.manifest_sha256 != known.manifest_sha256:
        raise CheckpointError(f"{folder}: its manifest is not the one in the log")
    digest = digest_of(loaded.tensors, without_hand(loaded.meta)).hex()
    return _End(
        outcome="cut off", step=known.step, until=known.step, digests=dict.fromkeys(range(world_size), digest),
        source=f"checkpoint {folder.name}", branch=known.branch, boundary=int(loaded.meta["boundary"]),
        acts=int(loaded.meta.get(HAND, {}).get("acts", 0)),
    )  # fmt: skip


# The log of it


def _copied(records: Iterable[WalRecord], end: _End) -> tuple[WalRecord, ...]:
    """What a start needs to go the same way by itself, and what there is to compare on the way."""
    kept = [r for r in records if r.kind not in _NOT_COPIED and _before(r, end)]
    standing = Timeline.of(kept)
    return tuple(_standing(record, standing) for record in kept)


def _before(record: WalRecord, end: _End) -> bool:
    if record.kind == WalKind.DECISION:
        return decode_decision(record.body).boundary <= end.boundary
    body = record.document
    if record.kind in _OF_BOUNDARIES:
        return int(body["boundary"]) <= end.boundary
    if record.kind == WalKind.VOID:
        return int(body["branch"]) <= end.branch
    return record.kind not in (WalKind.ACT, WalKind.ACTED) or int(body["act"]) <= end.acts


def _standing(record: WalRecord, standing: Timeline) -> WalRecord:
    """The record without what must not be done again: waiting for an operator, and a return that failed then."""
    if record.kind == WalKind.DECISION:
        decision = decode_decision(record.body)
        # A return that was made has made its own decision void; one that still stands has failed.
        if standing.decisions.get(decision.boundary) == record.body and any(map(_asks_to_return, decision.commands)):
            return replace(record, body=encode_decision(replace(decision, commands=())))
    if record.kind == WalKind.ACT:
        body = record.document
        failed = body["act"] in standing.acts and body["command"] and _asks_to_return(bytes.fromhex(body["command"]))
        if body["action"] == PAUSE or failed:
            return replace(record, body=json.dumps({**body, "action": RESUME, "command": ""}).encode())
    return record


def _asks_to_return(command: bytes) -> bool:
    return isinstance(decode_command(command).payload, RollbackCommand)
