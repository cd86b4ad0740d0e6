"""The embedded policy: the policy server as a child process of rank 0, over a socket only this user can reach.

The child is killed by the kernel when the thread that started it ends, so it never outlives rank 0, whatever kills
that one. It is in a session of its own: Ctrl-C and torchrun's SIGTERM are for the trainer, which still has a
boundary to ask about when they come.
"""

import json
import logging
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tolaria.errors import ConfigError, PolicyUnavailable, RunDirError
from tolaria.tamiyo.socketdir import SocketDir

log = logging.getLogger("tolaria.tamiyo")

STOP_GRACE_S = 2.0
MAX_RESTARTS = 3


class EmbeddedPolicy:
    """Starts the policy server ``spec`` with ``args``; rank 0 only. A context manager.

    Construct it in the main thread, or in one that lives as long as the run: the child dies with that thread.
    Returns while the child is still starting; `wait_ready` tells whether it came up. The child's log goes to
    ``log_path`` (appended, 0600), or to a file that vanishes with the run. ``base_dir``: where the socket's
    directory is made. Raises RunDirError.
    """

    def __init__(
        self,
        spec: str,
        args: Mapping[str, Any] | None = None,
        *,
        log_path: Path | None = None,
        base_dir: Path | None = None,
    ) -> None:
        self._spec = spec
        self._args = dict(args or {})
        self._directory = SocketDir(base_dir)
        self._log_path = log_path or self._directory.path / "server.log"
        self._restarts = 0
        self._ready = -1
        try:
            self._child = self._start()
        except OSError as error:
            self._directory.close()
            raise RunDirError(f"cannot start the policy server with its log in {self._log_path} ({error})") from error

    @property
    def endpoint(self) -> str:
        """Where `open_client` connects to."""
        return f"ipc://{self._directory.socket_path}"

    @property
    def key_file(self) -> Path:
        """The key file for `open_client`: fresh, for this run only."""
        return self._directory.key_file

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._child.pid

    @property
    def ended(self) -> str | None:
        """None while the server runs; else how it ended, and the last line that it said."""
        code = self._child.poll()
        return None if code is None else f"code {code}, {self._last_words()}"

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Return when the server answers at its endpoint. Local; blocks at most ``timeout_s`` seconds.

        Raises ConfigError with the server's own words when it refused its policy or arguments, and
        PolicyUnavailable("start") when it died otherwise or is not up in time.
        """
        if self._ready < 0:
            return
        readable, _, _ = select.select([self._ready], [], [], timeout_s)
        if not readable:
            raise PolicyUnavailable("start", f"the policy server was not ready within {timeout_s:g} s")
        told = os.read(self._ready, 4096)
        self._close_pipe()
        if not told:
            code = self._child.wait()
            if code == ConfigError.exit_code:
                raise ConfigError(self._last_words())
            raise PolicyUnavailable("start", f"the policy server ended with code {code}: {self._last_words()}")

    def revive(self) -> bool:
        """Start the server again if it has died; True if it did. At most `MAX_RESTARTS` times in a run.

        Does not wait for it: until it is up a question only has to wait a little longer.
        """
        if self._child.poll() is None or self._restarts >= MAX_RESTARTS:
            return False
        self._restarts += 1
        log.warning("the policy server ended with code %s, started again", self._child.returncode)
        self._close_pipe()
        self._child = self._start()
        return True

    def close(self) -> None:
        """Stop the server and remove socket and key. Blocks at most `STOP_GRACE_S` seconds. Safe to call twice."""
        self._close_pipe()
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                # A policy that computes for long does not look at its signals.
                self._child.kill()
                self._child.wait()
        self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        ready, tell = os.pipe()
        command = [sys.executable, "-m", "tolaria.tamiyo.child", str(os.getpid()), "--policy", self._spec]
        command += ["--bind", self.endpoint, "--key-file", str(self.key_file), "--ready-fd", str(tell)]
        for name, value in self._args.items():
            command += ["--arg", f"{name}={json.dumps(value)}"]
        # What the trainer can import the policy's process can import, also from beside a user's script.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            output = os.open(self._log_path, flags, 0o600)
            try:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[tell],
                    env=environment, start_new_session=True,
                )  # fmt: skip
            finally:
                os.close(output)
        except OSError:
            os.close(ready)
            raise
        finally:
            os.close(tell)
        self._ready = ready
        return child

    def _close_pipe(self) -> None:
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1

    def _last_words(self) -> str:
        try:
            lines = self._log_path.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"its log {self._log_path} cannot be read ({error.strerror})"
        return lines[-1] if lines else "it said nothing"
