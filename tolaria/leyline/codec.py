"""Leyline messages to bytes and back: the only way between the wire and the domain types.

Decoding trusts nothing: size, then structure (`tolaria.leyline.wire`), then parsing, then values
(`tolaria.leyline.checks`); the first fault rejects the whole message. Encoding applies the same checks to what
it is given, so it never sends what its peer would refuse. Both directions raise only MessageRejected, whose
``code`` is one of "size", "parse", "unknown_field", "duplicate", "depth", "count", "version", "missing", "enum",
"payload", "text", "type", "range", "not_finite". Numbers are 32-bit floats on the wire; only those of telemetry, which
nothing steers by, are doubles and may be NaN.
"""

from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from tolaria.errors import MessageRejected
from tolaria.leyline import limits
from tolaria.leyline.checks import (
    check_command,
    check_decision,
    check_report,
    check_signal_values,
    check_state,
)
from tolaria.leyline.checks_telemetry import check_telemetry
from tolaria.leyline.convert import (
    command_from_wire,
    command_to_wire,
    decision_from_wire,
    decision_to_wire,
    report_from_wire,
    report_to_wire,
    state_from_wire,
    state_to_wire,
)
from tolaria.leyline.convert_signal import signal_from_wire, signal_to_wire
from tolaria.leyline.convert_telemetry import telemetry_from_wire, telemetry_to_wire
from tolaria.leyline.generated import leyline_pb2 as pb
from tolaria.leyline.generated import tolaria_pb2 as tolaria_pb
from tolaria.leyline.types import Command, Decision, EmergencySignal, PolicyReply, PolicyRequest, SystemState
from tolaria.leyline.types_telemetry import TelemetryPacket
from tolaria.leyline.wire import check_wire

_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedReply:
    """A policy's reply before its commands were looked at.

    ``commands`` are the exact serialized AdaptationCommands; each is decoded by itself, so that one bad command
    does not lose the others.
    """

    commands: tuple[bytes, ...] = ()
    policy_version: str = ""


def encode_state(state: SystemState) -> bytes:
    """A SystemStatePacket."""
    check_state(state)
    return _serialize(state_to_wire(state), limits.MAX_REQUEST_BYTES)


def decode_state(raw: bytes) -> SystemState:
    """A SystemStatePacket, checked."""
    state = state_from_wire(_parse(raw, pb.SystemStatePacket, limits.MAX_REQUEST_BYTES))
    check_state(state)
    return state


def encode_request(request: PolicyRequest) -> bytes:
    """A tolaria.v1.PolicyRequest, at most MAX_REQUEST_BYTES."""
    _check_request(request)
    wire = tolaria_pb.PolicyRequest(
        version=limits.MESSAGE_VERSION,
        state=state_to_wire(request.state),
        field_reports=[report_to_wire(report) for report in request.field_reports],
    )
    return _serialize(wire, limits.MAX_REQUEST_BYTES)


def decode_request(raw: bytes) -> PolicyRequest:
    """A tolaria.v1.PolicyRequest, checked."""
    wire = _parse(raw, tolaria_pb.PolicyRequest, limits.MAX_REQUEST_BYTES)
    limits.check_version("PolicyRequest", wire.version)
    if not wire.HasField("state"):
        raise MessageRejected("missing", "PolicyRequest has no state")
    limits.check_count("PolicyRequest.field_reports", len(wire.field_reports), limits.MAX_FIELD_REPORTS)
    reports = tuple(report_from_wire(report) for report in wire.field_reports)
    request = PolicyRequest(state=state_from_wire(wire.state), field_reports=reports)
    _check_request(request)
    return request


def encode_command(command: Command) -> bytes:
    """An AdaptationCommand, at most MAX_COMMAND_BYTES. ``command_id`` must be filled."""
    check_command(command)
    return _serialize(command_to_wire(command), limits.MAX_COMMAND_BYTES)


def decode_command(raw: bytes) -> Command:
    """An AdaptationCommand, checked; whether it is legal now is for the coordinator to say."""
    command = command_from_wire(_parse(raw, pb.AdaptationCommand, limits.MAX_COMMAND_BYTES))
    check_command(command)
    return command


def encode_reply(reply: PolicyReply) -> bytes:
    """A tolaria.v1.PolicyReply, at most MAX_REPLY_BYTES. One bad command rejects the reply."""
    commands = tuple(encode_command(command) for command in reply.commands)
    return encode_received_reply(ReceivedReply(commands=commands, policy_version=reply.policy_version))


def encode_received_reply(reply: ReceivedReply) -> bytes:
    """A tolaria.v1.PolicyReply from commands that are serialized already."""
    _check_reply(reply)
    wire = tolaria_pb.PolicyReply(
        version=limits.MESSAGE_VERSION, commands=reply.commands, policy_version=reply.policy_version
    )
    return _serialize(wire, limits.MAX_REPLY_BYTES)


def decode_reply(raw: bytes) -> ReceivedReply:
    """A tolaria.v1.PolicyReply, checked; its commands are still to be decoded one by one."""
    wire = _parse(raw, tolaria_pb.PolicyReply, limits.MAX_REPLY_BYTES)
    limits.check_version("PolicyReply", wire.version)
    reply = ReceivedReply(commands=tuple(wire.commands), policy_version=wire.policy_version)
    _check_reply(reply)
    return reply


def encode_signal(signal: EmergencySignal, *, raised_at_ns: int = 0) -> bytes:
    """An EmergencySignal, at most MAX_SIGNAL_BYTES, without its mark. ``raised_at_ns``: wall clock; 0: not said."""
    check_signal_values(signal)
    limits.check_integer("raised_at_ns", raised_at_ns, limits.MAX_TIME_NS)
    return _serialize(signal_to_wire(signal, raised_at_ns), limits.MAX_SIGNAL_BYTES)


def decode_signal(raw: bytes, *, mark: int) -> EmergencySignal:
    """An EmergencySignal, checked. ``mark``: the sequence number of the verified frame that carried it."""
    signal = signal_from_wire(_parse(raw, pb.EmergencySignal, limits.MAX_SIGNAL_BYTES), mark)
    check_signal_values(signal)
    return signal


def encode_decision(decision: Decision) -> bytes:
    """A tolaria.v1.Decision, at most MAX_DECISION_BYTES. Its commands are carried as they are."""
    check_decision(decision)
    return _serialize(decision_to_wire(decision), limits.MAX_DECISION_BYTES)


def decode_decision(raw: bytes) -> Decision:
    """A tolaria.v1.Decision, checked; its commands are still to be decoded one by one."""
    decision = decision_from_wire(_parse(raw, tolaria_pb.Decision, limits.MAX_DECISION_BYTES))
    check_decision(decision)
    return decision


def encode_telemetry(packet: TelemetryPacket) -> bytes:
    """A TelemetryPacket, at most MAX_TELEMETRY_BYTES."""
    check_telemetry(packet)
    return _serialize(telemetry_to_wire(packet), limits.MAX_TELEMETRY_BYTES)


def decode_telemetry(raw: bytes) -> TelemetryPacket:
    """A TelemetryPacket, checked."""
    packet = telemetry_from_wire(_parse(raw, pb.TelemetryPacket, limits.MAX_TELEMETRY_BYTES))
    check_telemetry(packet)
    return packet


def _check_request(request: PolicyRequest) -> None:
    check_state(request.state)
    limits.check_count("request.field_reports", len(request.field_reports), limits.MAX_FIELD_REPORTS)
    for report in request.field_reports:
        check_report(report)


def _check_reply(reply: ReceivedReply) -> None:
    limits.check_count("reply.commands", len(reply.commands), limits.MAX_COMMANDS)
    limits.check_text("reply.policy_version", reply.policy_version)


def _serialize(message: Message, most: int) -> bytes:
    # Sorted maps: equal objects give equal bytes, so a question asked again is the same question.
    raw = message.SerializeToString(deterministic=True)
    limits.check_size(message.DESCRIPTOR.full_name, raw, most)
    return raw


def _parse(raw: bytes, kind: type[_M], most: int) -> _M:
    limits.check_size(kind.DESCRIPTOR.full_name, raw, most)
    check_wire(raw, kind)
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise MessageRejected("parse", f"{kind.DESCRIPTOR.full_name}: {error}") from error
