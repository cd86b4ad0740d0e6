"""Policy services that misbehave, each in one way, in a process of their own.

    with misbehaving("silent") as peer:
        ... TamiyoConfig(endpoint=peer.endpoint, key_file=peer.key_file)
    peer.questions                          what it was asked, peer.sent what it sent

Every command that one of them signs would change the run if it were taken.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from tolaria.leyline.codec import decode_request, encode_command
from tolaria.leyline.framing import (
    Frame,
    FrameKind,
    KeyRing,
    load_key_file,
    new_key_file_text,
    open_frame,
    reply_header,
    seal,
)
from tolaria.leyline.generated import leyline_pb2 as pb
from tolaria.leyline.generated import tolaria_pb2 as tolaria_pb
from tolaria.leyline.limits import MAX_COMMANDS
from tolaria.leyline.types import Command
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

ROOT = Path(__file__).resolve().parents[2]
EXIT_OF_THE_DYING = 9
LATE_S = 0.9


@dataclass(frozen=True)
class Question:
    """A frame that came, whether it came before, and how many different ones have come."""

    raw: bytes
    frame: Frame
    number: int
    repeated: bool


@dataclass(frozen=True)
class Answer:
    """What goes back, in one part or several, and how long after the question."""

    parts: tuple[bytes, ...]
    after_s: float = 0.0


class Peer:
    """Base of all behaviours: asked, it gives the frames to send."""

    def __init__(self, keys: KeyRing) -> None:
        self.keys = keys
        self.seq = 0

    def answer(self, question: Question) -> list[Answer]:
        raise NotImplementedError

    def reply(self, question: Question, *commands: bytes, keys: KeyRing | None = None) -> bytes:
        """A well-signed reply with these bytes as commands."""
        wire = tolaria_pb.PolicyReply(version=1, commands=commands, policy_version=type(self).__name__)
        return self.sealed(question, wire.SerializeToString(), keys)

    def sealed(self, question: Question, payload: bytes, keys: KeyRing | None = None) -> bytes:
        self.seq += 1
        header = reply_header(question.frame.header, seq=self.seq, wall_ns=time.time_ns())
        return seal(header, payload, keys or self.keys)


def signed(command: Command, number: int = 0) -> bytes:
    return encode_command(with_identity(command, f"peer-{number}", issued_by="peer", issued_at_ns=1))


def germination(slot: str = "early") -> bytes:
    return signed(do.germinate(slot, "low_rank", reason="the peer wants it"))


def edited(command: Command, **fields: Any) -> bytes:
    """A command with fields of the wire set to what a policy of this version would never send."""
    wire = pb.AdaptationCommand.FromString(signed(command))
    for name, value in fields.items():
        setattr(wire, name, value)
    return wire.SerializeToString()


class Silent(Peer):
    """Reads and never answers."""

    def answer(self, question: Question) -> list[Answer]:
        return []


class Late(Peer):
    """Answers well, but after the deadline."""

    def answer(self, question: Question) -> list[Answer]:
        return [Answer((self.reply(question, germination()),), after_s=LATE_S)]


class Garbage(Peer):
    """Answers with noise, stumps, several parts, and the question itself."""

    def answer(self, question: Question) -> list[Answer]:
        good = self.reply(question, germination())
        noise = bytes((i * 37 + question.number) % 256 for i in range(500))
        return [Answer((part,)) for part in (b"", noise, good[:-1], question.raw)] + [Answer((good, good))]


class Forged(Peer):
    """Answers with a key of its own, and with the right one around an altered message."""

    def answer(self, question: Question) -> list[Answer]:
        foreign = self.reply(question, germination(), keys=KeyRing([os.urandom(32)]))
        altered = bytearray(self.reply(question, germination()))
        altered[-40] ^= 1
        return [Answer((foreign,)), Answer((bytes(altered),))]


class Replay(Peer):
    """Answers the first question twice: at once with nothing, and as the answer to every later question again."""

    def __init__(self, keys: KeyRing) -> None:
        super().__init__(keys)
        self.recorded = b""

    def answer(self, question: Question) -> list[Answer]:
        if question.number == 1:
            self.recorded = self.recorded or self.reply(question, germination())
            return [Answer((self.reply(question),))]
        return [Answer((self.recorded,))]


class UnknownEnum(Peer):
    """Signs commands of types and operations that do not exist."""

    def answer(self, question: Question) -> list[Answer]:
        operation = pb.AdaptationCommand.FromString(germination())
        operation.seed_operation.operation = 42  # type: ignore[assignment]
        germinate = do.germinate("early", "low_rank")
        commands = [
            edited(germinate, command_type=99),
            edited(germinate, command_type=0),
            operation.SerializeToString(),
        ]
        return [Answer((self.reply(question, *commands),))]


class Illegal(Peer):
    """Signs commands that are well-formed and not legal: other stages, no such slot, no such blueprint."""

    def answer(self, question: Question) -> list[Answer]:
        commands = [do.fossilize("early"), do.cull("late"), do.germinate("nowhere", "low_rank"),
                    do.germinate("late", "skyscraper"), do.rollback()]  # fmt: skip
        return [Answer((self.reply(question, *[signed(c, i) for i, c in enumerate(commands)]),))]


class Dying(Peer):
    """Dies when it has read the first question."""

    def answer(self, question: Question) -> list[Answer]:
        os._exit(EXIT_OF_THE_DYING)


class Wild(Peer):
    """Signs commands with numbers that are none, or beyond all reason."""

    def answer(self, question: Question) -> list[Answer]:
        commands = []
        for value in (float("nan"), float("inf"), 1e38):
            wire = pb.AdaptationCommand.FromString(signed(do.scale_lr("host", 0.5)))
            wire.optimizer_adjustment.hyperparameters["lr_scale"] = value
            commands.append(wire.SerializeToString())
            wire = pb.AdaptationCommand.FromString(germination())
            wire.seed_operation.parameters["width"] = value
            commands.append(wire.SerializeToString())
        return [Answer((self.reply(question, *commands),))]


class Crowd(Peer):
    """Signs one command too many."""

    def answer(self, question: Question) -> list[Answer]:
        commands = [signed(do.scale_lr("host", 0.99), i) for i in range(MAX_COMMANDS + 1)]
        return [Answer((self.reply(question, *commands),))]


class Malformed(Peer):
    """Signs something that is no reply."""

    def answer(self, question: Question) -> list[Answer]:
        return [Answer((self.sealed(question, b"\xff" * 40),))]


class Forgetful(Peer):
    """Answers the first question with a command that is not legal, is silent at the second, then wants nothing."""

    def answer(self, question: Question) -> list[Answer]:
        commands = [signed(do.cull("early"))] if question.number == 1 else []
        return [] if question.number == 2 else [Answer((self.reply(question, *commands),))]


class Recovering(Peer):
    """Silent once, then asks for the same growth with every answer."""

    def answer(self, question: Question) -> list[Answer]:
        return [] if question.number == 1 else [Answer((self.reply(question, germination()),))]


BEHAVIOURS: dict[str, type[Peer]] = {
    kind.__name__.lower(): kind
    for kind in (
        Silent, Late, Garbage, Forged, Replay, UnknownEnum, Illegal, Dying, Wild, Crowd, Malformed, Forgetful,
        Recovering,
    )
}  # fmt: skip


# The process


@dataclass
class _Service:
    """Reads questions and sends what the behaviour says when it is due; every step goes into the log."""

    socket: "zmq.Socket[bytes]"
    peer: Peer
    log: Path
    known: dict[bytes, int] = field(default_factory=dict)
    due: list[tuple[float, bytes, Answer]] = field(default_factory=list)

    def run(self) -> None:
        while True:
            next_at = min((at for at, _, _ in self.due), default=None)
            wait_ms = None if next_at is None else max(0, round((next_at - time.monotonic()) * 1000))
            if self.socket.poll(wait_ms):
                self._read()
            self._send()

    def _read(self) -> None:
        sender, raw = self.socket.recv_multipart()
        repeated = raw in self.known
        number = self.known.setdefault(raw, len(self.known) + 1)
        frame = open_frame(raw, self.peer.keys, FrameKind.REQUEST)
        reports = {report.report_id: report.outcome.name for report in decode_request(frame.payload).field_reports}
        self._note(event="asked", boundary=frame.header.boundary, repeated=repeated, reports=reports)
        now = time.monotonic()
        for answer in self.peer.answer(Question(raw, frame, number, repeated)):
            self.due.append((now + answer.after_s, sender, answer))

    def _send(self) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self.due if entry[0] <= now]:
            self.due.remove(entry)
            _, receiver, answer = entry
            self.socket.send_multipart([receiver, *answer.parts])
            self._note(event="sent", parts=len(answer.parts))

    def _note(self, **fields: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(fields) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until killed; "ready" on stdout says that the endpoint is bound."""
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour", choices=sorted(BEHAVIOURS))
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(argv)
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    place = Place(options.directory)
    socket.bind(place.endpoint)
    print("ready", flush=True)  # noqa: T201
    _Service(socket, BEHAVIOURS[options.behaviour](load_key_file(place.key_file)), place.log).run()


# The test's side


@dataclass(frozen=True)
class Place:
    """A folder with socket, key and log of one peer."""

    directory: Path

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.directory / 'socket'}"

    @property
    def key_file(self) -> str:
        return str(self.directory / "key")

    @property
    def log(self) -> Path:
        return self.directory / "log"


@dataclass
class Misbehaving:
    """A running peer. ``questions``, ``sent`` and ``exit_code`` are there when it has ended."""

    place: Place
    questions: list[dict[str, Any]] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def reports(self) -> dict[int, dict[str, str]]:
        """Boundary -> the field reports that came with its question, id -> outcome; each question once."""
        return {entry["boundary"]: entry["reports"] for entry in self.questions if not entry["repeated"]}


@contextmanager
def misbehaving(behaviour: str) -> Iterator[Misbehaving]:
    """Start a peer and wait until it is bound; stopped and read out at the end of the block."""
    # Not pytest's folder: its path may be longer than a socket's can be.
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        place = Place(Path(name))
        place.log.touch()
        descriptor = os.open(place.key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(new_key_file_text())
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.peers", behaviour, name], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        peer = Misbehaving(place)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", f"{behaviour}: did not start"
            yield peer
        finally:
            peer.exit_code = process.poll()
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
            notes = [json.loads(line) for line in place.log.read_text().splitlines()]
            peer.questions += [n for n in notes if n["event"] == "asked"]
            peer.sent += [n for n in notes if n["event"] == "sent"]


if __name__ == "__main__":
    main()
