"""RUN/status.json: how a run is now, for whoever looks from outside. Rank 0 only.

A thread of its own writes the file, every so many seconds and soon after something that matters. The training thread
puts plain numbers on the board and never waits: a disk that is full or slow costs status, not steps. The file is
replaced as a whole, so that a reader sees the old or the new one; it is not made durable, as nothing is lost with it.

It is also the run's last sign of life: the next start finds in it where the time went so far, and since when nothing
has been running.
"""

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tolaria.errors import RunDirError, RunLocked
from tolaria.telemetry.goodput import CATEGORIES, Ledger
from tolaria.telemetry.lines import to_json, warn

NAME = "status.json"
SCHEMA = 1
TICK_S = 0.1
CLOSE_S = 2.0
MAX_BYTES = 64 * 2**20
MAX_REASON = 500
STOOD_STILL: tuple[str, ...] = ("finished", "stopped")
"""After these nothing was to run, so the time until the next start is not the run's."""


@dataclass(frozen=True, kw_only=True)
class Former:
    """What the start before has left: seconds by category, the furthest step, and when it wrote that (Unix time)."""

    goodput: Mapping[str, float] = field(default_factory=dict)
    furthest: int = 0
    wall_ns: int = 0
    started_ns: int = 0
    state: str = ""

    def gap_s(self, began_ns: int) -> float:
        """Seconds without a sign of life before a start that began at ``began_ns``."""
        return 0.0 if self.state in STOOD_STILL else max(0.0, (began_ns - self.wall_ns) / 1e9)


def read_former(path: Path, run_id: str) -> Former | None:
    """What the status of an earlier start of this run says; None without one, or for one that cannot be used."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        said = json.loads(path.read_bytes())
        if said["run_id"] != run_id:
            return None
        seconds: dict[str, float] = {category: float(said["goodput"].get(category, 0.0)) for category in CATEGORIES}
        return Former(goodput=seconds, furthest=int(said["furthest_step"]), wall_ns=int(said["wall_ns"]),
                      started_ns=int(said["started_ns"]), state=str(said["state"]))  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _short(reason: str) -> str:
    return " ".join(reason.split())[:MAX_REASON]


def replace_quickly(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of a file, for readers at once. Not durable. Raises OSError."""
    # Not called .tmp: what a killed start leaves half written is written over by the next one.
    fresh = path.with_name(f".{path.name}.new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
    finally:
        os.close(fd)
    os.replace(fresh, path)


class Board:
    """The board of one start, from `__enter__` to `__exit__`, which says how the run ended if `end` has not.

    ``facts``: what does not change. ``interval_s``: between two files; 0: none is written at all. ``look``: more to
    say, asked by the board's thread before each file; it must not raise. ``check_owner`` raises RunLocked once
    another start has taken the run over: then this one writes no more.
    """

    def __init__(
        self,
        path: Path,
        *,
        interval_s: float,
        ledger: Ledger,
        facts: Mapping[str, object],
        check_owner: Callable[[], None] = lambda: None,
        write: Callable[[Path, bytes], None] = replace_quickly,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.path = path
        self.ledger = ledger
        self.lost = 0
        self.wanted = True
        """Whether what is dear to say should be said anew with the next step."""
        self.look: Callable[[], Mapping[str, object]] = dict
        self._interval_s = interval_s
        self._facts: dict[str, object] = {
            "schema": SCHEMA, **facts, "pid": os.getpid(), "host": socket.gethostname(), "state": "starting",
        }  # fmt: skip
        self._check_owner = check_owner
        self._write = write
        self._clock = clock
        self._wall_ns = wall_ns
        self._soon = True
        self._failing = self._over = False
        self._ended = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tolaria-status", daemon=True)

    def __enter__(self) -> Self:
        if self._interval_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            reason = f"{type(error).__name__}: {error}"
            self.end("failed", reason)
            self._facts["reason"] = self._facts["reason"] or _short(reason)
        self.close()

    def tell(self, **facts: object) -> None:
        """Put plain values on the board in place of earlier ones; they must not change afterwards. Local."""
        self._facts.update(facts)

    def show(self) -> None:
        """Something happened that should be seen soon: within TICK_S."""
        self._soon = True

    def end(self, state: str, reason: str = "") -> None:
        """How the run ended: finished, stopped, unstable, halted or failed. The first word on it counts."""
        if not self._ended:
            self._ended = True
            self._facts.update(state=state, reason=_short(reason))

    def close(self) -> None:
        """Write a last file. Blocks for it, CLOSE_S at most; twice does no harm."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                self._fail("the disk does not answer")

    def _run(self) -> None:
        written, paused = -math.inf, False
        while True:
            now = self._clock()
            # Standing still and going on again are seen by the clock itself.
            before, paused = paused, self.ledger.category == "paused"
            if self._soon or paused != before or now - written >= self._interval_s:
                written, self._soon = now, False
                self._put()
                self.wanted = True
            if self._closing.wait(TICK_S):
                break
        self._put()

    def _put(self) -> None:
        if self._over:
            return
        try:
            self._check_owner()
            self._write(self.path, self._document())
            self._failing = False
        except RunLocked:
            self._over = True
        except (OSError, RunDirError) as error:
            self._fail(getattr(error, "strerror", None) or str(error))

    def _document(self) -> bytes:
        ledger = self.ledger
        seconds = ledger.seconds()
        said: dict[str, object] = {
            **self._facts, "wall_ns": self._wall_ns(), "activity": "" if self._ended else ledger.activity,
            "goodput": {category: round(s, 3) for category, s in seconds.items()}, "furthest_step": ledger.furthest,
        }  # fmt: skip
        said.update(self.look())
        if not self._ended and said["state"] == "running" and ledger.category == "paused":
            said["state"] = "paused"
        return json.dumps(to_json(said), separators=(",", ":")).encode() + b"\n"

    def _fail(self, why: str) -> None:
        self.lost += 1
        first, self._failing = not self._failing, True
        if first:
            warn(f"tolaria: cannot write {self.path} ({why}); training goes on without it")


class Clock(NamedTuple):
    """A rank's clock, and the board on which rank 0 tells what it says."""

    ledger: Ledger
    board: Board | None
