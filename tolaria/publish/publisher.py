"""A run's telemetry over ZeroMQ PUB: a sink of which subscribers come and go, none of whom the run waits for.

    frame 1    INFO | WARNING | ERROR | CRITICAL | CRITICAL.AGAIN, to subscribe by
    frame 2    a TelemetryPacket

A subscriber that does not read loses packets once its queue is full, and sees it by their numbers. Critical ones are
therefore sent again, as they were, after 1, 2, 4, ... and then every 60 seconds, and once more at the end: who reads
again, or comes late, has them within a minute, and knows them by their numbers. Packets are neither signed nor
encrypted: an endpoint is a file that only its user can open, or on the loopback.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import zmq

from tolaria.errors import ConfigError
from tolaria.leyline.codec import encode_telemetry
from tolaria.leyline.types import TelemetryLevel
from tolaria.leyline.types_telemetry import TelemetryPacket
from tolaria.tamiyo.endpoint import Endpoint, parse_endpoint, require_free
from tolaria.telemetry.sinks.record import Record

KEY = "telemetry.publish"
LINGER_MS = 1000
BIND_S = 5.0
AGAIN = b"CRITICAL.AGAIN"
AGAIN_AFTER_S = 1.0
LONGEST_S = 60.0
MOST_REPEATED = 64
MAX_SUBSCRIPTION_BYTES = 1024


class Maker(Protocol):
    """What makes packets of records, in order: `PacketMaker`."""

    def make(self, record: Record) -> TelemetryPacket:
        """The packet of a record."""
        ...


class Publisher:
    """Binds ``endpoint``; ``queue_packets``: what is kept for each subscriber, at most.

    Raises ConfigError for an endpoint that is none, is taken, or leaves this machine. Made in one thread and used in
    another; its context is not for processes forked later.
    """

    name = "publish"

    def __init__(
        self, endpoint: str, maker: Maker, *, queue_packets: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        checked = telemetry_endpoint(endpoint, KEY)
        require_free(checked, KEY)
        self._maker = maker
        self._clock = clock
        self._repeated: deque[_Repeated] = deque(maxlen=MOST_REPEATED)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, queue_packets)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION_BYTES)
        self._socket.setsockopt(zmq.IPV6, int(checked.ipv6))
        try:
            self._bind(endpoint)
        except ConfigError:
            self._socket.close(linger=0)
            self._context.term()
            raise

    @property
    def where(self) -> str:
        """Where to subscribe, with the port that a ``*`` became."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def write(self, record: Record) -> None:
        """Send the record's packet to whoever has room for it."""
        packet = self._maker.make(record)
        raw = encode_telemetry(packet)
        self._socket.send_multipart([packet.level.name.encode(), raw])
        if packet.level is TelemetryLevel.CRITICAL:
            self._repeated.append(_Repeated(raw, self._clock() + AGAIN_AFTER_S))

    def flush(self) -> None:
        """Send again what is critical and due."""
        now = self._clock()
        for entry in self._repeated:
            if now >= entry.due:
                self._socket.send_multipart([AGAIN, entry.raw])
                entry.wait_s = min(2 * entry.wait_s, LONGEST_S)
                entry.due = now + entry.wait_s

    def close(self) -> None:
        """Unbind, after subscribers had LINGER_MS to take what is kept for them."""
        for entry in self._repeated:
            self._socket.send_multipart([AGAIN, entry.raw])
        self._socket.close(linger=LINGER_MS)
        self._context.term()

    def _bind(self, endpoint: str) -> None:
        deadline = time.monotonic() + BIND_S
        while True:
            try:
                self._socket.bind(endpoint)
            except zmq.ZMQError as error:
                # The start before may only be ending.
                if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                    raise ConfigError(f"{KEY}={endpoint!r}: cannot bind ({error})") from error
            else:
                return
            time.sleep(0.1)


class _Repeated:
    """A critical packet, when it is to be sent again, and how long after that."""

    def __init__(self, raw: bytes, due: float) -> None:
        self.raw = raw
        self.due = due
        self.wait_s = AGAIN_AFTER_S


def telemetry_endpoint(url: str, key: str) -> Endpoint:
    """A checked endpoint on this machine. ``key`` names the setting in the ConfigError."""
    endpoint = parse_endpoint(url, key)
    if endpoint.leaves_host:
        raise ConfigError(
            f"{key}={url!r}: telemetry is not encrypted; expected ipc://PATH or tcp://127.0.0.1:PORT, and ssh -L from "
            "other hosts"
        )
    return endpoint
