"""The trainer's side of a question to the policy: sign, send, and take only the answer to exactly that question.

    encode -> seal -> exchange -> [verify MAC -> same run, generation, boundary, question -> decode] -> reply

A frame that fails is counted under its code and does not end the wait, or junk would be a denial of service. The
exception is a reply that is signed, answers this very question, and is still not well-formed: no better one comes.
"""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tolaria.config import TamiyoConfig
from tolaria.errors import MessageRejected, PolicyUnavailable
from tolaria.leyline.codec import ReceivedReply, decode_reply, encode_request
from tolaria.leyline.framing import (
    AUTH_CODES,
    FrameHeader,
    FrameKind,
    KeyRing,
    check_reply,
    load_key_file,
    open_frame,
    request_header,
    seal,
)
from tolaria.leyline.types import EmergencySignal, PolicyRequest
from tolaria.tamiyo.curve import load_client_curve
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.transport import DealerTransport, Transport

MAX_EXAMINED_FRAMES = 64
MAX_EXAMINED_BYTES = 1024 * 1024


class PolicyClient:
    """Asks the policy; lives on rank 0 and belongs to one thread.

    ``rejected`` counts, over the client's life, the frames that were not accepted, by code: those of
    `tolaria.leyline.framing` and its codec, "multipart", and "unread" for frames beyond the limits of one question.
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
    ) -> None:
        self.rejected: Counter[str] = Counter()
        self._transport = transport
        self._keys = keys
        self._run_id = run_id
        self._generation = generation
        self._resend_ms = resend_ms
        self._wall_ns = wall_ns
        self._seq = 0
        self.signal_mark = 0

    def signals(self) -> list[EmergencySignal]:
        """Emergencies that the policy has raised since the last call."""
        return []

    def ask(self, request: PolicyRequest, *, boundary: int, deadline_ms: int) -> ReceivedReply:
        """The policy's reply, its commands still to be decoded one by one. Local; blocks at most ``deadline_ms``.

        Raises PolicyUnavailable; its code is "timeout" when nothing fitting came, "auth" when nothing came but
        frames of another key or protocol, "schema" for a signed but malformed reply, "flood", "transport", or
        "request" when the question itself could not be encoded. The next question starts on a fresh connection
        after any of them.
        """
        try:
            payload = encode_request(request)
        except MessageRejected as error:
            raise PolicyUnavailable("request", f"the state cannot be sent: {error}") from error
        self._seq += 1
        header = request_header(
            run_id=self._run_id, generation=self._generation, boundary=boundary, seq=self._seq,
            payload=payload, wall_ns=self._wall_ns(),
        )  # fmt: skip
        open_question = _OpenQuestion(header, self._keys, self.rejected)
        frame = seal(header, payload, self._keys)
        try:
            return self._transport.exchange(
                frame, open_question.accept, deadline_s=deadline_ms / 1000, resend_s=self._resend_ms / 1000
            )
        except PolicyUnavailable as error:
            if error.code == "timeout" and open_question.auth_failure is not None:
                raise PolicyUnavailable("auth", f"{error}; {open_question.auth_failure}") from error
            raise

    def close(self) -> None:
        """Drop the connection at once."""
        self._transport.close()


class _Limit:
    """How many frames, of how many bytes, are examined for one question."""

    def __init__(self) -> None:
        self._frames = MAX_EXAMINED_FRAMES
        self._bytes = MAX_EXAMINED_BYTES

    def spend(self, size: int) -> bool:
        """Whether one more frame of this size is within the limit."""
        self._frames -= 1
        self._bytes -= size
        return self._frames >= 0 and self._bytes >= 0


class _OpenQuestion:
    """Judges the frames that come while one question is open."""

    def __init__(self, header: FrameHeader, keys: KeyRing, rejected: Counter[str]) -> None:
        self.auth_failure: MessageRejected | None = None
        self._header = header
        self._keys = keys
        self._rejected = rejected
        self._addressed = _Limit()
        self._foreign = _Limit()

    def accept(self, raw: bytes | None) -> ReceivedReply | None:
        """The reply, None to wait on. Raises PolicyUnavailable("schema" or "flood") to end the wait."""
        if raw is None:
            self._rejected["multipart"] += 1
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
            return decode_reply(frame.payload)
        except MessageRejected as error:
            self._rejected[error.code] += 1
            raise PolicyUnavailable("schema", f"the policy's reply is malformed: {error}") from error


def open_client(
    config: TamiyoConfig, *, run_id: str, generation: str, endpoint: str = "", key_file: str | Path = ""
) -> PolicyClient:
    """A client as configured; ``endpoint`` and ``key_file`` are those of an embedded policy, if that is used.

    Connects at the first question only. Raises ConfigError for an endpoint or key that cannot be used.
    """
    url = endpoint or config.endpoint
    keys = load_key_file(key_file or config.key_file)
    curve = load_client_curve(config.curve_server_key_file, config.curve_secret_file)
    transport = DealerTransport(parse_endpoint(url, "tamiyo.endpoint"), curve)
    return PolicyClient(transport, keys, run_id=run_id, generation=generation, resend_ms=config.resend_ms)
