"""A run's telemetry over ZeroMQ PUB: a sink of which subscribers come and go, none of whom the run waits for.

    frame 1    INFO | WARNING | ERROR | CRITICAL, to subscribe by
    frame 2    a TelemetryPacket

A subscriber that does not read loses packets once its queue is full, and sees it by their numbers. A critical packet
for which somebody has had no room is sent again, with the number it had, when everybody has room; so one may come
twice. Packets are neither signed nor encrypted: an endpoint is a file that only its user can open, or on the loopback.
"""

import time
from collections import deque
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
MOST_OWED = 256
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

    def __init__(self, endpoint: str, maker: Maker, *, queue_packets: int) -> None:
        checked = telemetry_endpoint(endpoint, KEY)
        require_free(checked, KEY)
        self._maker = maker
        self._owed: deque[list[bytes]] = deque(maxlen=MOST_OWED)
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
    def url(self) -> str:
        """Where to subscribe, with the port that a ``*`` became."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def write(self, record: Record) -> None:
        """Send the record's packet to whoever has room for it."""
        packet = self._maker.make(record)
        frames = [packet.level.name.encode(), encode_telemetry(packet)]
        if packet.level is TelemetryLevel.CRITICAL and not self._to_all(frames):
            self._owed.append(frames)
            self._socket.send_multipart(frames)
        elif packet.level is not TelemetryLevel.CRITICAL:
            self._socket.send_multipart(frames)

    def flush(self) -> None:
        """Send again what was critical and somebody had no room for."""
        while self._owed and self._to_all(self._owed[0]):
            self._owed.popleft()

    def close(self) -> None:
        """Unbind, after subscribers had LINGER_MS to take what is kept for them."""
        self._socket.close(linger=LINGER_MS)
        self._context.term()

    def _to_all(self, frames: list[bytes]) -> bool:
        """Send to all subscribers, or to none and False if one of them has no room."""
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            self._socket.setsockopt(zmq.XPUB_NODROP, 0)
        return True

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


def telemetry_endpoint(url: str, key: str) -> Endpoint:
    """A checked endpoint on this machine. ``key`` names the setting in the ConfigError."""
    endpoint = parse_endpoint(url, key)
    if endpoint.leaves_host:
        raise ConfigError(
            f"{key}={url!r}: telemetry is not encrypted; expected ipc://PATH or tcp://127.0.0.1:PORT, and ssh -L from "
            "other hosts"
        )
    return endpoint
