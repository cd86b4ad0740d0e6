"""Well-formed and signed is not enough: each way in which a message can be wrong is refused with its own code."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from tolaria.errors import MessageRejected
from tolaria.leyline import codec, limits
from tolaria.leyline.generated import leyline_pb2 as pb
from tolaria.leyline.generated import tolaria_pb2
from tolaria.leyline.types import (
    Command,
    CommandType,
    Decision,
    FieldOutcome,
    FieldReport,
    HardwareContext,
    OptimizerCommand,
    PolicyReply,
    PolicyRequest,
    RollbackCommand,
    SeedCommand,
    SeedOp,
    SeedStage,
    SeedState,
    SystemState,
)

SEED = Command(
    command_id="c1",
    command_type=CommandType.SEED,
    target_seed_id="blocks.1",
    payload=SeedCommand(operation=SeedOp.GERMINATE, blueprint_id="low_rank", parameters={"rank": 4.0}),
    issued_at_ns=1_790_000_000_123_456_789,
    annotations={"reason": "validation loss is flat"},
)
OPTIMIZER = Command(
    command_id="c2",
    command_type=CommandType.OPTIMIZER,
    payload=OptimizerCommand(optimizer_id="host*", hyperparameters={"lr_scale": 0.5}),
)
ROLLBACK = Command(command_id="c3", command_type=CommandType.ROLLBACK, payload=RollbackCommand(target="step", step=7))
STATE = SystemState(
    packet_id="p", current_epoch=1, global_step=10, validation_accuracy=0.5, validation_loss=1.0, training_loss=1.0,
    timestamp_ns=1, training_run_id="r", experiment_name="digits", hardware=HardwareContext(device_type="cpu"),
    seeds=(SeedState(seed_id="s", stage=SeedStage.DORMANT, metrics={"alpha": 0.0}),), training_metrics={"a": 1.0},
)  # fmt: skip
REPORT = FieldReport(report_id="f", command_id="c1", training_run_id="r", outcome=FieldOutcome.SUCCESS)


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(MessageRejected) as caught:
        act()
    return caught.value.code


def edited(command: Command, edit: Callable[[Any], object]) -> bytes:
    wire = pb.AdaptationCommand.FromString(codec.encode_command(command))
    edit(wire)
    return wire.SerializeToString()


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


EDITS: list[tuple[str, Command, Callable[[Any], object], str]] = [
    ("unknown command type", SEED, lambda w: setattr(w, "command_type", 99), "enum"),
    ("command type 0", SEED, lambda w: setattr(w, "command_type", 0), "enum"),
    ("unknown seed operation", SEED, lambda w: setattr(w.seed_operation, "operation", 10), "enum"),
    ("seed operation 0", SEED, lambda w: setattr(w.seed_operation, "operation", 0), "enum"),
    ("version 0", SEED, lambda w: setattr(w, "version", 0), "version"),
    ("version 2", SEED, lambda w: setattr(w, "version", 2), "version"),
    ("no command id", SEED, lambda w: w.ClearField("command_id"), "text"),
    ("long command id", SEED, lambda w: setattr(w, "command_id", "c" * 129), "text"),
    ("path in the blueprint", SEED, lambda w: setattr(w.seed_operation, "blueprint_id", "../../x"), "text"),
    ("newline in a name", SEED, lambda w: setattr(w, "target_seed_id", "blocks.1\n"), "text"),
    ("no blueprint to germinate", SEED, lambda w: w.seed_operation.ClearField("blueprint_id"), "text"),
    ("no target seed", SEED, lambda w: w.ClearField("target_seed_id"), "payload"),
    ("no payload", SEED, lambda w: w.ClearField("payload"), "payload"),
    ("payload of another type", SEED, lambda w: setattr(w, "command_type", 3), "payload"),
    ("payload where none belongs", SEED, lambda w: setattr(w, "command_type", 5), "payload"),
    ("nan", SEED, lambda w: w.seed_operation.parameters.update(rank=math.nan), "not_finite"),
    ("infinity", SEED, lambda w: w.seed_operation.parameters.update(rank=math.inf), "not_finite"),
    ("huge value", SEED, lambda w: w.seed_operation.parameters.update(rank=1e38), "range"),
    ("bad parameter name", SEED, lambda w: w.seed_operation.parameters.update({"a b": 1.0}), "text"),
    ("too many parameters", SEED, lambda w: w.seed_operation.parameters.update({f"p{i}": 1.0 for i in range(33)}),
     "count"),
    ("escape sequence in a reason", SEED, lambda w: w.annotations.update(reason="\x1b[2J"), "text"),
    ("long reason", SEED, lambda w: w.annotations.update(reason="x" * 129), "text"),
    ("too many annotations", SEED, lambda w: w.annotations.update({f"a{i}": "" for i in range(17)}), "count"),
    ("negative time", SEED, lambda w: setattr(w.issued_at, "seconds", -1), "range"),
    ("bad nanoseconds", SEED, lambda w: setattr(w.issued_at, "nanos", 1_000_000_000), "range"),
    ("command that asks for nothing", OPTIMIZER, lambda w: w.optimizer_adjustment.ClearField("hyperparameters"),
     "payload"),
    ("shell in a pattern", OPTIMIZER, lambda w: setattr(w.optimizer_adjustment, "optimizer_id", "$(x)"), "text"),
    ("unknown rollback key", ROLLBACK, lambda w: w.rollback_payload.update({"path": "/tmp"}), "payload"),
    ("unknown rollback target", ROLLBACK, lambda w: w.rollback_payload.update({"target": "best"}), "payload"),
    ("rollback without target", ROLLBACK, lambda w: w.rollback_payload.fields.clear(), "payload"),
    ("rollback to half a step", ROLLBACK, lambda w: w.rollback_payload.update({"step": 1.5}), "payload"),
    ("rollback to step nan", ROLLBACK, lambda w: w.rollback_payload.update({"step": math.nan}), "payload"),
    ("rollback to a negative step", ROLLBACK, lambda w: w.rollback_payload.update({"step": -1}), "payload"),
    ("rollback step as text", ROLLBACK, lambda w: w.rollback_payload.update({"step": "7"}), "payload"),
    ("rollback to a step not named", ROLLBACK, lambda w: w.rollback_payload.fields.pop("step"), "range"),
    ("rollback to good, with a step", ROLLBACK, lambda w: w.rollback_payload.update({"target": "good"}), "payload"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "edit", "code"), [e[1:] for e in EDITS], ids=[e[0] for e in EDITS])
def test_wrong_command_is_rejected(command: Command, edit: Callable[[Any], object], code: str) -> None:
    codec.decode_command(codec.encode_command(command))
    raw = edited(command, edit)
    assert code_of(lambda: codec.decode_command(raw)) == code


def nested(levels: int, inner: bytes = b"") -> bytes:
    for _ in range(levels):
        inner = field(1, field(1, b"k") + field(2, field(5, inner)))
    return inner


COMMAND_RAW = codec.encode_command(SEED)
WIRE: list[tuple[str, bytes, str]] = [
    ("empty", b"", "version"),
    ("unknown field", COMMAND_RAW + b"\xf8\x07\x01", "unknown_field"),
    ("unknown field inside the payload", field(10, b"\x20\x01"), "unknown_field"),
    ("field 0", b"\x02\x00", "unknown_field"),
    ("single value twice", COMMAND_RAW + field(2, b"c9"), "duplicate"),
    ("whole message twice", COMMAND_RAW + COMMAND_RAW, "duplicate"),
    ("two members of the oneof", COMMAND_RAW + field(12, b"\x08\x02"), "duplicate"),
    ("map key twice", COMMAND_RAW + field(20, field(1, b"reason") + field(2, b"other")), "duplicate"),
    ("empty map key twice", field(20, b"") + field(20, field(2, b"x")), "duplicate"),
    ("map key twice inside an entry", field(20, field(1, b"a") + field(1, b"b")), "duplicate"),
    ("wrong wire type", b"\x0a\x01\x01", "parse"),
    ("group", b"\x0b\x0c", "parse"),
    ("cut off inside an integer", b"\x08\x80", "parse"),
    ("integer of eleven bytes", b"\x08" + b"\x80" * 10 + b"\x01", "parse"),
    ("integer of more than 64 bits", b"\x08" + b"\xff" * 9 + b"\x7f", "parse"),
    ("length beyond the end", b"\x12\x05ab", "parse"),
    ("integer that the parser would cut to 1", b"\x08" + varint(2**32 + 1), "range"),
    ("enum that the parser would cut to 1", b"\x18" + varint(2**32 + 1), "range"),
    ("negative enum", b"\x18" + varint(2**64 - 1), "range"),
    ("text that is not UTF-8", b"\x08\x01" + field(2, b"\xff\xfe"), "parse"),
    ("nested one level too deep", field(13, nested(2, field(1, b""))), "depth"),
    ("nested very deep", field(13, nested(40)), "depth"),
    ("nested as deep as is read, but nothing else", field(13, nested(2)), "version"),
    ("too many bytes", b"\x00" * (limits.MAX_COMMAND_BYTES + 1), "size"),
]


@pytest.mark.parametrize(("raw", "code"), [w[1:] for w in WIRE], ids=[w[0] for w in WIRE])
def test_ambiguous_or_malformed_bytes_are_rejected(raw: bytes, code: str) -> None:
    assert code_of(lambda: codec.decode_command(raw)) == code


def test_many_empty_submessages_are_cut_short() -> None:
    flood = b"\x42\x00" * (limits.MAX_FIELDS + 1)
    assert len(flood) < limits.MAX_REQUEST_BYTES
    assert code_of(lambda: codec.decode_state(flood)) == "count"


def test_seed_map_key_twice_is_rejected() -> None:
    entry = field(6, field(1, b"alpha") + b"\x15\x00\x00\x80\x3f")
    seed = field(1, b"s") + b"\x10\x01" + entry + entry
    assert code_of(lambda: codec.decode_state(field(8, seed))) == "duplicate"


def test_fields_in_any_order_and_written_defaults_are_accepted() -> None:
    command = Command(command_id="c", command_type=CommandType.PAUSE)
    raw = b"\x28\x00" + b"\x18\x05" + field(2, b"c") + b"\x08\x01" + field(4, b"")
    assert codec.decode_command(raw) == command


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (lambda w: w.ClearField("state"), "missing"),
        (lambda w: w.state.ClearField("hardware_context"), "missing"),
        (lambda w: setattr(w, "version", 3), "version"),
        (lambda w: setattr(w.state, "version", 3), "version"),
        (lambda w: setattr(w.field_reports[0], "version", 3), "version"),
        (lambda w: setattr(w.field_reports[0], "outcome", 0), "enum"),
        (lambda w: setattr(w.state.seed_states[0], "stage", 12), "enum"),
        (lambda w: setattr(w.state.seed_states[0], "stage", 0), "enum"),
        (lambda w: setattr(w.state.seed_states[0], "gradient_norm", math.inf), "not_finite"),
        (lambda w: setattr(w.state, "validation_loss", math.nan), "not_finite"),
        (lambda w: setattr(w.state, "packet_id", ""), "text"),
        (lambda w: w.field_reports.extend([w.field_reports[0]] * limits.MAX_FIELD_REPORTS), "count"),
        (lambda w: w.state.seed_states.extend([w.state.seed_states[0]] * limits.MAX_SEEDS), "count"),
    ],
)
def test_wrong_request_is_rejected(edit: Callable[[Any], object], code: str) -> None:
    request = PolicyRequest(state=STATE, field_reports=(REPORT,))
    wire = tolaria_pb2.PolicyRequest.FromString(codec.encode_request(request))
    edit(wire)
    assert code_of(lambda: codec.decode_request(wire.SerializeToString())) == code


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (tolaria_pb2.PolicyReply(version=1, commands=[b""] * 65), "count"),
        (tolaria_pb2.PolicyReply(version=2), "version"),
        (tolaria_pb2.PolicyReply(version=1, policy_version="v" * 129), "text"),
        (tolaria_pb2.PolicyReply(version=1, commands=[b"x" * limits.MAX_REPLY_BYTES]), "size"),
    ],
    ids=["65 commands", "version", "long policy version", "size"],
)
def test_wrong_reply_is_rejected(wire: Message, code: str) -> None:
    assert code_of(lambda: codec.decode_reply(wire.SerializeToString())) == code


def test_one_bad_command_does_not_lose_the_others() -> None:
    wire = tolaria_pb2.PolicyReply(version=1, commands=[COMMAND_RAW, b"junk", codec.encode_command(ROLLBACK)])
    first, second, third = codec.decode_reply(wire.SerializeToString()).commands
    assert codec.decode_command(first) == SEED
    assert code_of(lambda: codec.decode_command(second)) in ("parse", "unknown_field")
    assert codec.decode_command(third) == ROLLBACK


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (tolaria_pb2.Decision(version=1, reason="ok"), "enum"),
        (tolaria_pb2.Decision(version=1, reason="ok", source=4), "enum"),  # type: ignore[arg-type]
        (tolaria_pb2.Decision(version=1, source=tolaria_pb2.DECISION_SOURCE_POLICY), "text"),
        (tolaria_pb2.Decision(version=1, reason="ok", source=tolaria_pb2.DECISION_SOURCE_POLICY, commands=[b""] * 65),
         "count"),
    ],
)  # fmt: skip
def test_wrong_decision_is_rejected(wire: Message, code: str) -> None:
    assert code_of(lambda: codec.decode_decision(wire.SerializeToString())) == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"command_id": ""}, "text"),
        ({"command_id": None}, "type"),
        ({"command_type": 1}, "type"),
        ({"payload": None}, "payload"),
        ({"payload": dataclasses.replace(OPTIMIZER).payload}, "payload"),
        ({"payload": SeedCommand(operation=8)}, "type"),  # type: ignore[arg-type]
        ({"payload": SeedCommand(operation=SeedOp.CULL, parameters=[])}, "type"),  # type: ignore[arg-type]
        ({"payload": SeedCommand(operation=SeedOp.CULL, parameters={"x": "1"})}, "type"),  # type: ignore[dict-item]
        ({"payload": SeedCommand(operation=SeedOp.CULL, parameters={"x": True})}, "type"),
        ({"payload": SeedCommand(operation=SeedOp.CULL, parameters={"x": 10**6000})}, "range"),
        ({"execution_deadline_ms": 2**32}, "range"),
        ({"execution_deadline_ms": 10**6000}, "range"),
        ({"execution_deadline_ms": 1.0}, "type"),
        ({"issued_at_ns": -1}, "range"),
        ({"annotations": None}, "type"),
        ({"annotations": {"reason": "\ud800"}}, "text"),
    ],
)
def test_policy_cannot_send_what_the_trainer_would_refuse(change: dict[str, Any], code: str) -> None:
    command = dataclasses.replace(SEED, **change)
    assert code_of(lambda: codec.encode_command(command)) == code
    assert code_of(lambda: codec.encode_reply(PolicyReply(commands=(SEED, command)))) == code


def test_trainer_cannot_send_what_the_policy_would_refuse() -> None:
    diverged = dataclasses.replace(STATE, validation_loss=math.nan)
    assert code_of(lambda: codec.encode_state(diverged)) == "not_finite"
    assert code_of(lambda: codec.encode_request(PolicyRequest(state=diverged))) == "not_finite"
    unknown = Decision(boundary=1, step_effective=1, source="rumour", reason="ok", conservative=False)
    assert code_of(lambda: codec.encode_decision(unknown)) == "text"
    large = Decision(
        boundary=1, step_effective=1, source="policy", reason="ok", conservative=False, commands=(b"x" * 65_000,)
    )
    assert code_of(lambda: codec.encode_decision(large)) == "size"


@pytest.mark.parametrize("text", ["short", "x" * 500, "two\nlines\x1b[2J", "", "\u202eleft", "\ud800"])
def test_clipped_text_can_be_sent(text: str) -> None:
    clipped = limits.clip_text(text)
    command = dataclasses.replace(SEED, annotations={"reason": clipped})
    assert codec.decode_command(codec.encode_command(command)).reason == clipped
    assert clipped == text or len(clipped) == min(len(text), 128)


def test_is_name_says_what_the_codec_accepts() -> None:
    for name in ("blocks.1", "seed/blocks.1", "a", "_x", "x" * 128):
        assert limits.is_name(name)
        codec.encode_command(dataclasses.replace(SEED, target_seed_id=name))
    for name in ("", ".x", "a b", "x" * 129, "é", "a\n"):
        assert not limits.is_name(name)
