"""What of a run, or of one checkpoint, is sound: its log, then each checkpoint, held against the log."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tolaria.errors import RunDirError, WalError
from tolaria.evidence.checkpoint import Checked, Progress, check_checkpoint, checkpoint_bytes
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.manifest import MANIFEST_NAME, is_leftover, is_quarantined, parse_checkpoint_name, used_seq
from tolaria.recovery.timeline import Timeline
from tolaria.recovery.wal import read_log
from tolaria.telemetry.words import counted

LOG = "log"
CHECKPOINTS = "ckpt"


@dataclass(frozen=True)
class Plan:
    """What is to be checked: the log's folder, if there is one, and the checkpoints, newest last. ``root``: of both."""

    root: Path
    log: Path | None
    checkpoints: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of the checkpoints, about."""
        return sum(checkpoint_bytes(path) for path in self.checkpoints)


def plan_for(path: str | Path) -> Plan:
    """What lies at a path: a run directory, or one checkpoint. Raises RunDirError for anything else."""
    folder = Path(path)
    try:
        if (folder / MANIFEST_NAME).exists() or parse_checkpoint_name(folder.name):
            log = folder.parent.parent / "wal"
            if not folder.is_dir():
                raise RunDirError(f"{folder}: no such checkpoint")
            return Plan(folder.parent, log if log.is_dir() else None, (folder,))
        if not folder.is_dir():
            raise RunDirError(f"{folder}: no such directory; expected a run directory or a checkpoint in its ckpt/")
        ckpt = folder / CHECKPOINTS
        if not (folder / "wal").is_dir() and not ckpt.is_dir():
            raise RunDirError(f"{folder}: neither a run directory nor a checkpoint: no wal/, ckpt/ or {MANIFEST_NAME}")
        names = [entry for entry in ckpt.iterdir() if used_seq(entry.name) is not None] if ckpt.is_dir() else []
        names.sort(key=lambda entry: used_seq(entry.name) or 0)
        return Plan(folder, folder / "wal" if (folder / "wal").is_dir() else None, tuple(names))
    except OSError as error:
        raise RunDirError(f"{folder}: cannot be read ({error.strerror})") from error


def check(plan: Plan, *, alive: bool, progress: Progress) -> Iterator[Checked]:
    """The log first, then each checkpoint, as they are done. ``alive``: the run is at work and may delete some.

    Raises RunDirError for what cannot be read for a reason that may pass.
    """
    known: dict[int, str] = {}
    if plan.log is not None:
        found, known = check_log(plan.log)
        yield found
    elif len(plan.checkpoints) != 1:
        yield Checked(LOG, note="there is none")
    for path in plan.checkpoints:
        yield _checkpoint(path, known, alive=alive, progress=progress)


def check_log(root: Path) -> tuple[Checked, dict[int, str]]:
    """The log's soundness, and the sha256 of every checkpoint's manifest by number."""
    found = Checked(LOG)
    try:
        log = read_log(root, FileOps())
        timeline = Timeline.of(log.records)
    except WalError as error:
        found.faults.append(str(error))
        return found, {}
    except OSError as error:
        raise RunDirError(f"{root}: cannot be read ({error.strerror or error})") from error
    found.files = len(log.segments)
    found.size = sum(segment.scanned.end for segment in log.segments)
    found.note = counted(len(log.records), "record")
    if log.torn:
        found.note += ", one more not finished"
    return found, {seq: known.manifest_sha256 for seq, known in timeline.checkpoints.items()}


def _checkpoint(path: Path, known: dict[int, str], *, alive: bool, progress: Progress) -> Checked:
    seq = used_seq(path.name)
    if is_leftover(path.name):
        why = "being written or deleted" if alive else "left by a crash; the next start removes it"
        return Checked(path.name, note=f"not a checkpoint: {why}")
    if is_quarantined(path.name):
        return Checked(path.name, note="set aside: the run found it damaged and does not use it")
    logged = known.get(seq, "") if seq is not None else ""
    try:
        found = check_checkpoint(path, logged_sha256=logged, progress=progress)
    except FileNotFoundError:
        return Checked(path.name, note="deleted meanwhile: the run keeps newer ones")
    except OSError as error:
        raise RunDirError(
            f"{path}: cannot be read ({error.strerror or error}); mend the cause and try again"
        ) from error
    if found.faults and alive and not path.exists():
        return Checked(path.name, note="deleted meanwhile: the run keeps newer ones")
    found.note = "as the log says" if logged and found.sound else found.note
    return found
