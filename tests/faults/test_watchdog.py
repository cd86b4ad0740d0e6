"""The watchdog against real processes that stop, hold the interpreter lock, or take too long."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.torchrun import ROOT
from tolaria.recovery.page import OPERATOR, Page
from tolaria.recovery.pulse import WATCHDOG_LOST
from tolaria.recovery.watchdog import WatchdogProcess, stack_file
from tolaria.telemetry.events import read_events

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]

LIMITS = {"heartbeat": 1.5, "step": 2.0}


@dataclass
class Node:
    """A page, two ranks and a watchdog."""

    page: Page
    ranks: list[subprocess.Popen[bytes]]
    watchdog: WatchdogProcess
    run_dir: Path

    def begin(self) -> None:
        """Let the ranks do what they are for."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(b"\n")
            rank.stdin.flush()

    def stuck(self) -> list[tuple[int, str]]:
        """(rank, reason) of what the watchdog has told."""
        path = self.run_dir / "events.jsonl"
        events = read_events(path, "rank_stuck") if path.exists() else []
        return [(event["stuck_rank"], event["reason"]) for event in events]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def run(*what: str, limits: dict[str, float] = LIMITS) -> Node:
        page = Page.create(tmp_path / "page", local_ranks=len(what))
        watchdog = WatchdogProcess(page, limits, tmp_path, "run", list(range(len(what))))
        ranks = []
        for rank, task in enumerate(what):
            command = [
                sys.executable,
                "-m",
                "tests.faults.rank_without_torch",
                str(page.path),
                str(rank),
                str(tmp_path),
            ]
            ranks.append(subprocess.Popen([*command, task], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE))  # fmt: skip
        nodes.append(Node(page, ranks, watchdog, tmp_path))
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == b"in\n"
        return nodes[-1]

    yield run
    for node in nodes:
        node.watchdog.close()
        for process in node.ranks:
            process.kill()
            process.communicate()
        node.page.close()


def test_a_stopped_rank_is_named_and_ended_and_the_others_are_not(start: Callable[..., Node]) -> None:
    node = start("work", "work")
    node.begin()
    node.ranks[1].send_signal(signal.SIGSTOP)
    assert node.ranks[1].wait(20) == -signal.SIGKILL
    ((rank, reason),) = node.stuck()
    assert rank == 1 and "no heartbeat" in reason
    assert node.ranks[0].poll() is None


def test_a_short_stop_harms_nobody(start: Callable[..., Node]) -> None:
    node = start("work", "work")
    node.begin()
    node.ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(0.8)
    node.ranks[1].send_signal(signal.SIGCONT)
    time.sleep(1.5)
    assert node.stuck() == []
    assert [rank.poll() for rank in node.ranks] == [None, None]


def test_a_rank_that_holds_the_interpreter_lock_is_ended_with_its_stack(start: Callable[..., Node]) -> None:
    node = start("work", "hold")
    node.begin()
    assert node.ranks[1].wait(20) == -signal.SIGKILL
    ((rank, reason),) = node.stuck()
    assert rank == 1 and "interpreter lock" in reason
    assert "rank_without_torch.py" in stack_file(node.run_dir, 1).read_text()


def test_a_phase_that_takes_too_long_ends_the_one_that_waits_for_nobody(start: Callable[..., Node]) -> None:
    node = start("work", "idle")
    node.begin()
    assert node.ranks[1].wait(20) == -signal.SIGKILL
    ((rank, reason),) = node.stuck()
    assert rank == 1 and "in STEP at step 7" in reason


def test_the_ranks_end_when_the_watchdog_dies(start: Callable[..., Node]) -> None:
    node = start("work", "work")
    node.begin()
    node.watchdog.process.kill()
    assert [rank.wait(10) for rank in node.ranks] == [WATCHDOG_LOST, WATCHDOG_LOST]
    assert node.ranks[0].stderr is not None
    assert b"the watchdog is gone" in node.ranks[0].stderr.read()


def test_the_watchdog_ends_with_the_ranks(start: Callable[..., Node]) -> None:
    node = start("work", "work")
    node.begin()
    time.sleep(0.3)
    node.page.set_closing()
    for rank in node.ranks:
        rank.kill()
        rank.wait()
    assert node.watchdog.process.wait(10) == 0


def test_an_alarm_is_acknowledged_by_all_by_the_watchdog_for_one_that_cannot(start: Callable[..., Node]) -> None:
    node = start("work", "hold", limits={"heartbeat": 30.0})
    node.begin()
    time.sleep(0.3)
    operator = Page.attach(node.page.path, line=OPERATOR)
    operator.raise_level(4, "stop")
    token, end = operator.token(), time.monotonic() + 10
    while any(operator.rank_line(r).ack < token for r in range(2)) and time.monotonic() < end:
        time.sleep(0.005)
    assert [operator.rank_line(r).ack for r in range(2)] == [token, token]
    assert [operator.rank_line(r).stopped for r in range(2)] == [False, True]
    holding = psutil.Process(node.ranks[1].pid)
    while holding.status() == psutil.STATUS_STOPPED and time.monotonic() < end:
        time.sleep(0.01)
    assert holding.status() != psutil.STATUS_STOPPED
    operator.close()
