"""The trainer's side of a question to the policy: sign, send, and take only the answer to exactly that question.

    encode -> seal -> exchange -> [verify MAC -> same run, generation, boundary, question -> decode] -> reply

Emergencies come unasked through the same connection, before, during and after a question; `tolaria.tamiyo.inbox`
judges them, and they neither answer nor end a question nor use up what is examined for it.

A frame that fails is counted under its code and does not end the wait, or junk would be a denial of service. The
exception is a reply that is signed, answers this very question, and is still not well-formed: no better one comes.
"""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tolaria.config_tamiyo import TamiyoConfig
from tolaria.errors import MessageRejected, PolicyUnavailable
from tolaria.leyline.codec import ReceivedReply, decode_reply, encode_request
from tolaria.leyline.framing import (
    AUTH_CODES,
    FrameHeader,
    FrameKind,
    KeyRing,
    check_reply,
    claims_signal,
    load_key_file,
    open_frame,
    request_header,
    seal,
)
from tolaria.leyline.types import EmergencySignal, PolicyRequest
from tolaria.tamiyo.curve import load_client_curve
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.inbox import Limit, SignalInbox
from tolaria.tamiyo.recording import Keep, What, keep_nothing
from tolaria.tamiyo.transport import DealerTransport, Transport
from tolaria.telemetry.split import Split

MAX_EXAMINED_FRAMES = 64
MAX_EXAMINED_BYTES = 1024 * 1024
# A lost emergency is worse than a few milliseconds of verifying junk that claims to be one.
MAX_EXAMINED_SIGNALS = 1024


class PolicyClient:
    """Asks the policy and hears its emergencies; lives on rank 0 and belongs to one thread.

    ``rejected`` counts, over the client's life, the frames that were not accepted, by code: those of
    `tolaria.leyline.framing` and its codec, "multipart", "unread" for frames beyond the limits of one question,
    "unasked" for frames that came between two questions and are no signals, "flood" and "transport" for connections
    given up between two questions. ``payload`` is that of the newest question, empty before the first. ``keep`` is
    told of each question, and of each frame that was accepted.
    """

    def __init__(
        self,
        transport: Transport,
        keys: KeyRing,
        *,
        run_id: str,
        generation: str,
        resend_ms: int,
        wall_ns: Callable[[], int] = time.time_ns,
        keep: Keep = keep_nothing,
    ) -> None:
        self.rejected: Counter[str] = Counter()
        self.payload = b""
        self._keep = keep
        self._transport = transport
        self._keys = keys
        self._run_id = run_id
        self._generation = generation
        self._resend_ms = resend_ms
        self._wall_ns = wall_ns
        self._seq = 0
        self._inbox = SignalInbox(keys, self.rejected, run_id=run_id, generation=generation, keep=keep)

    @property
    def signal_mark(self) -> int:
        """Mark of the newest emergency accepted; only later ones are. Set it to what an earlier start has seen."""
        return self._inbox.mark

    @signal_mark.setter
    def signal_mark(self, mark: int) -> None:
        self._inbox.mark = mark

    def signals(self) -> list[EmergencySignal]:
        """Emergencies accepted since the last call, in order, also those that came while `ask` waited.

        Local; does not wait: some microseconds when there are none. Never raises. The policy can reach the run from
        the first question until one fails, and again from the next question on.
        """
        try:
            self._transport.receive(self._take_unasked)
        except PolicyUnavailable as error:
            self.rejected[error.code] += 1
        return self._inbox.take()

    def _take_unasked(self, raw: bytes | None) -> None:
        if raw is None:
            self.rejected["multipart"] += 1
        elif claims_signal(raw):
            self._inbox.put(raw)
        else:
            # Most often the second answer to a question that was sent twice.
            self.rejected["unasked"] += 1

    def ask(
        self, request: PolicyRequest, *, boundary: int, deadline_ms: int, split: Split | None = None
    ) -> ReceivedReply:
        """The policy's reply, its commands still to be decoded one by one. Local; blocks at most ``deadline_ms``.

        ``split`` is told what went into "encode" and "round_trip".
        Raises PolicyUnavailable; its code is "timeout" when nothing fitting came, "auth" when nothing came but
        frames of another key or protocol, "schema" for a signed but malformed reply, "flood", "transport", or
        "request" when the question itself could not be encoded. The next question starts on a fresh connection
        after any of them.
        """
        split = split or Split()
        with split.timed("encode"):
            header, frame = self._question(request, boundary)
        self._keep(What.REQUEST, frame)
        open_question = _OpenQuestion(header, self._keys, self.rejected, self._inbox, self._keep)
        try:
            with split.timed("round_trip"):
                return self._transport.exchange(
                    frame, open_question.accept, deadline_s=deadline_ms / 1000, resend_s=self._resend_ms / 1000
                )
        except PolicyUnavailable as error:
            if error.code == "timeout" and open_question.auth_failure is not None:
                raise PolicyUnavailable("auth", f"{error}; {open_question.auth_failure}") from error
            raise

    def _question(self, request: PolicyRequest, boundary: int) -> tuple[FrameHeader, bytes]:
        """Header and signed frame of the next question."""
        self.payload = b""
        try:
            payload = self.payload = encode_request(request)
        except MessageRejected as error:
            raise PolicyUnavailable("request", f"the state cannot be sent: {error}") from error
        self._seq += 1
        header = request_header(
            run_id=self._run_id, generation=self._generation, boundary=boundary, seq=self._seq,
            payload=payload, wall_ns=self._wall_ns(),
        )  # fmt: skip
        return header, seal(header, payload, self._keys)

    def close(self) -> None:
        """Drop the connection at once."""
        self._transport.close()


class _OpenQuestion:
    """Judges the frames that come while one question is open."""

    def __init__(
        self, header: FrameHeader, keys: KeyRing, rejected: Counter[str], inbox: SignalInbox, keep: Keep
    ) -> None:
        self._keep = keep
        self.auth_failure: MessageRejected | None = None
        self._header = header
        self._keys = keys
        self._rejected = rejected
        self._inbox = inbox
        self._addressed = Limit(MAX_EXAMINED_FRAMES, MAX_EXAMINED_BYTES)
        self._foreign = Limit(MAX_EXAMINED_FRAMES, MAX_EXAMINED_BYTES)
        self._signals = Limit(MAX_EXAMINED_SIGNALS, MAX_EXAMINED_BYTES)

    def accept(self, raw: bytes | None) -> ReceivedReply | None:
        """The reply, None to wait on. Raises PolicyUnavailable("schema" or "flood") to end the wait."""
        if raw is None:
            self._rejected["multipart"] += 1
            return None
        if claims_signal(raw):
            if self._signals.spend(len(raw)):
                self._inbox.put(raw)
            else:
                self._rejected["unread"] += 1
            return None
        # Without the question's random id a frame cannot be the answer, and telling so costs next to nothing: the
        # answer is found in a flood of junk, and only who knows the id makes us verify MACs beyond the limit.
        if self._header.corr_id in raw:
            if not self._addressed.spend(len(raw)):
                raise PolicyUnavailable("flood", f"more than {MAX_EXAMINED_FRAMES} false answers to one question")
        elif not self._foreign.spend(len(raw)):
            self._rejected["unread"] += 1
            return None
        try:
            frame = open_frame(raw, self._keys, FrameKind.REPLY)
            check_reply(self._header, frame.header)
        except MessageRejected as error:
            self._rejected[error.code] += 1
            if error.code in AUTH_CODES:
                self.auth_failure = error
            return None
        try:
            reply = decode_reply(frame.payload)
        except MessageRejected as error:
            self._rejected[error.code] += 1
            self._keep(What.MALFORMED, raw)
            raise PolicyUnavailable("schema", f"the policy's reply is malformed: {error}") from error
        self._keep(What.REPLY, raw)
        return reply


def open_client(
    config: TamiyoConfig,
    *,
    run_id: str,
    generation: str,
    endpoint: str = "",
    key_file: str | Path = "",
    keep: Keep = keep_nothing,
) -> PolicyClient:
    """A client as configured; ``endpoint`` and ``key_file`` are those of an embedded policy, if that is used.

    Connects at the first question only. Raises ConfigError for an endpoint or key that cannot be used.
    """
    url = endpoint or config.endpoint
    keys = load_key_file(key_file or config.key_file)
    curve = load_client_curve(config.curve_server_key_file, config.curve_secret_file)
    transport = DealerTransport(parse_endpoint(url, "tamiyo.endpoint"), curve)
    return PolicyClient(transport, keys, run_id=run_id, generation=generation, resend_ms=config.resend_ms, keep=keep)
