"""The whole inquiry: the log's chain, the signatures, and the run's other files held against the log."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tolaria.errors import RunDirError
from tolaria.evidence.keys import Keys
from tolaria.evidence.signed import Tally, check_orders, check_policy
from tolaria.evidence.trail import Entry, Trail
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.manifest import MANIFEST_MAX_BYTES, MANIFEST_NAME, parse_checkpoint_name
from tolaria.recovery.wal.survey import survey
from tolaria.view.files import RunFiles
from tolaria.view.history import History, read_history
from tolaria.view.values import text, whole


@dataclass
class Audit:
    """What an inquiry found. ``faults``: everything that is wrong, each with its place; empty: nothing is."""

    run_id: str
    entries: list[Entry]
    records: int
    segments: int
    torn: bool
    quiet: int
    chain: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    orders: Tally = field(default_factory=Tally)
    policy: Tally = field(default_factory=Tally)

    @property
    def faults(self) -> list[str]:
        """All of them, the log's own first."""
        return [*self.chain, *self.story, *self.orders.faults, *self.policy.faults, *self.files]


def audit_run(files: RunFiles, keys: Keys) -> Audit:
    """Read and check everything that a run wrote about its decisions. Changes nothing; it may be a run at work.

    Raises RunDirError where there is no log, or it cannot be read.
    """
    root = files.path / "wal"
    if not root.is_dir():
        raise RunDirError(f"{root}: the run has no log (checkpoint.every and recovery off?); there is nothing to audit")
    try:
        found = survey(root, FileOps())
    except OSError as error:
        raise RunDirError(f"{root}: cannot be read ({error.strerror or error})") from error
    trail = Trail.of(found.records)
    history = read_history(files)
    result = Audit(
        run_id=str(next(iter(trail.openings.values()), {}).get("run_id", "")), entries=trail.entries,
        records=len(found.records), segments=found.segments, torn=found.torn, quiet=trail.quiet, chain=found.faults,
        story=trail.faults,
    )  # fmt: skip
    result.orders = check_orders(trail, keys)
    result.policy = check_policy(files.path, trail, keys)
    result.files = [*_run_ids(trail), *_events(files, trail), *_manifests(files.path / "ckpt", trail)]
    _effects(trail, history)
    return result


def _effects(trail: Trail, history: History) -> None:
    """What the run later found that a command did; the log says only that it was applied."""
    for command_id, entry in trail.commands.items():
        told = history.commands.get(command_id)
        if told is not None and told.effect and told.effect not in entry.effect:
            word = "" if told.outcome in ("applied", "refused") else f"{told.outcome}, "
            entry.effect = "; ".join(part for part in (entry.effect, word + told.effect) if part)


def _run_ids(trail: Trail) -> Iterator[str]:
    ids = {str(opening.get("run_id")) for opening in trail.openings.values()}
    if len(ids) > 1:
        yield f"the log is of several runs: {', '.join(sorted(ids))}"


def _events(files: RunFiles, trail: Trail) -> Iterator[str]:
    """What the ranks' events say otherwise than the log."""
    for event in files.events(("command_applied", "act_applied")):
        what, step = text(event.get("what")), whole(event.get("step"))
        if event["kind"] == "command_applied":
            if text(event.get("command_id")) not in trail.commands:
                yield f"events.jsonl: step {step}: {what} was applied, and the log does not know it"
        elif not event.get("again"):
            number, digest = whole(event.get("act")), text(event.get("digest"))
            known = [entry.digest for _, entry in trail.acts if (entry.act, entry.step) == (number, step)]
            if not known:
                yield f"events.jsonl: step {step}: act {number} ({what}) was made, and the log does not know it"
            elif digest not in known and all(known):
                rank = whole(event.get("rank"))
                yield f"events.jsonl: act {number} ({what}): rank {rank} came to another state than the log says"


def _manifests(root: Path, trail: Trail) -> Iterator[str]:
    """Checkpoints whose manifest is not the one in the log; `tolaria verify` reads the rest of them."""
    if not root.is_dir():
        return
    fs = FileOps()
    for name in fs.list_dir(root):
        parsed = parse_checkpoint_name(name)
        if parsed is None or parsed[0] not in trail.manifests:
            continue
        try:
            raw = fs.read_file(root / name / MANIFEST_NAME, MANIFEST_MAX_BYTES)
        except FileNotFoundError:
            if (root / name).is_dir():
                yield f"ckpt/{name}: has no manifest"
            continue
        except OSError as error:
            raise RunDirError(f"{root / name}: cannot be read ({error.strerror or error})") from error
        if hashlib.sha256(raw).hexdigest() != trail.manifests[parsed[0]]:
            yield f"ckpt/{name}: its manifest is not the one in the log"
