"""What was said between a run and its policy, read from what rank 0 kept of it; verified where the keys are there.

    question -> reply, or none in time;  signals of the policy in between          tolaria/tamiyo/recording.py

A frame verifies when its MAC, taken over the bytes as they were sent, is that of one of the keys. This shows that
nobody altered it who did not have the key. It does not show which of the two sides that share the key has made it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tolaria.errors import MessageRejected, RunDirError
from tolaria.leyline.codec import ReceivedReply, decode_reply, decode_request, decode_signal
from tolaria.leyline.framing import FrameHeader, FrameKind, KeyRing, check_reply, load_key_file, open_frame, peek
from tolaria.leyline.types import EmergencySignal, PolicyRequest
from tolaria.tamiyo.line import KEYS_NAME
from tolaria.tamiyo.recording import FILE_NAME, OLDER_NAME, Entry, What, entries

_KINDS = {
    What.REQUEST: FrameKind.REQUEST,
    What.REPLY: FrameKind.REPLY,
    What.MALFORMED: FrameKind.REPLY,
    What.SIGNAL: FrameKind.SIGNAL,
}


@dataclass(frozen=True, kw_only=True)
class RecordedFrame:
    """One frame of the record. ``verified``: its MAC is right; None: there was no key to tell. ``fault``: a code.

    ``payload``: its protobuf message, still encoded.
    """

    what: What
    wall_ns: int
    header: FrameHeader
    payload: bytes
    verified: bool | None
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question and what came of it. ``reply``: None when nothing acceptable came in time."""

    boundary: int
    asked_ns: int
    question: RecordedFrame
    reply: RecordedFrame | None
    signals: tuple[RecordedFrame, ...] = ()

    @property
    def request(self) -> PolicyRequest:
        """The question. Raises MessageRejected for one that no trainer of this version sends."""
        return decode_request(self.question.payload)

    @property
    def answer(self) -> ReceivedReply | None:
        """The policy's reply, its commands as they came; None without one."""
        return None if self.reply is None else decode_reply(self.reply.payload)

    @property
    def emergencies(self) -> list[EmergencySignal]:
        """What the policy raised between this question and the next."""
        return [decode_signal(signal.payload, mark=signal.header.seq) for signal in self.signals]

    @property
    def answer_ms(self) -> float | None:
        """Milliseconds at rank 0 from the question to its answer."""
        return None if self.reply is None else (self.reply.wall_ns - self.asked_ns) / 1e6


def read_keys(run: Path, key_file: Path | None = None) -> KeyRing | None:
    """The keys to verify a run's record with: of ``key_file``, else those the run kept; None where there are none.

    Raises ConfigError for a key file that cannot be used.
    """
    path = key_file or run / KEYS_NAME
    if key_file is None and not path.exists():
        return None
    return load_key_file(path)


def read_frames(run: Path, keys: KeyRing | None) -> Iterator[RecordedFrame]:
    """Every frame of a run's record, oldest first; none where nothing was recorded. Raises RunDirError."""
    for name in (OLDER_NAME, FILE_NAME):
        try:
            for entry in entries(run / name):
                yield _frame(entry, keys)
        except OSError as error:
            raise RunDirError(f"{run / name}: cannot be read ({error.strerror})") from error


def read_exchanges(run: Path, keys: KeyRing | None) -> Iterator[Exchange]:
    """The record as questions with their answers, in order. A frame with a fault is passed over. Raises RunDirError."""
    question: RecordedFrame | None = None
    reply: RecordedFrame | None = None
    signals: list[RecordedFrame] = []
    for frame in read_frames(run, keys):
        if frame.fault:
            continue
        if frame.what is What.REQUEST:
            if question is not None:
                yield _exchange(question, reply, signals)
            question, reply, signals = frame, None, []
        elif frame.what is What.SIGNAL:
            signals.append(frame)
        elif frame.what is What.REPLY and question is not None and _answers(question, frame):
            reply = frame
    if question is not None:
        yield _exchange(question, reply, signals)


def _exchange(question: RecordedFrame, reply: RecordedFrame | None, signals: list[RecordedFrame]) -> Exchange:
    return Exchange(
        boundary=question.header.boundary, asked_ns=question.wall_ns, question=question, reply=reply,
        signals=tuple(signals),
    )  # fmt: skip


def _answers(question: RecordedFrame, reply: RecordedFrame) -> bool:
    try:
        check_reply(question.header, reply.header)
    except MessageRejected:
        return False
    return True


def _frame(entry: Entry, keys: KeyRing | None) -> RecordedFrame:
    kind = _KINDS[entry.what]
    header, payload = peek(entry.frame, kind)
    verified, fault = None, ""
    if keys is not None:
        try:
            open_frame(entry.frame, keys, kind)
            verified = True
        except MessageRejected as error:
            verified, fault = False, error.code
    return RecordedFrame(
        what=entry.what, wall_ns=entry.wall_ns, header=header, payload=payload, verified=verified, fault=fault
    )
