"""events.jsonl: what happened in a run, typed, for machines."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from tolaria.telemetry.lines import LineFile, read_lines

Level: TypeAlias = Literal["info", "warning", "error", "critical"]

RESERVED = frozenset({"kind", "level", "run_id", "rank", "mono_ns", "wall_ns"})
"""Names that every event carries itself; step and branch too, but an event about another step may say so."""


class Listener(Protocol):
    """Who is handed what goes into the files as well, in the thread that writes it: must be quick and never raise."""

    def __call__(
        self, kind: str, level: Level, fields: Mapping[str, Any], *, rank: int, step: int, branch: int, wall_ns: int
    ) -> None:
        """Take one record; ``fields`` are its own."""
        ...


class EventLog:
    """The typed events of one rank; the ranks of one machine share the file.

    Every line has kind, level, run_id, rank, step, branch, mono_ns (monotonic, for intervals within one boot) and
    wall_ns (Unix time), then the event's own fields. ``step`` is set by the training loop. ``branch``, by whoever goes
    back to an earlier state: 0, and higher after each return, so that a step that comes again can be told from its
    first time. ``listener`` is handed every event before it is written. Local, safe to use from several
    threads; a slow disk holds it up for some milliseconds at most. When events were lost, the next one that can be
    written is preceded by an ``events_lost`` event with their number.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        *,
        run_id: str,
        mono_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
        write: Callable[[int, bytes], int] = os.write,
    ) -> None:
        """Open or create the file. Raises RunDirError when that is not possible."""
        self.rank = rank
        self.run_id = run_id
        self.step = 0
        self._marks: dict[str, object] = {}
        self.branch = 0
        self.listener: Listener | None = None
        self._mono_ns = mono_ns
        self._wall_ns = wall_ns
        self._file = LineFile(path, write=write, notice=self._lost)

    @property
    def lost(self) -> int:
        """Events that could not be written so far."""
        return self._file.lost

    def emit(self, kind: str, level: Level = "info", **fields: object) -> None:
        """Write one event. Raises ValueError for a field whose name is in RESERVED, nothing else."""
        self._append(kind, level, fields, wait=True)

    def note(self, kind: str, level: Level = "info", **fields: object) -> None:
        """Write one event like `emit`, but without waiting for it to be in the file: a crash within microseconds, or
        while the disk is slow, may take it along. For what every boundary tells, or another file holds as well."""
        self._append(kind, level, fields, wait=False)

    @contextmanager
    def marked(self, **fields: object) -> Iterator[None]:
        """Every event of this rank has these fields as well, inside."""
        before, self._marks = self._marks, {**self._marks, **fields}
        try:
            yield
        finally:
            self._marks = before

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()

    def _append(self, kind: str, level: Level, fields: dict[str, object], *, wait: bool) -> None:
        clash = RESERVED.intersection(fields)
        if clash:
            raise ValueError(f"event {kind!r}: field names {sorted(clash)} are reserved; choose others")
        record = self._record(kind, level, fields)
        if self.listener is not None:
            self.listener(
                kind, level, fields, rank=self.rank, step=record["step"], branch=record["branch"],
                wall_ns=record["wall_ns"],
            )  # fmt: skip
        self._file.append(record, wait=wait)

    def _lost(self, count: int) -> dict[str, object]:
        return self._record("events_lost", "warning", {"count": count})

    def _record(self, kind: str, level: Level, fields: dict[str, object]) -> dict[str, Any]:
        return {
            "kind": kind, "level": level, "run_id": self.run_id, "rank": self.rank, "step": self.step,
            "branch": self.branch, "mono_ns": self._mono_ns(), "wall_ns": self._wall_ns(), **self._marks, **fields,
        }  # fmt: skip


def read_events(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The events of a file in the order written, all or those of one kind; damaged lines are skipped."""
    return (event for event in read_lines(path) if kind is None or event.get("kind") == kind)
