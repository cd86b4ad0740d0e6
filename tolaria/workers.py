"""Loader processes that may die or hang: whoever did is replaced, and no batch is lost or seen twice.

torch tells of a dead loader process by an exception in whatever the training process is doing at that moment, be it a
collective; here it is noticed where the next batch is asked for.
"""

import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from tolaria.errors import TaskError

LOOK_S = 1.0
"""A dead loader process is noticed within so long; a DataLoader for this module has it as its timeout."""

RESTARTS = 3
"""In one pass over the data; a fourth loss in a row of them has a cause that a restart does not mend."""


class WorkersLost(Exception):
    """Loader processes died, or gave nothing in time."""


class Workers:
    """The loader processes of one DataLoader with ``timeout=LOOK_S``, and the batches that they give. Local.

    torch's timeout does not cover a batch whose memory is still to be handed over by its process; a thread does.
    """

    def __init__(self, loader: DataLoader[Any], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        self._batches = iter(loader)
        self._processes: set[BaseProcess] = set(multiprocessing.active_children()) - before
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        self._due = math.inf
        self._late = False
        self._over = threading.Event()
        self._overseer = threading.Thread(target=self._oversee, name="loader-overseer", daemon=True)
        self._overseer.start()

    def next(self) -> Any:
        """The next batch, of which there must be one. Raises WorkersLost, and what the dataset raises."""
        self._due = time.monotonic() + self._timeout_s
        try:
            while True:
                try:
                    return next(self._batches)
                except (RuntimeError, OSError, EOFError) as error:
                    self._judge(error)
        finally:
            self._due = math.inf

    def _judge(self, error: Exception) -> None:
        """Return if there is still time."""
        text = str(error)
        if self._late:
            raise WorkersLost(f"no batch within {self._timeout_s:g} s (data.timeout_s)") from error
        told_by_torch = text.startswith("DataLoader worker (pid")
        # Its connection may be known to be gone before it is.
        if told_by_torch or (not isinstance(error, RuntimeError) and "in DataLoader worker process" not in text
                             and wait([p.sentinel for p in self._processes], LOOK_S)):  # fmt: skip
            raise WorkersLost("a loader process died") from error
        if not text.startswith("DataLoader timed out"):
            raise error

    def _oversee(self) -> None:
        while not self._over.wait(LOOK_S / 2):
            if time.monotonic() > self._due:
                self._late = True
                self.kill()

    def kill(self) -> None:
        """End the processes whatever they are doing, also stopped ones."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """No batch is asked for any more. Blocks for milliseconds."""
        self._over.set()
        self._overseer.join()


def load(
    make: Callable[[int], DataLoader[Any]], count: int, *, timeout_s: float, tell: Callable[[str, int], None]
) -> Iterator[Any]:
    """Batches 0 to ``count`` - 1, each once and in order.

    ``make``: the loader of the batches from a number on. ``tell``: is told why processes were replaced, and before
    which batch. Raises TaskError after RESTARTS replacements.
    """
    given = lost = 0
    while given < count:
        workers = Workers(make(given), timeout_s)
        try:
            while given < count:
                batch = workers.next()
                given += 1
                yield batch
        except WorkersLost as error:
            workers.kill()
            lost += 1
            if lost > RESTARTS:
                raise TaskError(f"loading the task's data: {error}, {lost} times in one pass over the data") from error
            tell(str(error), given)
        finally:
            workers.close()
