"""Real ranks for tests: processes that stay alive and run one job after another, so that torch is imported once.

A job is a function ``job(**arguments)`` in a module of tests/, named "tests.dist.jobs:name". It runs on every rank
at once, in the main thread, with the environment that torchrun would set, and returns something JSON can hold.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 90.0


class RankFailed(AssertionError):
    """A rank raised, died or did not answer in time. The text has every rank's error or stacks."""


class RankPool:
    """``world_size`` processes. Rank jobs that fail leave the pool usable; a hang or a death renews it."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers = self._start()

    def _start(self) -> "list[_Worker]":
        return [_Worker(rank) for rank in range(self.world_size)]

    def run(
        self,
        job: str,
        *,
        deadline_s: float = DEADLINE_S,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """Run a job on all ranks; what each returned, by rank. Raises RankFailed."""
        from torch.distributed import TCPStore  # noqa: PLC0415 - slow, and not needed by the workers' parent at import

        if not self._workers:
            self._workers = self._start()
        # The parent holds the store, as torchrun's agent does: a port of the kernel's choice, known to all ranks.
        store = TCPStore("127.0.0.1", 0, self.world_size, is_master=True, wait_for_workers=False)
        end = time.monotonic() + deadline_s
        for worker in self._workers:
            rank_environment = _torchrun_environment(worker.rank, self.world_size, store.port)
            worker.send({"job": job, "arguments": arguments, "environment": rank_environment | dict(environment or {})})
        answers = [worker.receive(end) for worker in self._workers]
        if any(answer is None for answer in answers):
            told = "\n".join(worker.last_words() for worker in self._workers)
            self.close()
            raise RankFailed(f"{job}: a rank died or did not answer within {deadline_s:g} s\n{told}")
        errors = [f"rank {r}: {a['error']}" for r, a in enumerate(answers) if a is not None and "error" in a]
        if errors:
            raise RankFailed("\n".join([job, *errors]))
        return [a["result"] for a in answers if a is not None]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


class _Worker:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        receive, answer = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(answer)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[answer],
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        os.close(answer)
        os.set_blocking(receive, False)
        self._receive = receive
        self._buffer = b""

    def send(self, message: dict[str, Any]) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(message) + "\n")
        stdin.flush()

    def receive(self, end: float) -> dict[str, Any] | None:
        """The next answer; None when the process died or the time is over."""
        while b"\n" not in self._buffer:
            with contextlib.suppress(BlockingIOError):
                chunk = os.read(self._receive, 65536)
                if not chunk:
                    return None
                self._buffer += chunk
                continue
            if time.monotonic() > end:
                return None
            time.sleep(0.002)
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def last_words(self) -> str:
        """The stacks of all its threads, and the end of its output."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        self._log.seek(0)
        return f"--- rank {self.rank} (exit {self._process.poll()})\n{self._log.read()[-8000:]}"

    def close(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._receive)
        self._log.close()


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(answers: IO[str]) -> None:
    """A worker's life: jobs from stdin, answers to the pipe, until stdin ends."""
    import faulthandler  # noqa: PLC0415 - this and the next lines run in the worker only

    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    for line in sys.stdin:
        message = json.loads(line)
        with _environment(message["environment"]):
            try:
                module, name = message["job"].split(":")
                result = getattr(importlib.import_module(module), name)(**message["arguments"])
                answer = {"result": result}
            except BaseException:  # noqa: BLE001 - whatever a job raises is the test's to see, SystemExit too
                answer = {"error": traceback.format_exc()}
            if dist.is_initialized():
                dist.destroy_process_group()
            torch._dynamo.reset()
            torch.compiler.set_stance("default")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        _serve(pipe)
