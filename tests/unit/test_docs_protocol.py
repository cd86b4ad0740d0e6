"""docs/protocol.md says what the code does: offsets, limits, keys, codes, and its example byte for byte."""

import re
from pathlib import Path

import pytest

from tolaria.config_tamiyo import TamiyoConfig
from tolaria.kasmina.lifecycle import FORWARD, MOVES
from tolaria.leyline import framing, limits
from tolaria.leyline.codec import decode_command, decode_reply, decode_request, decode_signal, encode_request
from tolaria.leyline.framing import (
    FrameKind,
    KeyRing,
    check_reply,
    generation_number,
    open_frame,
    request_header,
    run_id_bytes,
    seal,
)
from tolaria.leyline.keys import hkdf_sha256, key_id
from tolaria.leyline.types import CommandType, SeedCommand, SeedOp, SeedStage
from tolaria.tamiyo import recording

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
HEX = {name: bytes.fromhex("".join(text.split())) for name, text in re.findall(r"```hex (\w+)\n(.*?)```", PAGE, re.S)}


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose heading begins like this."""
    (at,) = [m.start() for m in re.finditer(re.escape(head), PAGE)]
    body = PAGE[at:].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in body]


VECTOR = {name: value.strip("`") for name, value in rows("| test vector |")}
KEYS = KeyRing([bytes.fromhex(VECTOR["key"])])


def test_the_offsets_are_those_of_the_header() -> None:
    at = 0
    packed = {"magic": "4s", "run_id": "16s", "corr_id": "16s", "request_sha256": "32s"}
    codes = {1: "B", 2: "H", 4: "I", 8: "Q"}
    form = "!"
    table = [row for row in rows("| offset | bytes |") if row[2] not in ("payload", "mac")]
    for offset, size, name, _ in table:
        assert int(offset) == at, name
        at += int(size)
        form += packed.get(name) or codes[int(size)]
    assert (at, form) == (framing.HEADER_BYTES, framing._HEADER.format)
    assert [row[1] for row in rows("| offset | bytes |")[-2:]] == ["length", str(framing.MAC_BYTES)]


def test_the_kinds_and_sizes_are_those_of_the_code() -> None:
    told = {int(kind): int(most.replace(",", "")) for kind, _, _, most in rows("| kind | from |")}
    policies = (FrameKind.REQUEST, FrameKind.REPLY, FrameKind.SIGNAL)
    assert told == {kind.value: kind.max_payload_bytes for kind in policies}
    assert f"136 to {FrameKind.REQUEST.max_frame_bytes:,} bytes" in PAGE
    assert framing.OVERHEAD_BYTES == 136
    assert f"{limits.MAX_COMMANDS} of at most {limits.MAX_COMMAND_BYTES:,} bytes" in " ".join(PAGE.split())
    assert "nesting deeper than 8" in PAGE and limits.MAX_DEPTH == 8


def test_the_key_vector_is_right() -> None:
    key = bytes.fromhex(VECTOR["key"])
    assert f"{key_id(key):08x}" == VECTOR["key_id"]
    run_id = run_id_bytes(VECTOR["run's id"])
    assert run_id.hex() == VECTOR["run_id"]
    assert f"{generation_number('example-start'):08x}" == VECTOR["generation of `example-start`"]
    for direction in ("to-policy", "to-trainer"):
        derived = KEYS.derive(direction, run_id)
        assert derived.hex() == VECTOR[f"mac key {direction}"]
        assert derived == hkdf_sha256(key, b"tolaria leyline v1", b"frame\0" + direction.encode() + b"\0" + run_id)


def test_the_example_question_is_a_question() -> None:
    frame = open_frame(HEX["question"], KEYS, FrameKind.REQUEST)
    assert (len(HEX["payload"]), len(HEX["question"])) == (138, 274)
    assert frame.payload == HEX["payload"]
    header = frame.header
    assert (header.boundary, header.seq, header.wall_ns) == (3, 3, 1_000_000_000)
    assert header.corr_id == bytes(range(0xA0, 0xB0))
    asked = decode_request(frame.payload)
    assert encode_request(asked) == HEX["payload"]
    assert [(seed.seed_id, seed.stage) for seed in asked.state.seeds] == [("late", SeedStage.DORMANT)]
    again = request_header(run_id="example-run", generation="example-start", boundary=3, seq=3,
                           payload=HEX["payload"], wall_ns=header.wall_ns)  # fmt: skip
    assert (again.run_id, again.generation, again.request_sha256) == (
        header.run_id, header.generation, header.request_sha256,
    )  # fmt: skip
    assert seal(header, HEX["payload"], KEYS) == HEX["question"]


def test_the_example_answer_answers_it_and_the_signal_is_one() -> None:
    question = open_frame(HEX["question"], KEYS, FrameKind.REQUEST).header
    answer = open_frame(HEX["answer"], KEYS, FrameKind.REPLY)
    check_reply(question, answer.header)
    assert (answer.header.seq, answer.header.wall_ns) == (1, 2_000_000_000)
    reply = decode_reply(answer.payload)
    (command,) = [decode_command(raw) for raw in reply.commands]
    assert (command.command_id, command.issued_by, command.reason) == ("b3-0", "example-1", "gradient 0.25")
    assert command.payload == SeedCommand(operation=SeedOp.GERMINATE, blueprint_id="low_rank")
    signal = open_frame(HEX["signal"], KEYS, FrameKind.SIGNAL)
    told = decode_signal(signal.payload, mark=signal.header.seq)
    assert (told.level, told.mark, told.reason, signal.header.wall_ns) == (3, 7, "loss", 3_000_000_000)


def test_every_code_of_a_refused_message_is_listed() -> None:
    listed = {code for row in rows("| code | meaning |") for code in re.findall(r"`(\w+)`", row[0])}
    sources = [*(ROOT / "tolaria" / "leyline").glob("*.py"), ROOT / "tolaria" / "tamiyo" / "desk.py"]
    raised = {code for p in sources for code in re.findall(r'MessageRejected\(\s*"(\w+)"', p.read_text("utf-8"))}
    chosen = {"unknown_key", "revoked_key", "range", "not_finite", *("boundary", "correlation", "request_digest")}
    assert listed == raised | chosen


def test_stages_operations_and_types_are_those_of_the_code() -> None:
    for name, number, forward, others in rows("| stage | | operation"):
        stage = SeedStage[name]
        assert stage == int(number)
        ops = {SeedOp[word]: int(n) for word, n in re.findall(r"(\w+) (\d+)", f"{forward}, {others}")}
        assert all(op == n for op, n in ops.items())
        assert set(ops) == {op for at, op in MOVES if at == stage}
        on = FORWARD.get(stage, SeedOp.GERMINATE if stage == SeedStage.DORMANT else None)
        assert forward == (f"{on.name} {on.value}" if on is not None else "")
    types = " ".join(PAGE.split()).partition("| command_type | 3 | ")[2].partition(" |")[0]
    told = {int(n): word.strip() for n, word in re.findall(r"(\d) ([a-z ]+)", types)}
    assert told == {n.value: n.name.lower().replace("_", " ") for n in CommandType if n.value <= 5}


def test_the_defaults_in_the_text_are_those_of_the_configuration() -> None:
    config, text = TamiyoConfig(), " ".join(PAGE.split())
    assert f"after {config.resend_ms / 1000:g} s (`tamiyo.resend_ms`)" in text
    assert f"`tamiyo.deadline_ms` ({config.deadline_ms / 1000:g} s)" in text
    assert (config.breaker_failures, config.breaker_rest, config.probe_deadline_ms) == (3, 5, 500)
    assert {f"`tamiyo.{key}`" in text for key in ("record", "record_mb")} == {True}
    assert config.record


def test_the_record_is_laid_out_as_described() -> None:
    assert (recording._ENTRY.format, recording._ENTRY.size) == ("!4sB3xQII", 24)
    assert recording.MARK == b"TLYR"
    assert {what.name: what.value for what in recording.What} == {"REQUEST": 1, "REPLY": 2, "SIGNAL": 3, "MALFORMED": 4}
    for name in (recording.FILE_NAME, recording.OLDER_NAME):
        assert name in PAGE


@pytest.mark.parametrize("limit", ["64 commands", "256 slots", "1e30"])
def test_the_checklist_names_the_limits(limit: str) -> None:
    assert limit in PAGE.partition("## Checklist")[2]
    assert (limits.MAX_COMMANDS, limits.MAX_SEEDS, round(limits.MAX_MEASUREMENT / 1e30, 6)) == (64, 256, 1.0)
