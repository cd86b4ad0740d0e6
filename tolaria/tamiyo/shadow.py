"""A second policy beside the acting one: asked the same question at every boundary, and never obeyed.

boundary n     what came for n - 1 is taken -> the question of n is sent -> the run goes on
boundary n+1   what came for n is taken; if nothing did, it was late, and nobody waits for it any more

Nothing here waits: a question is sent if it can be sent at once, an answer is taken if it is there. A shadow that
hangs, dies, floods or lies costs the run what it costs to notice that.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tolaria.errors import MessageRejected, PolicyUnavailable
from tolaria.leyline.codec import ReceivedReply, decode_reply, encode_request
from tolaria.leyline.framing import (
    FrameHeader,
    FrameKind,
    KeyRing,
    check_reply,
    claims_signal,
    open_frame,
    request_header,
    seal,
)
from tolaria.leyline.types import PolicyRequest
from tolaria.leyline.words import agree, in_words
from tolaria.tamiyo.embedded import EmbeddedPolicy
from tolaria.tamiyo.transport import DealerTransport
from tolaria.telemetry.events import EventLog

MAX_FRAMES = 64
"""Frames between two boundaries; a shadow that sends more is not heard any more."""


@dataclass(frozen=True)
class _Question:
    """``commanded``: what the acting policy answered; None: it did not."""

    header: FrameHeader
    commanded: Sequence[bytes] | None


@dataclass(frozen=True)
class _Next:
    boundary: int
    request: PolicyRequest
    payload: bytes
    commanded: Sequence[bytes] | None


class Shadow:
    """Asks one shadow process and compares. Rank 0 only, one thread, which is never kept waiting.

    ``counts``: "asked"; "answered" in time; "late" (not before the next boundary, or not at all); "compared" (answered,
    and so had the acting policy); "agreed" of those. ``embedded`` is closed by its owner.
    """

    def __init__(
        self,
        embedded: EmbeddedPolicy,
        transport: DealerTransport,
        keys: KeyRing,
        events: EventLog,
        *,
        run_id: str,
        generation: str,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._embedded = embedded
        self._transport = transport
        self._keys = keys
        self._events = events
        self._run_id = run_id
        self._generation = generation
        self._wall_ns = wall_ns
        self._seq = 0
        self._frames = 0
        self._open: _Question | None = None
        self._next: _Next | None = None
        self._heard = True
        self._given_up = False
        transport.connect()

    def hold(self, boundary: int, request: PolicyRequest, payload: bytes, commanded: Sequence[bytes] | None) -> None:
        """What `ask` is to ask. ``payload``: the encoded request where there is one; ``commanded``: see `_Question`."""
        self._next = _Next(boundary, request, payload, commanded)

    def ask(self) -> None:
        """Take the answer to the last question, if it came, and send the one held. Does not wait; never raises."""
        self.collect()
        if self._open is not None:
            self.counts["late"] += 1
            self._silent(f"no answer to boundary {self._open.header.boundary} before the next")
            self._open = None
        held, self._next = self._next, None
        if held is None or self._given_up:
            return
        try:
            self._send(held)
        except (MessageRejected, PolicyUnavailable) as error:
            self._silent(str(error))

    def collect(self) -> None:
        """Take the answer if it is there. Does not wait; never raises."""
        self._frames = 0
        try:
            self._transport.receive(self._take)
        except PolicyUnavailable as error:
            self._silent(str(error))
        if self._frames > MAX_FRAMES and not self._given_up:
            self._given_up, self._heard = True, True  # told also where its silence was told before
            self._silent(f"more than {MAX_FRAMES} frames between two boundaries; it is not heard any more")
            self._transport.close()

    def close(self) -> None:
        """Drop the connection at once."""
        self._transport.close()

    def _send(self, held: _Next) -> None:
        payload = held.payload or encode_request(held.request)
        self._seq += 1
        header = request_header(
            run_id=self._run_id, generation=self._generation, boundary=held.boundary, seq=self._seq, payload=payload,
            wall_ns=self._wall_ns(),
        )  # fmt: skip
        self.counts["asked"] += 1
        if self._transport.post(seal(header, payload, self._keys)):
            self._open = _Question(header, held.commanded)
        else:
            self.counts["late"] += 1
            self._silent("it takes no question")

    def _take(self, raw: bytes | None) -> None:
        self._frames += 1
        if self._frames > MAX_FRAMES or raw is None or self._open is None or claims_signal(raw):
            return
        try:
            frame = open_frame(raw, self._keys, FrameKind.REPLY)
            check_reply(self._open.header, frame.header)
            reply = decode_reply(frame.payload)
        except MessageRejected:
            return  # what is no answer to the open question is worth nothing here
        asked, self._open, self._heard = self._open, None, True
        self.counts["answered"] += 1
        self._tell(asked, reply, max(0, frame.header.wall_ns - asked.header.wall_ns) / 1e6)

    def _tell(self, asked: _Question, reply: ReceivedReply, answer_ms: float) -> None:
        agrees = None if asked.commanded is None else agree(asked.commanded, reply.commands)
        if agrees is not None:
            self.counts["compared"] += 1
            self.counts["agreed"] += agrees
        self._events.note(
            "shadow_answered", boundary=asked.header.boundary, agrees=agrees, version=reply.policy_version,
            commanded=None if asked.commanded is None else [in_words(raw) for raw in asked.commanded],
            would_command=[in_words(raw) for raw in reply.commands],
            commands=[raw.hex() for raw in reply.commands], answer_ms=round(answer_ms, 3),
        )  # fmt: skip

    def _silent(self, reason: str) -> None:
        """Told once, until it answers again."""
        if self._heard:
            self._heard = False
            ended = self._embedded.ended
            self._events.note("shadow_silent", "warning", reason=reason if ended is None else f"it has ended: {ended}")
