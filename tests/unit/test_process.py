"""A rank dies with its agent; signals only set a flag."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tolaria.process import StopFlag, agent_id, boot_id, set_parent_death_signal, start_time

DEADLINE_S = 20

CHILD = """
import os, sys, time
from tolaria.process import set_parent_death_signal
assert set_parent_death_signal(int(sys.argv[1]) if len(sys.argv) > 1 else None)
print(os.getpid(), flush=True)
time.sleep(60)
"""

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.getcwd()}


def is_running(pid: int) -> bool:
    """False also for one that is dead and not yet waited for by its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.processes
def test_a_child_dies_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, env=environment(), text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + DEADLINE_S
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child)


@pytest.mark.processes
def test_a_child_whose_parent_is_gone_already_dies_at_once() -> None:
    not_its_parent = "1"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, not_its_parent], env=environment(), capture_output=True, timeout=DEADLINE_S,
        check=False,
    )  # fmt: skip
    assert (child.returncode, child.stdout) == (-signal.SIGKILL, b"")


def test_elsewhere_than_linux_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert set_parent_death_signal() is False


def test_a_process_is_named_by_id_start_and_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert agent_id() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert agent_id() == f"{os.getppid()}-{start_time(os.getppid())}-{boot_id()}"
    assert start_time(os.getpid()) > start_time(1) >= 0
    assert start_time(2**22 + 1) == 0


@pytest.mark.processes
def test_a_program_name_with_spaces_and_parentheses_does_not_confuse_the_start_time(tmp_path: Path) -> None:
    odd = tmp_path / "a) 1 2 (b"
    odd.symlink_to("/bin/sleep")
    process = subprocess.Popen([odd, "60"])
    try:
        deadline = time.monotonic() + DEADLINE_S
        while "a) 1" not in Path(f"/proc/{process.pid}/stat").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert start_time(process.pid) >= start_time(os.getpid())
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_a_second_one_changes_nothing(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.is_set and stop.signal_name is None
        signal.raise_signal(number)
        assert stop.is_set and stop.signal_name == number.name
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal_name == number.name
    assert signal.getsignal(number) is former
    assert stop.is_set, "what was asked for stays asked for"
    stop.close()
    assert signal.getsignal(number) is former


def test_the_flag_is_taken_once_and_in_the_main_thread_only() -> None:
    errors: list[str] = []

    def install_elsewhere() -> None:
        with pytest.raises(RuntimeError) as caught:
            StopFlag().install()
        errors.append(str(caught.value))

    thread = threading.Thread(target=install_elsewhere)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main thread" in errors[0]
    with StopFlag() as stop, pytest.raises(RuntimeError, match="once"):
        stop.install()
