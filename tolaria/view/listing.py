"""The runs of a folder, one line each."""

import os
from dataclasses import dataclass

from tolaria.errors import RunDirError
from tolaria.view.files import RunFiles, find_runs
from tolaria.view.lookout import look


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One run. ``age_s``: since its newest word; None and 0: not told. ``loss``, ``accuracy``: of the last validation.

    A run that cannot be read has the state "unreadable" and the reason.
    """

    run: str
    path: str
    state: str
    reason: str = ""
    name: str = ""
    epoch: int = 0
    epochs: int | None = None
    step: int = 0
    loss: float | None = None
    accuracy: float | None = None
    ranks: int | None = None
    started_ns: int = 0
    told_ns: int = 0
    age_s: float | None = None


def list_runs(root: str | os.PathLike[str]) -> list[Listed]:
    """All runs right below ``root``, those that started last first. Raises RunDirError for a folder that is none."""
    found = [_listed(files) for files in find_runs(root)]
    return sorted(found, key=lambda entry: (-entry.started_ns, entry.run))


def _listed(files: RunFiles) -> Listed:
    try:
        now = look(files).now
    except RunDirError as error:
        # One damaged run must not hide the others.
        return Listed(run=files.name, path=str(files.path), state="unreadable", reason=str(error))
    score = now.validation
    return Listed(
        run=files.name, path=str(files.path), state=now.state, reason=now.activity or now.reason, name=now.name,
        epoch=now.epoch, epochs=now.epochs, step=now.step, loss=score.loss if score else now.train_loss,
        accuracy=score.accuracy if score else None, ranks=now.world_size, started_ns=now.started_ns,
        told_ns=now.told_ns, age_s=max(0.0, (now.wall_ns - now.told_ns) / 1e9) if now.told_ns else None,
    )  # fmt: skip
