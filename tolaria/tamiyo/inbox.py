"""Emergencies on their way from the connection to the training loop: verified, in order, each one once.

    claims to be a signal -> size, magic, key, MAC, kind -> this run, this start -> newer than the mark -> decode

No answer is expected and no question names them, so what makes a signal acceptable is its mark alone: it must be
greater than that of the last one accepted. The caller keeps the mark beyond the life of this process.
"""

from collections import Counter

from tolaria.errors import MessageRejected
from tolaria.leyline.codec import decode_signal
from tolaria.leyline.framing import FrameKind, KeyRing, check_signal, open_frame
from tolaria.leyline.types import EmergencySignal
from tolaria.tamiyo.recording import Keep, What, keep_nothing

MAX_WAITING = 64


class Limit:
    """How many frames, of how many bytes, are examined on one occasion."""

    def __init__(self, frames: int, size: int) -> None:
        self._frames = frames
        self._bytes = size

    def spend(self, size: int) -> bool:
        """Whether one more frame of this size is within the limit."""
        self._frames -= 1
        self._bytes -= size
        return self._frames >= 0 and self._bytes >= 0


class SignalInbox:
    """Judges frames that claim to be signals and keeps the accepted ones until they are taken. One thread uses it.

    ``mark``: that of the newest accepted signal. What is refused is counted in ``rejected`` by code; "unread" are
    accepted ones that nobody took: of more than `MAX_WAITING` the oldest of the lowest level goes.
    """

    def __init__(
        self, keys: KeyRing, rejected: Counter[str], *, run_id: str, generation: str, keep: Keep = keep_nothing
    ) -> None:
        self.mark = 0
        self._keep = keep
        self._keys = keys
        self._rejected = rejected
        self._run_id = run_id
        self._generation = generation
        self._waiting: list[EmergencySignal] = []

    def put(self, raw: bytes) -> None:
        """Accept or count one received frame. Never raises."""
        try:
            frame = open_frame(raw, self._keys, FrameKind.SIGNAL)
            check_signal(frame.header, run_id=self._run_id, generation=self._generation, newest_mark=self.mark)
            signal = decode_signal(frame.payload, mark=frame.header.seq)
        except MessageRejected as error:
            self._rejected[error.code] += 1
            return
        self.mark = signal.mark
        self._keep(What.SIGNAL, raw)
        self._waiting.append(signal)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.remove(min(self._waiting, key=lambda waiting: waiting.level))
            self._rejected["unread"] += 1

    def take(self) -> list[EmergencySignal]:
        """The signals accepted since the last call, oldest first."""
        taken, self._waiting = self._waiting, []
        return taken
