"""metrics.jsonl: the numbers of a run over its steps."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tolaria.telemetry.events import Listener
from tolaria.telemetry.lines import LineFile, read_lines


class MetricsLog:
    """One line per logging interval: step, branch, wall_ns, then the values. For rank 0.

    ``branch`` is 0 until the run goes back to an earlier state, and higher after each return: within one branch steps
    only rise. A resumed run goes on in the same file, so a step may occur twice: the later line counts.
    Local, does not wait for the disk; a line that could not be written is counted in ``lost``, and nothing is raised.
    ``listener`` is handed every line as a record of kind "step".
    """

    def __init__(
        self,
        path: Path,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        write: Callable[[int, bytes], int] = os.write,
        listener: Listener | None = None,
    ) -> None:
        """Open or create the file. Raises RunDirError when that is not possible."""
        self._file = LineFile(path, write=write)
        self._wall_ns = wall_ns
        self._listener = listener

    @property
    def lost(self) -> int:
        """Lines that could not be written so far."""
        return self._file.lost

    def write(self, step: int, branch: int = 0, **values: object) -> None:
        """Write one line of host values (numbers, not device tensors: a tensor would be copied from its device)."""
        now = self._wall_ns()
        self._file.append({"step": step, "branch": branch, "wall_ns": now, **values}, wait=False, wake=False)
        if self._listener is not None:
            self._listener("step", "info", values, rank=0, step=step, branch=branch, wall_ns=now)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file in the order written; damaged lines are skipped."""
    return read_lines(path)
