"""A rank's pulse: a thread that shows that the process lives, acknowledges alarms, and minds the watchdog.

Python threads stand still while one of them holds the interpreter lock. That is what the watchdog looks for.
"""

import faulthandler
import os
import select
import sys
import threading
from contextlib import suppress
from typing import Self

import psutil

from tolaria.recovery.page import Page

PERIOD_S = 0.01
WATCHDOG_LOST = 71


class Pulse:
    """One per rank; a daemon thread from `start` to `stop`."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tolaria-pulse", daemon=True)
        self._watchdog = -1
        self._poll = select.poll()

    def start(self) -> Self:
        """Begin to beat. With a watchdog on the page, its end is this process's end from now on."""
        if pid := self._page.watchdog_pid:
            with suppress(ProcessLookupError):
                self._watchdog = os.pidfd_open(pid)
                self._poll.register(self._watchdog, select.POLLIN)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()
        if self._watchdog >= 0:
            os.close(self._watchdog)
            self._watchdog = -1

    def _run(self) -> None:
        page, seen = self._page, 0
        while not self._stop.wait(PERIOD_S):
            page.beat()
            token = page.token()
            if token != seen and not token & 1:
                page.ack(token)
                seen = token
            if self._watchdog_ended() and not page.closing and not self._stop.is_set():
                self._die()

    def _watchdog_ended(self) -> bool:
        # Readable as soon as the process has ended, whether or not its parent has taken notice.
        return self._watchdog >= 0 and bool(self._poll.poll(0))

    def _die(self) -> None:
        if _lives(self._page.rank_line(0).pid):
            sys.stderr.write("tolaria: the watchdog is gone; this rank ends, so that nothing trains on unwatched\n")
            faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(WATCHDOG_LOST)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
