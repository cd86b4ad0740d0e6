"""Sets the watch over this machine's ranks: page, pulse, watchdog, and what each leaves behind when it is ended."""

import faulthandler
import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

from tolaria.config import Config
from tolaria.dist import World
from tolaria.process import agent_id, start_time
from tolaria.recovery.no_page import AnyPage, NoPage
from tolaria.recovery.page import Page
from tolaria.recovery.pulse import Pulse
from tolaria.recovery.watchdog import WatchdogProcess, stack_file
from tolaria.rundir import RunDir
from tolaria.telemetry.events import EventLog

PAGE_NAME = "PAGE"
"""In the run directory: where the page is, for the operator's tool."""


def page_path(config: Config, run: RunDir, world: World) -> Path:
    """The page of this start on this machine."""
    return Path(config.recovery.snapshot_dir) / f"tolaria-{run.run_id[:16]}-{world.generation}-page"


def watch_ranks(config: Config, world: World, run: RunDir, events: EventLog, cleanup: ExitStack) -> AnyPage:
    """Map the page, start the pulse and, where it is wanted, the watchdog; ``cleanup`` ends them. Collective.

    Where the page cannot be mapped on some rank, all ranks go without: the fence alone carries emergencies then.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    page = _map(page_path(config, run, world), local_rank, local_ranks, world, events)
    if page is None:
        return NoPage()
    cleanup.callback(page.close)
    _dump_stacks_on_request(run, world, cleanup)
    page.sign_in(start_time(os.getpid()))
    if local_rank == 0:
        cleanup.callback(page.remove)
        if world.is_coordinator:
            pointer = run.path / PAGE_NAME
            pointer.write_text(f"{page.path}\n")
            pointer.chmod(0o600)
            cleanup.callback(pointer.unlink, missing_ok=True)
        if _wanted(config):
            ranks = [world.global_rank + other for other in range(local_ranks)]
            watchdog = WatchdogProcess(page, limits_of(config), run.path, run.run_id, ranks)
            cleanup.callback(watchdog.close)
    world.peers.barrier()
    pulse = Pulse(page).start()
    cleanup.callback(pulse.stop)
    return page


def limits_of(config: Config) -> dict[str, float]:
    """Seconds by phase, and of silence."""
    watchdog = config.watchdog
    return {
        "heartbeat": watchdog.heartbeat_s, "start": watchdog.start_s, "compile": watchdog.compile_s,
        "step": watchdog.step_s, "boundary": watchdog.boundary_s, "save": watchdog.save_s,
        "restore": watchdog.restore_s, "ending": watchdog.save_s,
    }  # fmt: skip


def _wanted(config: Config) -> bool:
    return config.watchdog.mode == "on" or (config.watchdog.mode == "auto" and agent_id() is not None)


def _map(path: Path, local_rank: int, local_ranks: int, world: World, events: EventLog) -> Page | None:
    page, failure = None, ""
    try:
        if local_rank == 0:
            page = Page.create(path, local_ranks=local_ranks)
    except OSError as error:
        failure = f"{path}: {error.strerror or error}"
    world.peers.barrier()
    try:
        if local_rank != 0:
            page = Page.attach(path, line=2 + local_rank)
    except (OSError, ValueError) as error:
        failure = str(error)
    if world.peers.agree(page is not None):
        return page
    events.emit("page_unavailable", "warning", reason=failure or "another rank could not map it")
    if page is not None:
        page.close()
        page.remove()
    return None


def _dump_stacks_on_request(run: RunDir, world: World, cleanup: ExitStack) -> None:
    """SIGUSR1 writes the stacks of all threads to a file, also while the interpreter lock is held."""
    path = stack_file(run.path, world.global_rank)
    with suppress(FileNotFoundError):
        path.unlink()
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "w")
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)

    def undo() -> None:
        faulthandler.unregister(signal.SIGUSR1)
        file.close()
        if path.stat().st_size == 0:
            path.unlink()

    cleanup.callback(undo)
