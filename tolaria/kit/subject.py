"""Asking a policy as a trainer does, from outside its process: over ZeroMQ, signed, with a deadline that holds."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tolaria.errors import MessageRejected, PolicyUnavailable
from tolaria.leyline.codec import ReceivedReply, decode_reply, encode_request
from tolaria.leyline.framing import (
    FrameHeader,
    FrameKind,
    KeyRing,
    check_reply,
    load_key_file,
    open_frame,
    request_header,
    seal,
)
from tolaria.leyline.types import PolicyRequest
from tolaria.tamiyo.embedded import EmbeddedPolicy
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.transport import DealerTransport

SLICE_S = 0.5
"""How long one try waits; between two it is seen whether the process has died."""
SILENT, DIED = "timeout", "died"
PROBE = "tolaria.kit.probe:Probed"


@dataclass(frozen=True)
class Answer:
    """A reply to one question. ``frame``: as it came; ``question``: as it was sent; ``ms``: until it was there."""

    question: bytes
    header: FrameHeader
    frame: bytes
    reply: ReceivedReply
    ms: float


class Subject:
    """A policy that answers at an endpoint. ``process``: its process where this side started it.

    Questions of different ``run`` go to different instances of the policy.
    """

    def __init__(
        self, endpoint: str, keys: KeyRing, *, deadline_ms: float, process: EmbeddedPolicy | None = None,
        notes: Path | None = None,
    ) -> None:  # fmt: skip
        self._transport = DealerTransport(parse_endpoint(endpoint, "--endpoint"))
        self._keys = keys
        self._deadline_s = deadline_ms / 1000
        self._process = process
        self._notes = notes
        self._seq = 0

    def ask(self, run: str, boundary: int, payload: bytes | PolicyRequest) -> Answer:
        """Put a new question. Blocks for the deadline at most.

        Raises PolicyUnavailable: `SILENT` (no answer in time), `DIED` (its process ended), "transport", "schema".
        """
        encoded = payload if isinstance(payload, bytes) else encode_request(payload)
        self._seq += 1
        header = request_header(
            run_id=run, generation="kit", boundary=boundary, seq=self._seq, payload=encoded, wall_ns=time.time_ns()
        )
        return self._exchange(header, seal(header, encoded, self._keys))

    def again(self, answer: Answer) -> Answer:
        """Put the same question again, byte for byte. Raises as `ask` does."""
        return self._exchange(answer.header, answer.question)

    def send(self, raw: bytes) -> None:
        """Send what is no question."""
        self._transport.post(raw)

    def notes(self) -> list[dict[str, Any]]:
        """What the probe inside the process has noted so far; empty without one."""
        if self._notes is None or not self._notes.exists():
            return []
        return [json.loads(line) for line in self._notes.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def close(self) -> None:
        """Drop the connection."""
        self._transport.close()

    def _exchange(self, header: FrameHeader, raw: bytes) -> Answer:
        start = time.monotonic()

        def accept(frame: bytes | None) -> Answer | None:
            ms = (time.monotonic() - start) * 1000
            try:
                opened = open_frame(frame or b"", self._keys, FrameKind.REPLY)
                check_reply(header, opened.header)
            except MessageRejected:
                return None
            try:
                return Answer(raw, header, frame or b"", decode_reply(opened.payload), ms)
            except MessageRejected as error:
                raise PolicyUnavailable("schema", str(error)) from error

        while True:
            left = self._deadline_s - (time.monotonic() - start)
            try:
                return self._transport.exchange(raw, accept, deadline_s=min(SLICE_S, left), resend_s=SLICE_S * 2)
            except PolicyUnavailable as error:
                if error.code != "timeout":
                    raise
            ended = self._process.ended if self._process is not None else None
            if ended is not None:
                raise PolicyUnavailable(DIED, f"its process ended with {ended}")
            if time.monotonic() - start >= self._deadline_s:
                raise PolicyUnavailable(SILENT, f"no answer within {self._deadline_s * 1000:,.0f} ms")


@contextmanager
def started(
    spec: str, args: Mapping[str, Any], *, deadline_ms: float, probed: bool, start_s: float = 30.0
) -> Iterator[Subject]:
    """A policy in a process of its own, ended with the block; ``probed``: watched from inside.

    Raises ConfigError for one that cannot be loaded, PolicyUnavailable("start") for one that does not come up.
    """
    with TemporaryDirectory(prefix="tolaria-kit-") as folder:
        notes = Path(folder) / "notes.jsonl"
        if probed:
            spec, args = PROBE, {"spec": spec, "args": json.dumps(dict(args)), "notes": str(notes)}
        with EmbeddedPolicy(spec, args, log_path=Path(folder) / "log") as process:
            process.wait_ready(start_s)
            subject = Subject(
                process.endpoint, load_key_file(process.key_file), deadline_ms=deadline_ms, process=process, notes=notes
            )
            try:
                yield subject
            finally:
                subject.close()
