"""The one-frame wire format between trainer and policy: fixed header, payload, HMAC-SHA256 over both.

    magic "TLY1" | major u8 | minor u8 | kind u16 | key_id u32 | run_id 16 | generation u32 | boundary u32 | seq u64
    | corr_id 16 | request_sha256 32 | wall_ns u64 | length u32 | payload | MAC 32        (big endian, header 104 B)

Each direction of each run has its own key, derived from a shared master key by HKDF-SHA256 (RFC 5869), so that a
frame can neither be reflected to its sender nor replayed into another run. Nothing of a frame is used before its
MAC, taken over the received bytes, was verified. Whether a verified reply answers the question that is open is a
separate check, `check_reply`; an emergency answers nothing, and `check_signal` tells new ones from repetitions.
"""

import hashlib
import hmac
import secrets
import struct
from dataclasses import dataclass, replace
from enum import IntEnum

from tolaria.errors import MessageRejected
from tolaria.leyline.keys import KeyRing, load_key_file, new_key_file_text
from tolaria.leyline.limits import MAX_ORDER_BYTES, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, MAX_SIGNAL_BYTES

__all__ = [
    "AUTH_CODES",
    "Frame",
    "FrameHeader",
    "FrameKind",
    "KeyRing",
    "check_reply",
    "check_signal",
    "claims_signal",
    "generation_number",
    "load_key_file",
    "new_key_file_text",
    "open_frame",
    "outcome_header",
    "peek",
    "reply_header",
    "request_header",
    "run_id_bytes",
    "seal",
    "signal_header",
]

MAGIC = b"TLY1"
MAJOR = 1
MINOR = 0
MAC_BYTES = 32

_HEADER = struct.Struct("!4sBBHI16sIIQ16s32sQI")
HEADER_BYTES = _HEADER.size
OVERHEAD_BYTES = HEADER_BYTES + MAC_BYTES

# Rejections that mean "not our peer, or not our protocol": a frame nobody with the key would send.
AUTH_CODES = frozenset({"magic", "major", "unknown_key", "revoked_key", "mac"})


class FrameKind(IntEnum):
    """What a frame carries; this also fixes its direction."""

    REQUEST = 1
    REPLY = 2
    SIGNAL = 3
    ORDER = 4
    OUTCOME = 5

    @property
    def direction(self) -> str:
        """Which way such frames go, and between whom; each way has its own key."""
        return _DIRECTIONS[self]

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload of this kind."""
        return _MAX_PAYLOAD_BYTES[self]

    @property
    def max_frame_bytes(self) -> int:
        """Largest frame of this kind; the bound to give to the transport."""
        return self.max_payload_bytes + OVERHEAD_BYTES


_MAX_PAYLOAD_BYTES = {
    FrameKind.REQUEST: MAX_REQUEST_BYTES,
    FrameKind.REPLY: MAX_REPLY_BYTES,
    FrameKind.SIGNAL: MAX_SIGNAL_BYTES,
    FrameKind.ORDER: MAX_ORDER_BYTES,
    FrameKind.OUTCOME: MAX_ORDER_BYTES,
}
_DIRECTIONS = {
    FrameKind.REQUEST: "to-policy",
    FrameKind.REPLY: "to-trainer",
    FrameKind.SIGNAL: "to-trainer",
    FrameKind.ORDER: "operator-to-run",
    FrameKind.OUTCOME: "run-to-operator",
}
_SIGNAL_BYTES = FrameKind.SIGNAL.to_bytes(2, "big")


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameHeader:
    """What a frame says about itself.

    ``run_id`` and ``corr_id`` have 16 bytes, ``request_sha256`` 32: of the request's payload, in both directions;
    a signal belongs to no request and has zeros there.
    ``generation`` is a u32 (`generation_number`), ``boundary`` a u32, ``seq`` a u64 counted by the sender.
    ``wall_ns`` is the sender's wall clock, for telemetry only; ``key_id`` is filled by `seal`.
    """

    kind: FrameKind
    run_id: bytes
    generation: int
    boundary: int
    seq: int
    corr_id: bytes
    request_sha256: bytes
    wall_ns: int
    key_id: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A frame whose MAC was verified."""

    header: FrameHeader
    payload: bytes


def run_id_bytes(run_id: str) -> bytes:
    """The 16-byte form of a run's name in frame headers."""
    return hashlib.sha256(b"tolaria run" + run_id.encode()).digest()[:16]


def generation_number(generation: str) -> int:
    """The u32 form of the generation agreed by the ranks."""
    return int.from_bytes(hashlib.sha256(b"tolaria generation" + generation.encode()).digest()[:4], "big")


def request_header(
    *, run_id: str, generation: str, boundary: int, seq: int, payload: bytes, wall_ns: int,
    kind: FrameKind = FrameKind.REQUEST,
) -> FrameHeader:  # fmt: skip
    """The header of a new question, with a fresh random correlation id. ``kind``: ORDER for an operator's."""
    return FrameHeader(
        kind=kind,
        run_id=run_id_bytes(run_id),
        generation=generation_number(generation),
        boundary=boundary,
        seq=seq,
        corr_id=secrets.token_bytes(16),
        request_sha256=hashlib.sha256(payload).digest(),
        wall_ns=wall_ns,
    )


def reply_header(request: FrameHeader, *, seq: int, wall_ns: int) -> FrameHeader:
    """The header of the answer to ``request``: echoes what identifies the question."""
    return FrameHeader(
        kind=FrameKind.REPLY,
        run_id=request.run_id,
        generation=request.generation,
        boundary=request.boundary,
        seq=seq,
        corr_id=request.corr_id,
        request_sha256=request.request_sha256,
        wall_ns=wall_ns,
    )


def outcome_header(order: FrameHeader, *, wall_ns: int) -> FrameHeader:
    """The header of the answer to an operator's ``order``."""
    return replace(order, kind=FrameKind.OUTCOME, wall_ns=wall_ns)


def signal_header(newest: FrameHeader, *, mark: int, wall_ns: int) -> FrameHeader:
    """The header of an emergency for the run and start that asked ``newest``, the last question known."""
    return FrameHeader(
        kind=FrameKind.SIGNAL,
        run_id=newest.run_id,
        generation=newest.generation,
        boundary=newest.boundary,
        seq=mark,
        corr_id=bytes(16),
        request_sha256=bytes(32),
        wall_ns=wall_ns,
    )


def seal(header: FrameHeader, payload: bytes, keys: KeyRing) -> bytes:
    """One frame, signed with the ring's signing key. Raises ValueError for a header or payload that cannot be sent."""
    if len(payload) > header.kind.max_payload_bytes:
        raise ValueError(f"payload of {len(payload)} bytes, a {header.kind.name} holds {header.kind.max_payload_bytes}")
    for name, size in (("run_id", 16), ("corr_id", 16), ("request_sha256", 32)):
        if len(getattr(header, name)) != size:
            raise ValueError(f"{name} must have {size} bytes")
    try:
        head = _HEADER.pack(
            MAGIC, MAJOR, MINOR, header.kind, keys.signing_key_id, header.run_id, header.generation, header.boundary,
            header.seq, header.corr_id, header.request_sha256, header.wall_ns, len(payload),
        )  # fmt: skip
    except struct.error as error:
        raise ValueError(f"frame header: {error}") from error
    signed = head + payload
    return signed + hmac.digest(keys.derive(header.kind.direction, header.run_id), signed, "sha256")


def open_frame(raw: bytes, keys: KeyRing, kind: FrameKind) -> Frame:
    """Verify a received frame of the expected kind and take it apart; the payload is still unparsed.

    Raises only MessageRejected: "size", "magic", "major", "unknown_key", "revoked_key", "mac", "kind", "length".
    A frame sent in the other direction fails as "mac".
    """
    if not OVERHEAD_BYTES <= len(raw) <= kind.max_frame_bytes:
        raise MessageRejected("size", f"frame of {len(raw)} bytes, expected {OVERHEAD_BYTES} to {kind.max_frame_bytes}")
    magic, major, _, number, named_key, run_id, *_, length = _HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise MessageRejected("magic", "not a Tolaria frame")
    if major != MAJOR:
        raise MessageRejected("major", f"frame of protocol version {major}, only {MAJOR} is understood")
    signed = raw[:-MAC_BYTES]
    expected = hmac.digest(keys.derive(kind.direction, run_id, with_key=named_key), signed, "sha256")
    if not hmac.compare_digest(expected, raw[-MAC_BYTES:]):
        raise MessageRejected("mac", f"frame signed with another key than {named_key:08x}, or altered on its way")
    if number != kind:
        raise MessageRejected("kind", f"frame of kind {number}, expected {kind.name} ({kind.value})")
    if length != len(raw) - OVERHEAD_BYTES:
        raise MessageRejected("length", f"header names {length} payload bytes, {len(raw) - OVERHEAD_BYTES} came")
    header, payload = peek(raw, kind)
    return Frame(header=header, payload=payload)


def peek(raw: bytes, kind: FrameKind) -> tuple[FrameHeader, bytes]:
    """Header and payload of a frame of at least `OVERHEAD_BYTES`, taken for one of ``kind``. Nothing is verified."""
    _, _, _, _, key, run_id, generation, boundary, seq, corr_id, digest, wall_ns, _ = _HEADER.unpack_from(raw)
    header = FrameHeader(
        kind=kind, run_id=run_id, generation=generation, boundary=boundary, seq=seq, corr_id=corr_id,
        request_sha256=digest, wall_ns=wall_ns, key_id=key,
    )  # fmt: skip
    return header, raw[HEADER_BYTES:-MAC_BYTES]


def check_reply(request: FrameHeader, reply: FrameHeader) -> None:
    """Refuse a verified reply unless it answers exactly this request: late, replayed and foreign ones do not.

    Raises MessageRejected: "run", "generation", "boundary", "correlation", "request_digest".
    """
    pairs = (
        ("run", request.run_id, reply.run_id),
        ("generation", request.generation, reply.generation),
        ("boundary", request.boundary, reply.boundary),
        ("correlation", request.corr_id, reply.corr_id),
        ("request_digest", request.request_sha256, reply.request_sha256),
    )
    for code, asked, answered in pairs:
        if asked != answered:
            raise MessageRejected(code, f"the reply's {code} is not that of the open request")


def claims_signal(raw: bytes) -> bool:
    """Whether a received frame says that it is a signal. Nothing is verified: this only chooses the check."""
    return raw[:4] == MAGIC and raw[6:8] == _SIGNAL_BYTES


def check_signal(signal: FrameHeader, *, run_id: str, generation: str, newest_mark: int) -> None:
    """Refuse a verified signal for another run or start, and one that is not newer than the newest accepted.

    Raises MessageRejected: "run", "generation", "replayed".
    """
    if signal.run_id != run_id_bytes(run_id):
        raise MessageRejected("run", "the signal is for another run")
    if signal.generation != generation_number(generation):
        raise MessageRejected("generation", "the signal is for another start of the run")
    if signal.seq <= newest_mark:
        raise MessageRejected("replayed", f"signal {signal.seq} after signal {newest_mark}")
