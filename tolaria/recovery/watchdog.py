"""The watchdog: one process per machine, outside of every rank's interpreter lock.

    a rank's heart stands still     stopped, or the interpreter lock held       after heartbeat_s
    a phase takes too long          hung collective, loader, compiler           after the phase's limit
    -> which rank is to blame? its stacks to RUN/stacks-r<rank>.txt, an event, SIGKILL; torchrun starts the ranks again
    a level-4 alarm unanswered      the rank is stopped for a moment, which is as good as an answer

It dies with rank 0's process, and the ranks end when it dies: nothing trains on unwatched. No torch here.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from tolaria.process import set_parent_death_signal, start_time
from tolaria.recovery.page import Page, RankLine
from tolaria.telemetry.events import EventLog

PERIOD_S = 0.01  # of looking for alarms
CHECK_S = 0.05  # of looking for stuck ranks
DUMP_WAIT_S = 0.5
ANSWER_S = 0.045  # for a level-4 alarm, before the rank is stopped
STOPPED_S = 0.25
HALT = 4
_WAITS_FOR_OTHERS = re.compile(r"torch/distributed/|/tolaria/(dist|fence)\.py")
_THREAD = re.compile(r"^(?:Current thread|Thread) .*\(most recent call first\):$", re.MULTILINE)


def stack_file(run_dir: Path, rank: int) -> Path:
    """Where a rank's stacks go."""
    return run_dir / f"stacks-r{rank}.txt"


def overdue(line: RankLine, now_ns: int, limits: Mapping[str, float]) -> str | None:
    """Why a rank must not go on like this, None if it may. Pure."""
    silent_s = (now_ns - line.heartbeat_ns) / 1e9
    if silent_s > limits["heartbeat"]:
        return f"no heartbeat for {silent_s:.1f} s: stopped, or one thread holds the interpreter lock"
    limit = limits.get(line.phase.name.lower())
    spent_s = (now_ns - line.since_ns) / 1e9
    if limit is not None and spent_s > limit:
        return f"in {line.phase.name} at step {line.step} for {spent_s:.1f} s, where {limit:g} s are allowed"
    return None


def culprit(
    lines: Mapping[int, RankLine], reasons: Mapping[int, str], stacks: Mapping[int, str], silent: set[int]
) -> int:
    """Which rank is to blame: a silent one, else one that waits for nobody, else the one furthest behind. Pure."""
    for choice in (silent, {r for r in reasons if stacks.get(r) and not waits_for_others(stacks[r])}, set(reasons)):
        if choice:
            return min(choice, key=lambda r: (lines[r].step, lines[r].since_ns))
    raise ValueError("nobody is overdue")


def waits_for_others(stacks: str) -> bool:
    """Whether the main thread of these stacks is in a collective."""
    for part in _THREAD.split(stacks)[1:]:
        if "tolaria/loop.py" in part or "/launch.py" in part or "<module>" in part:
            return bool(_WAITS_FOR_OTHERS.search("\n".join(part.strip().splitlines()[:6])))
    return False


class Watchdog:
    """Watches the ranks on one page until all of them have ended."""

    def __init__(
        self, page: Page, limits: Mapping[str, float], run_dir: Path, events: EventLog, ranks: list[int]
    ) -> None:
        self.page = page
        self.limits = limits
        self.run_dir = run_dir
        self.events = events
        self.ranks = ranks
        self.stop = False
        self._fds: dict[int, int] = {}
        self._token = page.token()
        self._raised_at = 0.0
        self._stopped: dict[int, float] = {}

    def run(self) -> None:
        """Watch. Returns when told to, or when every rank that signed in has ended."""
        checked = time.monotonic()
        alive = self._alive()
        while not self.stop:
            time.sleep(PERIOD_S)
            now = time.monotonic()
            self._mind_alarm(alive)
            if now - checked < CHECK_S:
                continue
            late, checked = now - checked, now
            alive = self._alive()
            if self._fds and not alive:
                return
            if late > 1.0:
                # This process stood still itself: the whole machine did, and the ranks' clocks say nothing.
                time.sleep(1.0)
                checked = time.monotonic()
                continue
            self._check(alive)

    def close(self) -> None:
        """Let stopped ranks go and close what is open."""
        for rank in list(self._stopped):
            self._signal(rank, signal.SIGCONT)
        for fd in self._fds.values():
            os.close(fd)

    def _alive(self) -> list[int]:
        for rank in range(self.page.ranks):
            line = self.page.rank_line(rank)
            if rank not in self._fds and line.pid and line.start_time == start_time(line.pid):
                with suppress(ProcessLookupError):
                    self._fds[rank] = os.pidfd_open(line.pid)
        poll = select.poll()
        for fd in self._fds.values():
            poll.register(fd, select.POLLIN)
        ended = {fd for fd, _ in poll.poll(0)}
        return [rank for rank, fd in self._fds.items() if fd not in ended]

    def _check(self, alive: list[int]) -> None:
        now = time.monotonic_ns()
        lines = {rank: self.page.rank_line(rank) for rank in alive}
        reasons = {rank: reason for rank, line in lines.items() if (reason := overdue(line, now, self.limits))}
        if not reasons or self.page.closing:
            return
        beat = self.limits["heartbeat"]
        silent = {rank for rank in reasons if (now - lines[rank].heartbeat_ns) / 1e9 > beat}
        stacks = self._dump(alive)
        chosen = culprit(lines, reasons, stacks, silent)
        line = lines[chosen]
        path = stack_file(self.run_dir, self.ranks[chosen])
        told = str(path) if stacks[chosen] else "none: the process is stopped or cannot run signal handlers"
        self.events.emit(
            "rank_stuck", "critical", stuck_rank=self.ranks[chosen], phase=line.phase.name, at_step=line.step,
            reason=reasons[chosen], pid=line.pid, stacks=told,
        )  # fmt: skip
        sys.stderr.write(f"tolaria: watchdog: rank {self.ranks[chosen]} {reasons[chosen]}; ended. Stacks: {told}\n")
        sys.stderr.flush()
        self._signal(chosen, signal.SIGKILL)
        is_gone = select.poll()
        is_gone.register(self._fds[chosen], select.POLLIN)
        is_gone.poll(5000)

    def _dump(self, alive: list[int]) -> dict[int, str]:
        """Have every rank write its stacks; what each wrote, empty where it could not."""
        before = {rank: self._size(rank) for rank in alive}
        for rank in alive:
            self._signal(rank, signal.SIGUSR1)
        end = time.monotonic() + DUMP_WAIT_S
        while time.monotonic() < end and any(self._size(rank) == before[rank] for rank in alive):
            time.sleep(0.01)
        time.sleep(0.02)  # until the slowest has written its last line
        found = {}
        for rank in alive:
            path = stack_file(self.run_dir, self.ranks[rank])
            found[rank] = path.read_bytes()[before[rank] :].decode(errors="replace") if path.exists() else ""
        return found

    def _size(self, rank: int) -> int:
        path = stack_file(self.run_dir, self.ranks[rank])
        return path.stat().st_size if path.exists() else 0

    def _mind_alarm(self, alive: list[int]) -> None:
        now, token = time.monotonic(), self.page.token()
        if token != self._token:
            self._token, self._raised_at = token, now
        for rank, since in list(self._stopped.items()):
            if now - since > STOPPED_S:
                self._signal(rank, signal.SIGCONT)
                del self._stopped[rank]
        if self.page.level() < HALT or now - self._raised_at < ANSWER_S:
            return
        for rank in alive:
            if self.page.rank_line(rank).ack < self._token and rank not in self._stopped:
                self._signal(rank, signal.SIGSTOP)
                self._stopped[rank] = now
                self.page.ack(self._token, local_rank=rank, stopped=True)

    def _signal(self, rank: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fds[rank], number)


class WatchdogProcess:
    """The watchdog as rank 0 of a machine holds it."""

    def __init__(self, page: Page, limits: Mapping[str, float], run_dir: Path, run_id: str, ranks: list[int]) -> None:
        arguments = {
            "page": str(page.path), "limits": dict(limits), "run_dir": str(run_dir), "run_id": run_id, "ranks": ranks,
            "parent": os.getpid(),
        }  # fmt: skip
        self._page = page
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tolaria.recovery.watchdog", json.dumps(arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        page.watchdog_pid = self.process.pid

    def close(self) -> None:
        """End it and wait until it is gone."""
        self._page.set_closing()
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main(raw: str) -> int:
    """The process: ``raw`` is what `WatchdogProcess` says."""
    arguments = json.loads(raw)
    set_parent_death_signal(arguments["parent"])
    page = Page.attach(Path(arguments["page"]), line=0)
    run_dir = Path(arguments["run_dir"])
    events = EventLog(run_dir / "events.jsonl", -1, run_id=arguments["run_id"])
    watchdog = Watchdog(page, arguments["limits"], run_dir, events, arguments["ranks"])

    def end(number: int, frame: FrameType | None) -> None:
        watchdog.stop = True

    signal.signal(signal.SIGTERM, end)
    # A terminal's Ctrl-C goes to the ranks; this process is to see them end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watchdog.run()
    watchdog.close()
    events.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
