"""What each rank of this machine is doing at this moment, off the page that they and the watchdog share."""

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tolaria.recovery.page import OPERATOR, Page
from tolaria.view.files import RunFiles


@dataclass(frozen=True, kw_only=True)
class Doing:
    """One rank of this machine: its phase, since how many seconds, at which step, and the age of its last heartbeat."""

    local_rank: int
    pid: int
    phase: str
    seconds: float
    step: int
    silent_s: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The page at one moment. ``level``: of the emergency in force, 0 for none."""

    ranks: tuple[Doing, ...]
    level: int
    reason: str


def look_at_page(files: RunFiles) -> Seen | None:
    """The page of a run that lives on this machine; None where there is none, or none that this version can read."""
    try:
        path = Path((files.path / "PAGE").read_text().strip())
    except (OSError, UnicodeDecodeError):
        return None  # a run without a page, on another machine, or ended
    try:
        with closing(Page.attach(path, line=OPERATOR)) as page:
            return _read(page)
    except (OSError, ValueError):
        return None  # removed at this moment, somebody else's, or another version's


def _read(page: Page) -> Seen:
    now = time.monotonic_ns()
    lines = [(rank, page.rank_line(rank)) for rank in range(page.ranks)]
    return Seen(
        ranks=tuple(
            Doing(
                local_rank=rank, pid=line.pid, phase=line.phase.name.lower(),
                seconds=max(0.0, (now - line.since_ns) / 1e9), step=line.step,
                silent_s=max(0.0, (now - line.heartbeat_ns) / 1e9),
            )
            for rank, line in lines if line.pid
        ),
        level=page.level(), reason=page.reason(),
    )  # fmt: skip
