"""Whole jobs for tests: `torchrun -m tolaria.launch` and its processes, to be aimed at, watched and cleared away.

A job runs in a session of its own and under a mark that all its processes inherit, so that those that lost their
parents are found too. Whoever waits for a job does so with a deadline; when it passes, every process shows the
stacks of its threads, and the job is ended.
"""

import contextlib
import getpass
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

from tolaria.telemetry.events import read_events
from tolaria.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 90.0
POLL_S = 0.01
STACKS_GRACE_S = 3.0
GONE_S = 10.0  # until a killed process, or one that dies with its parent, is gone

_MARK = "TOLARIA_TEST_JOB"
_SOCKET_DIRS = "tolaria-tamiyo-*"

Found = TypeVar("Found")


class JobFailed(AssertionError):
    """What a test waited for did not come. The text has the output of all processes, and their stacks."""


class Job:
    """One start of the launcher: ``command``, which is to use ``run_dir``.

    ``folder`` holds the output and the directory for temporary files; starts that share it continue one run. Its path
    is to be short, for the sake of the sockets in it. ``terminal``: a descriptor to write to in place of a file.
    """

    def __init__(
        self, folder: Path, command: Sequence[str], run_dir: Path, *,
        environment: Mapping[str, str] | None = None, terminal: int | None = None,
    ) -> None:  # fmt: skip
        self.run_dir = run_dir
        self._temporary = folder / "tmp"
        self._temporary.mkdir(exist_ok=True)
        self._token = secrets.token_hex(8)
        self._shared_memory = _shared_memory()
        self._runs: set[str] = set()
        self._output = folder / f"output-{self._token}"
        with self._output.open("wb") as file:
            target = file.fileno() if terminal is None else terminal
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=target, stderr=target, start_new_session=True,
                env={**os.environ, **self._environment(), **dict(environment or {})},
            )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        compiled_code = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(compiled_code),  # not in TMPDIR: compiling everything anew takes minutes
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
            "TMPDIR": str(self._temporary),
            _MARK: self._token,
        }

    # What it did

    @property
    def output(self) -> str:
        """What all its processes have written to stdout and stderr so far."""
        return self._output.read_text(errors="replace")

    def events(self, kind: str, rank: int | None = None) -> list[dict[str, Any]]:
        """The events of one kind so far, of all starts in this folder."""
        path = self.run_dir / "events.jsonl"
        found = list(read_events(path, kind)) if path.exists() else []
        return [event for event in found if rank is None or event["rank"] == rank]

    def last_step(self) -> int:
        """The newest step in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        steps = [int(line["step"]) for line in read_metrics(path)] if path.exists() else []
        return steps[-1] if steps else 0

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        document: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return document

    def checkpoints(self) -> list[str]:
        """Names in the folder of checkpoints."""
        return sorted(path.name for path in (self.run_dir / "ckpt").iterdir())

    # Its processes

    def processes(self) -> list[psutil.Process]:
        """Every living process of the job, also those that lost their parent."""
        return list(_processes_with(self._token))

    def rank(self, rank: int) -> psutil.Process:
        """The process of one rank; waits until there is one."""
        return self.wait_until(lambda: self.find_rank(rank), f"rank {rank}")

    def policy_server(self) -> psutil.Process:
        """The embedded policy server; waits until there is one."""
        return self.wait_until(lambda: self._find("tolaria.tamiyo.child"), "policy server")

    def _find(self, module: str) -> psutil.Process | None:
        return next((p for p in self.processes() if module in _words(p)), None)

    def find_rank(self, rank: int, module: str = "tolaria.launch") -> psutil.Process | None:
        """The process of one rank, None as long as there is none."""
        for process in self.processes():
            words = _words(process)
            if module not in words or "torch.distributed.run" in words:
                continue
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK", "0") == str(rank):
                    return process
        return None

    # Waiting

    def wait_until(self, find: Callable[[], Found | None], what: str, deadline_s: float = DEADLINE_S) -> Found:
        """What ``find`` gives as soon as it is not None. Raises JobFailed at the deadline or when the job ends."""
        end = time.monotonic() + deadline_s
        while True:
            ended = self.process.poll() is not None
            found = find()
            if found is not None:
                return found
            if ended or time.monotonic() > end:
                raise self._failure(f"{what}: {'not before the job ended' if ended else f'not in {deadline_s:g} s'}")
            time.sleep(POLL_S)

    def wait_file(self, path: Path, deadline_s: float = DEADLINE_S) -> None:
        """Until a file is there."""
        self.wait_until(lambda: path.exists() or None, path.name, deadline_s)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """The exit code, negative for a signal. Raises JobFailed when it has not ended by then."""
        try:
            code = self.process.wait(deadline_s)
            self._note_run()
            return code
        except subprocess.TimeoutExpired:
            raise self._failure(f"the job did not end in {deadline_s:g} s") from None

    def finish(self, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """Wait for exit code 0 and return the summary. Raises JobFailed for any other code."""
        code = self.wait(deadline_s)
        if code != 0:
            raise self._failure(f"exit code {code}")
        return self.summary()

    def _failure(self, what: str) -> JobFailed:
        alive = self.processes()
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGABRT)
        psutil.wait_procs(alive, timeout=STACKS_GRACE_S)
        return JobFailed(f"{what}\n{self.output[-20_000:]}")

    # Afterwards

    def left_behind(self) -> list[str]:
        """What the ended job left that it should not have: processes, sockets, shared memory, unfinished files."""
        end = time.monotonic() + GONE_S
        while (found := self._left_now()) and time.monotonic() < end:
            time.sleep(POLL_S)
        return found

    def _left_now(self) -> list[str]:
        found = [f"process {process.pid}: {' '.join(_words(process))}" for process in self.processes()]
        found += [f"socket directory {path}" for path in self._temporary.glob(_SOCKET_DIRS)]
        found += [f"shared memory {name}" for name in self._left_in_memory()]
        found += [f"unfinished {path}" for path in self.run_dir.rglob("*.tmp")]
        return found + [f"unfinished {path}" for path in self.run_dir.rglob("*.trash")]

    def _note_run(self) -> None:
        """Remember which run this is, as long as its directory is there."""
        with contextlib.suppress(FileNotFoundError):
            self._runs.add(json.loads((self.run_dir / "FENCE").read_text())["run_id"][:16])

    def _left_in_memory(self) -> list[str]:
        """New names of this run's; other runs may be on this machine."""
        self._note_run()
        new = sorted(_shared_memory() - self._shared_memory)
        return [name for name in new if any(name.startswith(f"tolaria-{run}-") for run in self._runs)]

    def close(self) -> None:
        """Kill what is left of it."""
        alive = self.processes()
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs([p for p in alive if p.pid != self.process.pid], timeout=GONE_S)
        self.process.wait()
        for name in self._left_in_memory():
            (Path("/dev/shm") / name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_gone(process: psutil.Process, deadline_s: float = GONE_S) -> bool:
    """Whether a process has ended by then; one that only waits to be collected by its parent has."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if not _is_alive(process):
            return True
        time.sleep(POLL_S)
    return False


def launch(folder: Path, flags: Sequence[str], *, ranks: int = 2, max_restarts: int = 0) -> Job:
    """Start `torchrun -m tolaria.launch` with the run directory ``folder/run``; 0 ranks: without torchrun."""
    command = ["-m", "tolaria.launch", *flags, "--run.dir", str(folder / "run")]
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*torchrun, f"--max-restarts={max_restarts}", *command]
    return Job(folder, [sys.executable, *command], folder / "run")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _processes_with(token: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == token and _is_alive(process):
                yield process


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
