"""This process among others: who started it, that it dies with its agent, that signals only ask.

A rank under torchrun is orphaned when the agent is killed, and goes on stepping and writing; the kernel can kill
it instead. SIGTERM and SIGINT only set a flag, because a handler that saves or talks to other ranks would do so in
the middle of a collective.
"""

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeAlias

_PR_SET_PDEATHSIG = 1
_STARTTIME_FIELD = 22  # of /proc/PID/stat, counted from 1
_M_THRESHOLDS = (-3, -1)  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
_KEPT_BYTES = 2**30
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


def set_parent_death_signal(parent_pid: int | None = None) -> bool:
    """Have the kernel SIGKILL this process when its parent dies. Local; Linux only: returns False elsewhere.

    ``parent_pid`` is the parent's id where the parent passed it on; without it, only a death during this call is
    noticed, so call it first thing. A parent that is already gone kills this process at once. The signal is tied
    to the parent's *thread* that started this process, and is not inherited by children. For ranks under an agent
    only: a run started from a shell must outlive that shell. Raises OSError when the kernel refuses.
    """
    if sys.platform != "linux":
        return False
    expected = os.getppid() if parent_pid is None else parent_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    if os.getppid() != expected:
        # The parent died before the kernel knew that we care: what would have happened, happens.
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next allocation of its size, instead of giving it back to the kernel.

    A step on the CPU frees its activations and allocates them again; fetching those pages anew took a fifth of the step
    of a small convolutional network, in some processes and not in others. False where the C library is another one.
    Local.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, _KEPT_BYTES) == 1 for option in _M_THRESHOLDS)


def boot_id() -> str:
    """An id of this boot of this machine; process ids and start times mean something only beside it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where this is unknown. With the boot id and the process
    id it names one process for ever, although process ids are used again."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # The second field is the program's name in parentheses, which may itself contain spaces and parentheses.
    fields = line.rpartition(")")[2].split()
    return int(fields[_STARTTIME_FIELD - 3])


def since_start_s() -> float:
    """Seconds since this process was started, to a hundredth; 0 where this is unknown."""
    ticks = start_time(os.getpid())
    if not ticks:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def agent_id() -> str | None:
    """The torchrun agent that started this process, as one word; None without torchrun.

    Ranks that the same agent starts again get the same word, and nobody else does.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = os.getppid()
    return f"{parent}-{start_time(parent)}-{boot_id()}"


@contextmanager
def settled() -> Iterator[None]:
    """Inside, the garbage collector passes over what is there already: with torch that are a million objects, and
    looking through them stops the training thread for 140 ms, at any time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class StopFlag:
    """Set by SIGTERM or SIGINT until closed. Local; create, install and close it in the main thread.

    The handlers set the flag and nothing else; a second signal changes nothing. ``close`` puts the former
    handlers back.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self._signals = tuple(signals)
        self._former: dict[signal.Signals, _Handler] = {}
        self._received: signal.Signals | None = None

    @property
    def is_set(self) -> bool:
        """True once a signal came."""
        return self._received is not None

    @property
    def signal_name(self) -> str | None:
        """Name of the first signal that came."""
        return None if self._received is None else self._received.name

    @property
    def number(self) -> int:
        """Number of the first signal that came, 0 for none."""
        return 0 if self._received is None else int(self._received)

    def install(self) -> Self:
        """Take the signals over. Raises RuntimeError outside the main thread or when installed already."""
        if self._former or threading.current_thread() is not threading.main_thread():
            raise RuntimeError("StopFlag.install: call it once, in the main thread")
        for number in self._signals:
            self._former[number] = signal.signal(number, self._on_signal)
        return self

    def close(self) -> None:
        """Put the former handlers back. The flag keeps its value. Safe to call twice."""
        while self._former:
            number, handler = self._former.popitem()
            # None: a handler that was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number)
