"""Where rank 0 takes orders: a thread of its own with a socket, beside training and never in its way.

    frame -> size, MAC, kind -> this run, this start -> order -> known before? -> waiting, for the training thread
                                                                  answered as before

What is not signed with the run's key gets no answer and is counted. The training thread looks at `waiting`, takes what
there is, and gives the outcome back by `answer`. Without the thread a run trains on, and takes no orders.
"""

import json
import os
import socket as sockets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from tolaria.errors import ConfigError, MessageRejected, RunDirError
from tolaria.leyline.framing import (
    FrameHeader,
    FrameKind,
    KeyRing,
    generation_number,
    load_key_file,
    new_key_file_text,
    open_frame,
    outcome_header,
    run_id_bytes,
    seal,
)
from tolaria.orders.words import EMERGENCY, HELLO, PAUSE, STOP, Order, Outcome, decode_order, encode_outcome
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.socketdir import SocketDir
from tolaria.tamiyo.transport import RouterTransport
from tolaria.telemetry.lines import warn

KEY_NAME = "operator.key"
ADDRESS_NAME = "operator.json"
MAX_WAITING = 64
MAX_REMEMBERED = 256
MAX_REASON = 2000
WAKE_S = 0.1
LINGER_S, CLOSE_S = 1.0, 5.0
"""For the answer to who asked the run to stop, on a busy machine."""
URGENT = frozenset({STOP, PAUSE, EMERGENCY})


class Waiting(NamedTuple):
    """An order that waits to be carried out, and the very frame it came in."""

    order: Order
    frame: bytes


@dataclass
class _Known:
    header: FrameHeader
    sender: bytes
    outcome: Outcome | None = None


class OrderDesk:
    """Rank 0's desk. Made, used and closed by the training thread; `serve` runs in a thread of its own.

    ``done_before``: ids of all orders that were ever carried out, also of those to come; none is carried out again.
    ``hello``: where the run is, from numbers that any thread may read. ``key_file``: looked at again whenever it has
    changed, so that keys are replaced and revoked while the run lives.
    """

    def __init__(
        self,
        run: Path,
        run_id: str,
        generation: str,
        keys: KeyRing,
        *,
        done_before: Container[str],
        hello: Callable[[], Mapping[str, Any]],
        key_file: Path | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.rejected: Counter[str] = Counter()
        self._run = run
        self._run_id = run_id
        self._generation = generation
        self._keys = keys
        self._key_file = key_file
        self._key_file_seen = _signature(key_file)
        self._before = done_before
        self._hello = hello
        self._wall_ns = wall_ns
        self._lock = threading.Lock()
        self._queue: deque[Waiting] = deque()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._outbox: deque[tuple[bytes, bytes]] = deque()
        self._closing = False
        self._folder: SocketDir | None = None
        self._router: RouterTransport | None = None
        self._thread = threading.Thread(target=self._serve, name="orders", daemon=True)

    @property
    def waiting(self) -> bool:
        """Whether an order waits. Any thread; costs nothing."""
        return bool(self._queue)

    def open(self) -> None:
        """Bind, write the address into the run directory, begin to serve. Raises RunDirError, ConfigError."""
        self._folder = SocketDir()
        endpoint = parse_endpoint(f"ipc://{self._folder.socket_path}", "the operator's socket")
        self._router = RouterTransport(endpoint, patient=True)
        address = {
            "endpoint": self._router.url, "generation": self._generation, "run_id": self._run_id, "pid": os.getpid(),
            "host": sockets.gethostname(),
        }  # fmt: skip
        try:
            _write_private(self._run / ADDRESS_NAME, json.dumps(address) + "\n")
        except OSError as error:
            raise RunDirError(f"{self._run / ADDRESS_NAME}: cannot be written ({error.strerror})") from error
        self._thread.start()

    @property
    def urgent(self) -> str:
        """What waits and is not to wait for something long to end, "" for nothing. Any thread."""
        with self._lock:
            return next((w.order.action for w in self._queue if w.order.action in URGENT), "")

    def take(self) -> Waiting | None:
        """The oldest order that waits, None when there is none."""
        with self._lock:
            return self._queue.popleft() if self._queue else None

    def answer(self, outcome: Outcome) -> None:
        """Send an outcome to who asked, now and whenever the same order comes again."""
        with self._lock:
            known = self._known.get(outcome.order_id)
            if known is not None:
                known.outcome = outcome
                self._post(known)

    def close(self) -> None:
        """Send what is left, end the thread, remove socket and address. Safe to call twice."""
        with self._lock:
            self._closing = True
            while self._queue:
                order = self._queue.popleft().order
                known = self._known[order.order_id]
                known.outcome = _refused(order, "ended", "the run ended before it came to this order")
                self._post(known)
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        if self._folder is not None:
            self._remove_address()
            self._folder.close()
            self._folder = None

    def receive(self, raw: bytes | None, sender: bytes) -> None:
        """Judge one received frame. Never raises."""
        try:
            if raw is None:
                raise MessageRejected("multipart", "a message of several parts")
            self._look_at_key_file()
            frame = open_frame(raw, self._keys, FrameKind.ORDER)
            if frame.header.run_id != run_id_bytes(self._run_id):
                raise MessageRejected("run", "an order to another run")
            if frame.header.generation != generation_number(self._generation):
                raise MessageRejected("generation", "an order to another start of the run")
            order = decode_order(frame.payload)
        except MessageRejected as error:
            self.rejected[error.code] += 1
            return
        with self._lock:
            self._take_in(order, _Known(frame.header, sender), raw)

    def _look_at_key_file(self) -> None:
        seen = _signature(self._key_file)
        if self._key_file is None or seen is None or seen == self._key_file_seen:
            return
        self._key_file_seen = seen
        try:
            self._keys = load_key_file(self._key_file)
        except ConfigError as error:
            warn(f"tolaria: {error}; orders are judged by the keys from before")

    def _remove_address(self) -> None:
        """Unless another start has written its own since."""
        path = self._run / ADDRESS_NAME
        with suppress(OSError, ValueError, KeyError, TypeError):
            address = json.loads(path.read_bytes())
            if (address["generation"], address["pid"]) == (self._generation, os.getpid()):
                path.unlink()

    def _take_in(self, order: Order, fresh: _Known, raw: bytes) -> None:
        known = self._known.get(order.order_id)
        if known is not None:
            # Asked again: the newest connection gets the answer, and nothing is done twice.
            known.header, known.sender = fresh.header, fresh.sender
            if known.outcome is not None:
                self._post(known)
            return
        self._known[order.order_id] = fresh
        if order.action == HELLO:
            fresh.outcome = Outcome(
                order_id=order.order_id, state="applied", details={**self._hello(), "waiting": len(self._queue)}
            )
        elif order.order_id in self._before:
            fresh.outcome = _refused(order, "done_before", "an order of this id was carried out before")
        elif self._closing:
            fresh.outcome = _refused(order, "ended", "the run is ending")
        elif len(self._queue) >= MAX_WAITING:
            fresh.outcome = _refused(order, "busy", f"{MAX_WAITING} orders are waiting already")
        if fresh.outcome is not None:
            self._post(fresh)
        else:
            self._queue.append(Waiting(order, raw))
        for order_id in [i for i, k in self._known.items() if k.outcome is not None][: -MAX_REMEMBERED or None]:
            del self._known[order_id]

    def _post(self, known: _Known) -> None:
        assert known.outcome is not None  # noqa: S101 - both callers have just seen it
        try:
            payload = encode_outcome(known.outcome)
        except (MessageRejected, ValueError, TypeError):
            # Training does not end because what it has to say is too long: compilers write whole pages.
            short = known.outcome.reason[:MAX_REASON]
            payload = encode_outcome(replace(known.outcome, reason=short, details={}))
        frame = seal(outcome_header(known.header, wall_ns=self._wall_ns()), payload, self._keys)
        self._outbox.append((known.sender, frame))

    def _serve(self) -> None:
        router = self._router
        if router is None:
            return
        try:
            while not self._closing or self._outbox:
                received = router.receive(0.01 if self._outbox or self._queue else WAKE_S)
                if received is not None:
                    self.receive(received.frame, received.sender)
                while self._outbox:
                    router.send(*self._outbox.popleft())
        except zmq.ZMQError as error:
            warn(f"tolaria: the run takes no more orders ({error}); training goes on")
        finally:
            router.close(linger_s=LINGER_S)


def open_desk(
    run: Path, run_id: str, generation: str, *, done_before: Container[str], hello: Callable[[], Mapping[str, Any]]
) -> OrderDesk:  # fmt: skip
    """The desk of a run that takes orders from now on; its key is made at the run's first start.

    For rank 0. Raises RunDirError, ConfigError.
    """
    key_file = run / KEY_NAME
    try:
        if not key_file.exists():
            _write_private(key_file, new_key_file_text())
    except OSError as error:
        raise RunDirError(f"{key_file}: cannot be written ({error.strerror})") from error
    desk = OrderDesk(
        run, run_id, generation, load_key_file(key_file), done_before=done_before, hello=hello, key_file=key_file
    )  # fmt: skip
    desk.open()
    return desk


def _refused(order: Order, code: str, reason: str) -> Outcome:
    return Outcome(order_id=order.order_id, state="refused", code=code, reason=reason)


def _signature(path: Path | None) -> tuple[int, int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        status = os.stat(path) if path is not None else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ino, status.st_size) if status is not None else None


def _write_private(path: Path, text: str) -> None:
    """A file that nobody but its owner can read, whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(temporary, path)
