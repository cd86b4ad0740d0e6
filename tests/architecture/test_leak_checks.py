"""The checks in tests/conftest.py do fire: each kind of leak fails its test, and a hang shows its stack."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
ROOT = CONFTEST.parents[1]

LEAKY = """
import os, signal, subprocess, sys, threading, time
import pytest, torch.distributed as dist

LATER = threading.Event()

def test_environment(): os.environ["LEAKED"] = "1"
def test_environment_was_restored(): assert "LEAKED" not in os.environ
def test_handler(): signal.signal(signal.SIGTERM, lambda *_: None)
def test_thread(): threading.Thread(target=LATER.wait, name="leaky", daemon=True).start()
def test_process(): globals()["kept"] = subprocess.Popen(["sleep", "60"])
def test_process_was_killed(): assert kept.poll() is not None
def test_orphan():
    code = "import subprocess; subprocess.Popen(['sleep', '61'])"
    subprocess.run([sys.executable, "-c", code], check=True)
def test_process_group(): dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def test_process_group_was_destroyed(): assert not dist.is_initialized()
def test_file(tmp_path): open(tmp_path / "a", "w").write("a")
@pytest.mark.timeout(1)
def test_hang(): time.sleep(30)
def test_clean(): LATER.set()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("leaky")
    (folder / "conftest.py").write_text(CONFTEST.read_text().replace("GRACE_S = 3.0", "GRACE_S = 0.3"))
    (folder / "test_leaky.py").write_text(LEAKY)
    (folder / "pytest.ini").write_text("[pytest]\ntimeout = 60\nfilterwarnings = error\n")
    arguments = ["-m", "pytest", "-rA", "-p", "no:cacheprovider", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for what conftest.py imports from tests/
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=folder, env=environment, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("environment", "environment variable LEAKED: None -> '1'"),
        ("handler", "handler of SIGTERM"),
        ("thread", "thread leaky"),
        ("process", "sleep 60"),
        ("orphan", "sleep 61"),
        ("process_group", "a torch.distributed process group"),
    ],
)
def test_a_leak_fails_the_test_and_is_named(report: str, name: str, told: str) -> None:
    assert f"ERROR test_leaky.py::test_{name} - Failed: left behind" in report
    assert told in report


def test_an_unclosed_file_fails_the_test(report: str) -> None:
    assert "FAILED test_leaky.py::test_file" in report
    assert "unclosed file" in report


@pytest.mark.parametrize(
    "name", ["environment_was_restored", "process_was_killed", "process_group_was_destroyed", "clean"]
)
def test_the_next_test_starts_clean(report: str, name: str) -> None:
    assert f"PASSED test_leaky.py::test_{name}\n" in report


def test_a_hanging_test_shows_its_stack_and_fails(report: str) -> None:
    assert "FAILED test_leaky.py::test_hang - Failed: Timeout" in report
    dump = report.partition("most recent call first")[2]
    assert "in test_hang" in dump
