"""ZeroMQ between trainer and policy: a DEALER that asks, a ROUTER that answers, single frames only.

Nothing here looks into a frame. Why the options are what they are: no message may be queued for a peer that is
not there, no close may wait, a silent peer must be noticed, and what a peer can make us hold must be bounded.
libzmq bounds single frames only, therefore a message of several parts is never valid here.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import zmq

from tolaria.errors import ConfigError, PolicyUnavailable
from tolaria.leyline.framing import FrameKind
from tolaria.tamiyo.curve import ClientCurve, Doorkeeper, ServerCurve
from tolaria.tamiyo.endpoint import Endpoint, require_free

MAX_RECEIVED_FRAMES = 65_536
MAX_RECEIVED_BYTES = 64 * 1024 * 1024
RECEIVE_S = 0.005

T = TypeVar("T")
Accept = Callable[[bytes | None], T | None]
Context = zmq.Context[zmq.Socket[bytes]]


class Transport(Protocol):
    """What the client needs: ask once, hand over what comes back."""

    def exchange(self, request: bytes, accept: Accept[T], *, deadline_s: float, resend_s: float) -> T:
        """Send ``request`` and return the first thing that ``accept`` makes of a received frame.

        ``accept`` gets each frame as it comes, None for a message of several parts; it returns None to wait on,
        or raises to give up. After ``resend_s`` without an answer the same bytes are sent once more.
        Blocks at most ``deadline_s``. Raises PolicyUnavailable: "timeout", "flood" (more came than is ever read
        for one answer) or "transport" (the socket failed).
        """
        ...

    def receive(self, take: Callable[[bytes | None], None]) -> None:
        """Hand what has come unasked to ``take``: each frame, None for a message of several parts.

        Does not wait: some microseconds when nothing is there, and about `RECEIVE_S` at most; the rest stays for
        the next call. Does not connect either. Raises PolicyUnavailable: "flood" or "transport".
        """
        ...

    def close(self) -> None:
        """Drop everything at once; nothing unsent is waited for."""
        ...


class DealerTransport:
    """`Transport` over a ZeroMQ DEALER that connects to ``endpoint``. One thread uses it.

    Context and socket are made at the first exchange, so that processes forked before inherit neither. A failed
    exchange closes the socket: late answers, and whatever else a peer has sent, go with it. ``patient``: for a peer on
    this machine whose silence means nothing.
    """

    def __init__(self, endpoint: Endpoint, curve: ClientCurve | None = None, *, patient: bool = False) -> None:
        require_protection(endpoint, curve, "tamiyo.endpoint")
        self._endpoint = endpoint
        self._curve = curve
        self._patient = patient
        self._context: Context | None = None
        self._socket: zmq.Socket[bytes] | None = None

    def exchange(self, request: bytes, accept: Accept[T], *, deadline_s: float, resend_s: float) -> T:
        """See `Transport`."""
        deadline = time.monotonic() + deadline_s
        answer = None
        try:
            answer = self._ask(request, accept, deadline, resend_s)
        except zmq.ZMQError as error:
            raise PolicyUnavailable("transport", f"{self._endpoint.url}: {error}") from error
        finally:
            if answer is None:
                self._drop_socket()
        if answer is None:
            raise PolicyUnavailable("timeout", f"{self._endpoint.url}: no acceptable answer within {deadline_s:g} s")
        return answer

    def receive(self, take: Callable[[bytes | None], None]) -> None:
        """See `Transport`."""
        if self._socket is None:
            return
        try:
            # Asking for events is cheaper than a receive that fails, and this runs before every step.
            if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                _read_frames(self._socket, take, _Budget(), time.monotonic() + RECEIVE_S)
        except zmq.ZMQError as error:
            self._drop_socket()
            raise PolicyUnavailable("transport", f"{self._endpoint.url}: {error}") from error
        except PolicyUnavailable:
            self._drop_socket()
            raise

    def post(self, frame: bytes) -> bool:
        """Send without waiting for an answer; False where there is no peer that takes it now. Connects if need be.

        Raises PolicyUnavailable("transport").
        """
        try:
            return _try_send(self._open(), [frame])
        except zmq.ZMQError as error:
            self._drop_socket()
            raise PolicyUnavailable("transport", f"{self._endpoint.url}: {error}") from error

    def connect(self) -> None:
        """Begin to connect, so that a later `post` finds its peer."""
        self._open()

    def _ask(self, request: bytes, accept: Accept[T], deadline: float, resend_s: float) -> T | None:
        """The exchange itself; None when the deadline has passed."""
        budget = _Budget()
        socket = self._open()
        sends_left, send_at, reopened = 2, -math.inf, False
        while (now := time.monotonic()) < deadline:
            due = sends_left > 0 and now >= send_at
            if due and sends_left == 1 and not reopened and not socket.poll(0, zmq.POLLOUT):
                # libzmq gives a connection up for good after a breach of its protocol, such as an oversized frame.
                self._drop_socket()
                socket, reopened = self._open(), True
            # Without a connected peer a DEALER with IMMEDIATE is not writable, so this waits for the connection too.
            wake_at = deadline if due or not sends_left else min(send_at, deadline)
            events = socket.poll(_milliseconds(wake_at - now), zmq.POLLIN | (zmq.POLLOUT if due else 0))
            if due and events & zmq.POLLOUT and _try_send(socket, [request]):
                sends_left, send_at = sends_left - 1, time.monotonic() + resend_s
            if events & zmq.POLLIN:
                answer = _read_frames(socket, accept, budget, deadline)
                if answer is not None:
                    return answer
        return None

    def _open(self) -> "zmq.Socket[bytes]":
        if self._socket is None:
            if self._context is None:
                self._context = zmq.Context()
            socket = self._context.socket(zmq.DEALER)
            _set_options(socket, self._endpoint, FrameKind.REPLY, patient=self._patient)
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            if self._curve is not None:
                self._curve.apply(socket)
            self._socket = socket
            socket.connect(self._endpoint.url)
        return self._socket

    def _drop_socket(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def close(self) -> None:
        """Close socket and context at once."""
        self._drop_socket()
        if self._context is not None:
            self._context.term()
            self._context = None


@dataclass(frozen=True)
class Received:
    """One message at the server: whose it is, and its frame, or None when it had several parts."""

    sender: bytes
    frame: bytes | None


class RouterTransport:
    """The server's side: a ROUTER bound to ``endpoint``. One thread uses it.

    Raises ConfigError when the endpoint cannot be bound, or would be reachable from other hosts without CURVE.
    """

    def __init__(self, endpoint: Endpoint, curve: ServerCurve | None = None, *, patient: bool = False) -> None:
        require_protection(endpoint, curve, "--bind")
        require_free(endpoint, "--bind")
        self._context: Context = zmq.Context()
        self._doorkeeper = None if curve is None else Doorkeeper(self._context, curve)
        self._socket = self._context.socket(zmq.ROUTER)
        _set_options(self._socket, endpoint, FrameKind.REQUEST, patient=patient)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if curve is not None:
            curve.apply(self._socket)
        try:
            self._socket.bind(endpoint.url)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"--bind={endpoint.url!r}: cannot bind ({error})") from error

    @property
    def url(self) -> str:
        """The endpoint as bound, with the port that a ``*`` became."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, timeout_s: float) -> Received | None:
        """The next message, or None when none came within ``timeout_s``."""
        if not self._socket.poll(_milliseconds(timeout_s), zmq.POLLIN):
            return None
        sender = self._socket.recv(zmq.NOBLOCK)
        frame = self._socket.recv(zmq.NOBLOCK) if self._socket.rcvmore else None
        while self._socket.rcvmore:
            frame = None
            self._socket.recv(zmq.NOBLOCK)
        return Received(sender, frame)

    def send(self, receiver: bytes, frame: bytes) -> bool:
        """Queue one frame; False when that peer is gone or does not read."""
        return _try_send(self._socket, [receiver, frame])

    def close(self, *, linger_s: float = 0.0) -> None:
        """Unbind; what is not sent by then is dropped after ``linger_s``."""
        self._socket.close(linger=_milliseconds(linger_s))
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()


def require_protection(endpoint: Endpoint, curve: ClientCurve | ServerCurve | None, key: str) -> None:
    """Raise ConfigError for an endpoint that other hosts can reach without CURVE."""
    if endpoint.leaves_host and curve is None:
        raise ConfigError(
            f"{key}={endpoint.url!r}: an endpoint that is not on the loopback needs CURVE keys; "
            "make them with `python -m tolaria.tamiyo.keys DIR`, or use ipc:// or tcp://127.0.0.1"
        )


class _Budget:
    """What was received for one answer."""

    def __init__(self) -> None:
        self._frames = 0
        self._bytes = 0

    def spend(self, size: int) -> None:
        self._frames += 1
        self._bytes += size
        if self._frames > MAX_RECEIVED_FRAMES or self._bytes > MAX_RECEIVED_BYTES:
            raise PolicyUnavailable("flood", f"{self._frames} frames, {self._bytes} bytes and no acceptable answer")


def _read_frames(socket: "zmq.Socket[bytes]", accept: Accept[T], budget: _Budget, deadline: float) -> T | None:
    """Hand over what has arrived until something is accepted, nothing is left, or the deadline has passed."""
    while time.monotonic() < deadline:
        try:
            frame: bytes | None = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        budget.spend(len(frame or b""))
        while socket.rcvmore:
            frame = None
            budget.spend(len(socket.recv(zmq.NOBLOCK)))
        answer = accept(frame)
        if answer is not None:
            return answer
    return None


def _try_send(socket: "zmq.Socket[bytes]", parts: list[bytes]) -> bool:
    try:
        socket.send_multipart(parts, zmq.NOBLOCK)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
            return False
        raise
    return True


def _set_options(socket: "zmq.Socket[bytes]", endpoint: Endpoint, incoming: FrameKind, *, patient: bool) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 16)
    socket.setsockopt(zmq.RCVHWM, 16)
    socket.setsockopt(zmq.MAXMSGSIZE, incoming.max_frame_bytes)
    if patient:
        # The other side may be starved for seconds on a busy machine, and its end is told by the kernel.
        socket.setsockopt(zmq.HANDSHAKE_IVL, 30_000)
    else:
        socket.setsockopt(zmq.HEARTBEAT_IVL, 250)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 750)
        # In tenths of a second on the wire; libzmq rounds down.
        socket.setsockopt(zmq.HEARTBEAT_TTL, 750)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 1000)
    socket.setsockopt(zmq.IPV6, int(endpoint.ipv6))


def _milliseconds(seconds: float) -> int:
    """For poll: rounded up, so that a wait does not turn into a busy loop just before its end."""
    return max(0, math.ceil(seconds * 1000))
