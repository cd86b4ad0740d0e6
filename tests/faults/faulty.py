"""`python -m tests.faults.faulty FLAGS`: tolaria.launch, with a fault at a chosen place of it.

TOLARIA_FI="place:rank:nth:action" (several with ";"): on that rank, the nth time the place is passed, the action
happens, once per run directory: a file ``struck-<place>-<rank>`` in TOLARIA_FI_DIR says so, and a start that finds it
goes on unharmed ("always-kill" strikes in every start).
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tolaria import launch

PLACES = {
    "decided": ("tolaria.recovery.journal:Journal.decided", "after"),
    "applying": ("tolaria.recovery.journal:Journal.applied", "before"),
    "applied": ("tolaria.recovery.journal:Journal.applied", "after"),
    "asked": ("tolaria.recovery.journal:Journal.act", "after"),
    "acted": ("tolaria.recovery.journal:Journal.acted", "before"),
    "void": ("tolaria.recovery.journal:Journal.went_back", "after"),
    "restoring": ("tolaria.rollback:Rollback._swap_in", "after"),
    "loading": ("tolaria.state:TrainState.load", "after"),
    "renaming": ("tolaria.recovery.fsops:FileOps.rename", "before"),
    "renamed": ("tolaria.recovery.fsops:FileOps.rename", "after"),
    "snapshot": ("tolaria.recovery.arena:Arena.write", "before"),
    "confirmed": ("tolaria.recovery.arena:Arena.validate", "before"),
    "at-step": ("tolaria.state:TrainState.after_step", "after"),
    "step": ("tolaria.state:TrainState.after_step", "after"),
    "fence": ("tolaria.dist:Peers.start_sum", "before"),
    "growing": ("tolaria.kasmina.host:Kasmina.apply", "before"),
    "received": ("tolaria.coordinator.coordinator:decode_decision", "before"),
}
HERE = int(os.environ.get("RANK", "0"))


def strike(action: str, place: str) -> None:
    """Do the harm, and leave word that it was done."""
    (Path(os.environ["TOLARIA_FI_DIR"]) / f"struck-{place}-{HERE}").touch()
    if action.endswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise RuntimeError(f"planted at {place!r}")
    elif action.startswith("lock"):
        ctypes.PyDLL(None).usleep(int(1e6 * float(action[4:])))  # a call by PyDLL keeps the interpreter lock
    elif action == "eat":
        eat()
    elif action != "skip":
        raise ValueError(f"TOLARIA_FI: no action {action!r}")


def eat() -> None:
    """Use more memory than the kernel allows this process, in a control group of its own."""
    group = Path(os.environ["TOLARIA_FI_CGROUP"])
    (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    filled = [bytearray(os.urandom(1 << 20)) for _ in range(1024)]
    raise AssertionError(f"{len(filled)} MiB were to be had")


def plant(place: str, nth: int, action: str) -> None:
    """Wrap a function of the package."""
    where, when = PLACES[place]
    module_name, _, path = where.partition(":")
    owner: Any = __import__(module_name, fromlist=["_"])
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, name)
    passed = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed == nth and when == "before":
            strike(action, place)
            if action == "skip":
                return None
        result = original(*args, **kwargs)
        if place == "at-step":
            passed = args[0].step
        if passed == nth and when == "after":
            strike(action, place)
        return result

    setattr(owner, name, wrapped)


def main() -> int:
    """Plant what is asked for, then launch."""
    for fault in filter(None, os.environ.get("TOLARIA_FI", "").split(";")):
        place, rank, nth, action = fault.split(":")
        struck = (Path(os.environ["TOLARIA_FI_DIR"]) / f"struck-{place}-{HERE}").exists()
        if int(rank) == HERE and (not struck or action.startswith("always")):
            plant(place, int(nth), action)
    return launch.main()


if __name__ == "__main__":
    sys.exit(main())
