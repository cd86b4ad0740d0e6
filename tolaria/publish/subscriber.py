"""The other end of `Publisher`: receives a run's packets and counts what did not come."""

from collections import deque
from collections.abc import Collection
from types import TracebackType
from typing import Self

import zmq

from tolaria.errors import MessageRejected
from tolaria.leyline import limits
from tolaria.leyline.codec import decode_telemetry
from tolaria.leyline.types import TelemetryLevel
from tolaria.leyline.types_telemetry import TelemetryPacket
from tolaria.publish.packets import sequence_of
from tolaria.publish.publisher import AGAIN, MOST_REPEATED, telemetry_endpoint

REMEMBERED = 4096
QUEUE_PACKETS = 1000


class Subscriber:
    """Subscribes to ``endpoint``, to packets of ``levels``; it may be there before the run. A context manager.

    ``missed``: packets of a start that were sent since the first received one and did not come; meaningful with all
    levels. ``refused``: messages that were no packets. Raises ConfigError for a bad endpoint.
    """

    def __init__(
        self, endpoint: str, *, levels: Collection[TelemetryLevel] = tuple(TelemetryLevel),
        queue_packets: int = QUEUE_PACKETS,
    ) -> None:  # fmt: skip
        checked = telemetry_endpoint(endpoint, "endpoint")
        self.missed = 0
        self.refused = 0
        self._start = ""
        self._first = 1
        self._newest = 0
        self._gaps: set[int] = set()
        self._repeated: deque[str] = deque(maxlen=2 * MOST_REPEATED)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, queue_packets)
        self._socket.setsockopt(zmq.MAXMSGSIZE, limits.MAX_TELEMETRY_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.setsockopt(zmq.IPV6, int(checked.ipv6))
        for level in levels:
            self._socket.setsockopt(zmq.SUBSCRIBE, level.name.encode())
        self._socket.connect(endpoint)

    def receive(self, timeout_s: float) -> TelemetryPacket | None:
        """The next packet that did not come before, None when none came in time."""
        while self._socket.poll(round(timeout_s * 1000), zmq.POLLIN):
            frames = self._socket.recv_multipart()
            try:
                packet = decode_telemetry(frames[1]) if len(frames) == 2 else None
                fresh = packet is not None and self._is_new(packet.packet_id, again=frames[0] == AGAIN)
            except (MessageRejected, ValueError):
                packet, fresh = None, False
            if packet is None:
                self.refused += 1
            elif fresh:
                return packet
        return None

    def close(self) -> None:
        """Unsubscribe; drops what was not received."""
        self._socket.close(linger=0)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_new(self, packet_id: str, *, again: bool) -> bool:
        start, number = sequence_of(packet_id)
        if again and start != self._start:
            return self._is_first_time(packet_id)  # from before this subscriber came; begins no count
        if start != self._start:
            self._start, self._first, self._newest = start, number, number - 1
            self._gaps.clear()
        if number <= self._newest:
            if number < self._first:
                return self._is_first_time(packet_id)
            late = number in self._gaps
            self._gaps.discard(number)
            self.missed -= late
            return late
        self.missed += number - self._newest - 1
        self._gaps.update(range(max(self._newest + 1, number - REMEMBERED), number))
        self._newest = number
        return not again or self._is_first_time(packet_id)

    def _is_first_time(self, packet_id: str) -> bool:
        first = packet_id not in self._repeated
        self._repeated.append(packet_id)
        return first
