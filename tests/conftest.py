"""What holds for every test: it leaves nothing behind, and when it hangs it says where.

A test fails when it leaves an environment variable, a signal handler, a thread, a process or a process group; what it
left is removed, so that the next test starts clean. Files and sockets that were not closed fail through
ResourceWarning, since warnings are errors.
"""

import faulthandler
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.faults import matrix
from tests.long import LONG
from tolaria.kasmina import blueprints

MARK = "TOLARIA_TEST_SESSION"  # inherited by everything that a test starts, also once its parent is gone
GRACE_S = 3.0  # a stopped thread or process may need a moment to be gone
DUMP_BEFORE_DEADLINE_S = 5.0
WATCHED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)

# Set once per process by torch and Python themselves, not by a test.
LASTING_VARIABLES = {
    "PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "KMP_DUPLICATE_LIB_OK",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}  # fmt: skip
LASTING_THREADS = {"tqdm_monitor"}  # torch.fx counts its nodes with tqdm where that is installed
LASTING_PROCESSES = ("multiprocessing.resource_tracker", "torch/_inductor/compile_worker", "torch._inductor")

Found = TypeVar("Found")
stderr_fd = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault(MARK, secrets.token_hex(8))
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # lets SIGABRT show the stacks of a process that is left behind
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[stderr_fd] = os.dup(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="the tests that the whole suite leaves out, but for the faults"
    )
    parser.addoption("--faults", action="store_true", help="the rows of the fault matrix only, with a table at the end")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`--faults` keeps the tests of the matrix; without it the longest of them are left out."""
    if config.getoption("--faults"):
        wanted = [item for item in items if matrix.rows_of(item.nodeid)]
    elif config.getoption("--long"):
        wanted = [item for item in items if item.nodeid.startswith(LONG)]
    else:
        named = config.args != config.getini("testpaths")
        wanted = [item for item in items if named or not item.nodeid.startswith((*matrix.LONG, *LONG))]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The fault matrix: what was expected, whether it was so, how long it took."""
    if not config.getoption("--faults"):
        return
    seen: dict[int, matrix.Seen] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for row in matrix.rows_of(report.nodeid):
                found = seen.setdefault(row.number, matrix.Seen())
                found.passed += outcome == "passed"
                found.failed += outcome in ("failed", "error")
                found.skipped += outcome == "skipped"
                found.seconds += report.duration
                found.counted += [str(text) for name, text in report.user_properties if name == matrix.COUNTED]
    terminalreporter.section("fault matrix")
    for line in matrix.table(seen):
        terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[stderr_fd])


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shortly before pytest-timeout ends the test: the stack of every thread, also where no Python code runs."""
    marker = request.node.get_closest_marker("timeout")
    limit_s = float(marker.args[0] if marker and marker.args else request.config.getini("timeout"))
    dump_after_s = max(limit_s - DUMP_BEFORE_DEADLINE_S, limit_s / 2)
    faulthandler.dump_traceback_later(dump_after_s, file=request.config.stash[stderr_fd])
    yield
    faulthandler.cancel_dump_traceback_later()


@dataclass(frozen=True)
class Held:
    """What this process holds at one moment."""

    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    handlers: dict[int, Any] = field(default_factory=lambda: {s: signal.getsignal(s) for s in WATCHED_SIGNALS})
    threads: frozenset[threading.Thread] = field(default_factory=lambda: frozenset(threading.enumerate()))
    pids: frozenset[int] = field(default_factory=lambda: frozenset(psutil.pids()))
    process_group: bool = field(default_factory=dist.is_initialized)


def changed_variables(before: Held) -> list[str]:
    now, then = dict(os.environ), before.environment
    return sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k) and k not in LASTING_VARIABLES)


def new_threads(before: Held) -> list[threading.Thread]:
    new = (thread for thread in threading.enumerate() if thread not in before.threads and thread.is_alive())
    return [thread for thread in new if thread.name not in LASTING_THREADS]


def belongs_to_this_session(process: psutil.Process) -> bool:
    try:
        if any(part in word for part in LASTING_PROCESSES for word in process.cmdline()):
            return False
        # A forked child shows the environment that this process was started with, so ask for its parent as well.
        return process.ppid() == os.getpid() or process.environ().get(MARK) == os.environ.get(MARK)
    except psutil.Error:
        return False  # gone by now, or somebody else's


def new_processes(before: Held) -> list[psutil.Process]:
    found = []
    for pid in set(psutil.pids()) - before.pids - {os.getpid()}:
        try:
            process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            continue
        if belongs_to_this_session(process):
            found.append(process)
    return found


def after_grace(find: Callable[[Held], list[Found]], before: Held) -> list[Found]:
    end = time.monotonic() + GRACE_S
    while (found := find(before)) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def end_processes(processes: list[psutil.Process]) -> list[str]:
    """Kill them, after SIGABRT let Python ones print their stacks; returns one description each."""
    told = []
    for process in processes:
        try:
            told.append(f"process {process.pid} ({process.status()}): {' '.join(process.cmdline())[:200]}")
            process.send_signal(signal.SIGABRT)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=2)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=2)
    return told


def restore(before: Held) -> list[str]:
    """Undo what a test changed; returns one description of each leak."""
    leaks = []
    for name in changed_variables(before):
        leaks.append(f"environment variable {name}: {before.environment.get(name)!r} -> {os.environ.get(name)!r}")
        os.environ.pop(name, None)
        if name in before.environment:
            os.environ[name] = before.environment[name]
    for number, handler in before.handlers.items():
        if signal.getsignal(number) is not handler:
            leaks.append(f"handler of {signal.Signals(number).name}: {signal.getsignal(number)}")
            signal.signal(number, handler)
    if dist.is_initialized() and not before.process_group:
        leaks.append("a torch.distributed process group")
        dist.destroy_process_group()
    leaks += [f"thread {thread.name}" for thread in after_grace(new_threads, before)]
    leaks += end_processes(after_grace(new_processes, before))
    return leaks


@pytest.fixture(autouse=True, scope="module")
def blueprints_of_this_file() -> Iterator[None]:
    """What a file's fixtures register is not there for the next file."""
    with _same_blueprints():
        yield


@pytest.fixture(autouse=True)
def blueprints_of_this_test(blueprints_of_this_file: None) -> Iterator[None]:
    """What a test registers, or a task that it makes, is not there for the next one."""
    with _same_blueprints():
        yield


@contextmanager
def _same_blueprints() -> Iterator[None]:
    before = dict(blueprints._BLUEPRINTS)
    yield
    blueprints._BLUEPRINTS.clear()
    blueprints._BLUEPRINTS.update(before)


@pytest.fixture(autouse=True)
def nothing_left_behind(deadline: None) -> Iterator[None]:
    """Fail the test that leaves something behind, and remove what it left."""
    torch.set_num_threads(1)
    before = Held()
    yield
    leaks = restore(before)
    if leaks:
        pytest.fail("left behind:\n  " + "\n  ".join(leaks), pytrace=False)
