"""What the policy server does with one frame: verify, decide once per question, answer, remember the answer.

No sockets and no clock of its own. A question is known by its run, generation and sequence number; asked again with
the same bytes it gets the same bytes back without asking the policy, and an older one gets nothing: a policy that
keeps count of what it saw must not be shown the past.
"""

import hashlib
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tolaria.errors import MessageRejected
from tolaria.leyline.codec import decode_request, encode_reply
from tolaria.leyline.framing import Frame, FrameKind, KeyRing, open_frame, reply_header, seal
from tolaria.leyline.limits import clip_text
from tolaria.leyline.types import Command, PolicyReply, PolicyRequest, SeedCommand
from tolaria.tamiyo.outbox import SignalOutbox
from tolaria.tamiyo.policy import BOUNDARY, Policy, with_identity

_K = TypeVar("_K")
_V = TypeVar("_V")

log = logging.getLogger("tolaria.tamiyo")

MAX_RUNS = 64
MAX_GENERATIONS = 64
MAX_REMEMBERED = 16


@dataclass
class _Generation:
    """One start of a run: the newest question seen, and the newest answers by boundary."""

    last_seq: int = 0
    answers: OrderedDict[int, tuple[bytes, bytes]] = field(default_factory=OrderedDict)


class Desk:
    """Answers frames for any number of runs, each with a policy of its own. One thread uses it."""

    def __init__(
        self, keys: KeyRing, make_policy: Callable[[], Policy], *, wall_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.rejected: Counter[str] = Counter()
        self._keys = keys
        self._make_policy = make_policy
        self._wall_ns = wall_ns
        self._policies: OrderedDict[bytes, Policy] = OrderedDict()
        self._generations: OrderedDict[tuple[bytes, int], _Generation] = OrderedDict()
        self._outbox = SignalOutbox(keys, wall_ns=wall_ns)
        self._seq = 0

    def answer(self, raw: bytes | None, sender: bytes = b"") -> bytes | None:
        """The reply to a frame; None when it gets none. None as frame is a message of several parts. Never raises.

        ``sender``: the connection it came by; emergencies for the run go there until its next question.
        """
        try:
            if raw is None:
                raise MessageRejected("multipart", "a message of several parts")
            frame = open_frame(raw, self._keys, FrameKind.REQUEST)
            return self._answer_verified(raw, frame, sender)
        except MessageRejected as error:
            self.rejected[error.code] += 1
            count = self.rejected[error.code]
            if count & (count - 1) == 0:
                # At powers of two only: a flood must not fill the disk.
                log.warning("refused a question (%s, %d so far): %s", error.code, count, error)
            return None

    def send_emergencies(self, send: Callable[[bytes, bytes], bool]) -> None:
        """Ask the policies whether they raise one, and pass what is due to ``send(receiver, frame)``.

        ``send`` returns whether it could; what it could not send is kept for the next call. Never raises.
        """
        self._outbox.send(self._policies, send)

    def _answer_verified(self, raw: bytes, frame: Frame, sender: bytes) -> bytes:
        header = frame.header
        digest = hashlib.sha256(raw).digest()
        if hashlib.sha256(frame.payload).digest() != header.request_sha256:
            raise MessageRejected("request_digest", "the header's digest is not that of the question")
        generation = _recall(self._generations, (header.run_id, header.generation), _Generation, MAX_GENERATIONS)
        known = generation.answers.get(header.boundary)
        if known is not None and known[0] == digest:
            if header.seq == generation.last_seq:
                self._outbox.heard(header, sender)
            log.info("boundary %d: asked again, answered as before", header.boundary)
            return known[1]
        if header.seq <= generation.last_seq:
            raise MessageRejected("stale", f"question {header.seq} after question {generation.last_seq}")
        request = decode_request(frame.payload)
        generation.last_seq = header.seq
        self._outbox.heard(header, sender)
        payload = self._decide(frame, request)
        self._seq += 1
        reply = seal(reply_header(header, seq=self._seq, wall_ns=self._wall_ns()), payload, self._keys)
        generation.answers[header.boundary] = (digest, reply)
        while len(generation.answers) > MAX_REMEMBERED:
            generation.answers.popitem(last=False)
        return reply

    def _decide(self, frame: Frame, request: PolicyRequest) -> bytes:
        """The encoded reply; without commands, and with the error as version, when the policy failed."""
        header = frame.header
        state = request.state
        metrics = {**state.training_metrics, BOUNDARY: float(header.boundary)}
        # No run id in it: seeds get their weights from the command's id, and two runs of one seed are to be equal.
        prefix = f"b{header.boundary}"
        try:
            policy = _recall(self._policies, header.run_id, self._make_policy, MAX_RUNS)
            commands = policy.decide(replace(state, training_metrics=metrics), request.field_reports)
            reply = self._reply(commands, prefix, policy.version)
            payload = encode_reply(reply)
        except Exception as error:  # the user's policy: whatever comes out of it must not end the service
            log.exception("boundary %d: the policy failed, answering without commands", header.boundary)
            return encode_reply(PolicyReply(policy_version=clip_text(f"error:{type(error).__name__}")))
        for command in reply.commands:
            log.info("boundary %d: %s", header.boundary, _in_words(command))
        return payload

    def _reply(self, commands: Sequence[Command], prefix: str, version: str) -> PolicyReply:
        now = self._wall_ns()
        complete = tuple(
            with_identity(command, f"{prefix}-{index}", issued_by=version, issued_at_ns=now)
            for index, command in enumerate(commands)
        )
        return PolicyReply(commands=complete, policy_version=version)


def _recall(known: OrderedDict[_K, _V], key: _K, make: Callable[[], _V], most: int) -> _V:
    """The entry of ``key``, made when missing; beyond ``most`` entries the longest unused one is forgotten."""
    if key not in known:
        known[key] = make()
        if len(known) > most:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _in_words(command: Command) -> str:
    what = command.payload.operation if isinstance(command.payload, SeedCommand) else command.command_type
    return f"{what.name} {command.target_seed_id} ({command.reason})"
