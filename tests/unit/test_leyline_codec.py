"""What goes out comes back equal, whatever comes in is either a checked object or MessageRejected."""

import contextlib
import dataclasses
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolaria.errors import MessageRejected
from tolaria.frames import FRAME_CAPACITY_BYTES
from tolaria.leyline import codec, limits
from tolaria.leyline.types import (
    BreakerCommand,
    CircuitState,
    Command,
    CommandType,
    Decision,
    FieldOutcome,
    FieldReport,
    HardwareContext,
    OptimizerCommand,
    Payload,
    PolicyReply,
    PolicyRequest,
    RollbackCommand,
    SeedCommand,
    SeedOp,
    SeedStage,
    SeedState,
    SystemState,
)

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:/@+-]{0,127}", fullmatch=True)
patterns = st.from_regex(r"[A-Za-z0-9_.:/@+*?\[\]!-]{1,128}", fullmatch=True)
texts = st.text(max_size=128).filter(str.isprintable)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
times = st.integers(0, 2**63 - 1)


def numbers(bound: float) -> st.SearchStrategy[float]:
    return st.floats(-bound, bound, width=32, allow_nan=False)


measurements = numbers(2.0**99)
values = numbers(2.0**29)


def maps(of: st.SearchStrategy[float]) -> st.SearchStrategy[dict[str, float]]:
    return st.dictionaries(names, of, max_size=4)


hardware = st.builds(
    HardwareContext,
    device_type=names,
    device_id=texts,
    total_memory_gb=measurements,
    available_memory_gb=measurements,
    temperature_celsius=measurements,
    utilization_percent=measurements,
    compute_capability=u32,
)
seeds = st.builds(
    SeedState,
    seed_id=names,
    stage=st.sampled_from(SeedStage),
    gradient_norm=measurements,
    learning_rate=measurements,
    layer_depth=u32,
    metrics=maps(measurements),
    age_epochs=u32,
    risk_score=measurements,
)
states = st.builds(
    SystemState,
    packet_id=names,
    current_epoch=u32,
    global_step=u64,
    validation_accuracy=measurements,
    validation_loss=measurements,
    training_loss=measurements,
    timestamp_ns=u64,
    training_run_id=names,
    experiment_name=texts,
    hardware=hardware,
    seeds=st.lists(seeds, max_size=3).map(tuple),
    training_metrics=maps(measurements),
    source_subsystem=st.just("") | names,
)
reports = st.builds(
    FieldReport,
    report_id=names,
    command_id=texts,
    training_run_id=names,
    outcome=st.sampled_from(FieldOutcome),
    seed_id=texts,
    blueprint_id=texts,
    metrics=maps(measurements),
    observation_window_epochs=u32,
    issued_at_ns=times,
    tamiyo_policy_version=texts,
    notes=texts,
)
requests = st.builds(PolicyRequest, state=states, field_reports=st.lists(reports, max_size=3).map(tuple))
payloads: dict[CommandType, st.SearchStrategy[Payload | None]] = {
    CommandType.SEED: st.builds(
        SeedCommand, operation=st.sampled_from(SeedOp), blueprint_id=names, parameters=maps(values)
    ),
    CommandType.OPTIMIZER: st.builds(
        OptimizerCommand, optimizer_id=patterns, hyperparameters=st.dictionaries(names, values, min_size=1, max_size=4)
    ),
    CommandType.CIRCUIT_BREAKER: st.builds(
        BreakerCommand, desired_state=st.sampled_from(CircuitState), rationale=texts
    ),
    CommandType.ROLLBACK: st.builds(RollbackCommand, target=st.just("good"), reason=texts)
    | st.builds(RollbackCommand, target=st.just("step"), step=st.integers(0, 2**53), reason=texts),
    CommandType.PAUSE: st.none(),
    CommandType.EMERGENCY: st.none(),
    CommandType.STRUCTURAL_PRUNING: st.none(),
}


@st.composite
def commands(draw: st.DrawFn) -> Command:
    kind = draw(st.sampled_from(CommandType))
    return Command(
        command_id=draw(names),
        command_type=kind,
        target_seed_id=draw(names),
        payload=draw(payloads[kind]),
        execution_deadline_ms=draw(u32),
        issued_at_ns=draw(times),
        issued_by=draw(texts),
        annotations=draw(st.dictionaries(names, texts, max_size=3)),
    )


decisions = st.builds(
    Decision,
    boundary=u32,
    step_effective=u64,
    source=st.sampled_from(["policy", "fallback"]),
    reason=names,
    conservative=st.booleans(),
    commands=st.lists(st.binary(max_size=40), max_size=4).map(tuple),
)

DECODERS: dict[str, Callable[[bytes], object]] = {
    "state": codec.decode_state,
    "request": codec.decode_request,
    "command": codec.decode_command,
    "reply": codec.decode_reply,
    "decision": codec.decode_decision,
}
ENCODED: dict[str, st.SearchStrategy[bytes]] = {
    "state": states.map(codec.encode_state),
    "request": requests.map(codec.encode_request),
    "command": commands().map(codec.encode_command),
    "reply": st.lists(commands(), max_size=2).map(lambda c: codec.encode_reply(PolicyReply(commands=tuple(c)))),
    "decision": decisions.map(codec.encode_decision),
}


@settings(max_examples=60, deadline=None)
@given(states)
def test_state_round_trip(state: SystemState) -> None:
    assert codec.decode_state(codec.encode_state(state)) == state


@settings(max_examples=30, deadline=None)
@given(requests)
def test_request_round_trip(request: PolicyRequest) -> None:
    assert codec.decode_request(codec.encode_request(request)) == request


@settings(max_examples=150, deadline=None)
@given(commands())
def test_command_round_trip(command: Command) -> None:
    decoded = codec.decode_command(codec.encode_command(command))
    assert decoded == command
    assert type(decoded.payload) is type(command.payload)


@settings(max_examples=40, deadline=None)
@given(st.lists(commands(), max_size=4), texts)
def test_reply_carries_the_exact_commands(sent: list[Command], version: str) -> None:
    received = codec.decode_reply(codec.encode_reply(PolicyReply(commands=tuple(sent), policy_version=version)))
    assert received.policy_version == version
    assert received.commands == tuple(codec.encode_command(command) for command in sent)
    assert [codec.decode_command(raw) for raw in received.commands] == sent


@settings(max_examples=60, deadline=None)
@given(decisions)
def test_decision_round_trip(decision: Decision) -> None:
    assert codec.decode_decision(codec.encode_decision(decision)) == decision


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_message_rejected(kind: str, raw: bytes) -> None:
    _decode_or_reject(kind, raw)


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_damaged_messages_raise_nothing_but_message_rejected(kind: str, data: st.DataObject) -> None:
    raw = bytearray(data.draw(ENCODED[kind]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, min(len(raw), start + 4)))
        raw[start:end] = data.draw(st.binary(max_size=4))
    _decode_or_reject(kind, bytes(raw))


def _decode_or_reject(kind: str, raw: bytes) -> None:
    # Anything else than this one error leaves the test.
    with contextlib.suppress(MessageRejected):
        assert DECODERS[kind](raw) is not None


@pytest.mark.parametrize("kind", ["state", "request", "command"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_cut_of_a_message_is_rejected_or_complete_in_itself(kind: str, data: st.DataObject) -> None:
    raw = data.draw(ENCODED[kind])
    cut = data.draw(st.integers(0, len(raw) - 1))
    try:
        decoded = DECODERS[kind](raw[:cut])
    except MessageRejected:
        return
    # A prefix can be whole by itself, but then it says less: it is never taken for the full message.
    assert decoded != DECODERS[kind](raw)


def full_state(num_seeds: int) -> SystemState:
    seed = SeedState(
        seed_id="blocks.1", stage=SeedStage.BLENDING, gradient_norm=0.125, learning_rate=1e-3, layer_depth=12,
        age_epochs=300, risk_score=0.25,
    )  # fmt: skip
    return SystemState(
        packet_id="3f2a9c5d7e1b4a60", current_epoch=300, global_step=1_000_000, validation_accuracy=0.91,
        validation_loss=0.31, training_loss=0.29, timestamp_ns=1_790_000_000_000_000_000,
        training_run_id="20260101T120000Z-digits-0a1b2c3d", experiment_name="digits",
        hardware=HardwareContext(
            device_type="cuda", device_id="NVIDIA H100 80GB HBM3", total_memory_gb=79.6, available_memory_gb=41.5,
            temperature_celsius=61.0, utilization_percent=98.0, compute_capability=90,
        ),
        seeds=tuple(dataclasses.replace(seed, seed_id=f"blocks.{i}") for i in range(num_seeds)),
    )  # fmt: skip


def test_packet_with_two_seeds_and_no_metrics_is_small() -> None:
    assert len(codec.encode_state(full_state(2))) <= 280


def test_equal_objects_give_equal_bytes() -> None:
    one = dataclasses.replace(full_state(1), training_metrics={"a": 1.0, "b": 2.0, "c": 3.0})
    other = dataclasses.replace(full_state(1), training_metrics={"c": 3.0, "a": 1.0, "b": 2.0})
    assert codec.encode_state(one) == codec.encode_state(other)


def test_largest_reply_fits_a_decision_and_a_decision_the_broadcast() -> None:
    command = b"x" * (limits.MAX_REPLY_BYTES // limits.MAX_COMMANDS - 8)
    reply = codec.ReceivedReply(commands=(command,) * limits.MAX_COMMANDS, policy_version="v" * 128)
    received = codec.decode_reply(codec.encode_received_reply(reply))
    decision = Decision(
        boundary=2**32 - 1, step_effective=2**64 - 1, source="fallback", reason="r" * 128, conservative=True,
        commands=received.commands,
    )  # fmt: skip
    raw = codec.encode_decision(decision)
    assert len(raw) > limits.MAX_REPLY_BYTES - 1024
    assert codec.decode_decision(raw) == decision
    assert limits.MAX_DECISION_BYTES + 36 <= FRAME_CAPACITY_BYTES


def test_reader_takes_whatever_is_within_the_counts() -> None:
    metrics = {f"metric/{i}": float(i) for i in range(limits.MAX_SEED_METRICS)}
    seed = SeedState(seed_id="s", stage=SeedStage.TRAINING, metrics=metrics, gradient_norm=1.0, layer_depth=1)
    report = FieldReport(
        report_id="r", command_id="c", training_run_id="t", outcome=FieldOutcome.SUCCESS, metrics=metrics
    )
    state = dataclasses.replace(full_state(0), seeds=(seed,) * limits.MAX_SEEDS)
    request = PolicyRequest(state=state, field_reports=(report,) * limits.MAX_FIELD_REPORTS)
    decoded = codec.decode_request(codec.encode_request(request))
    assert decoded.state.seeds == request.state.seeds
    assert decoded.field_reports == request.field_reports


@given(st.floats(-1e9, 1e9, width=32))
def test_a_number_as_written_is_the_same_number_on_the_wire(value: float) -> None:
    written = limits.as_written(value)
    assert struct.unpack("<f", struct.pack("<f", written))[0] == value


@given(st.integers(-999_999, 999_999), st.integers(-9, 3))
def test_a_short_decimal_survives_the_wire(digits: int, exponent: int) -> None:
    meant = float(f"{digits}e{exponent}")
    assert limits.as_written(struct.unpack("<f", struct.pack("<f", meant))[0]) == meant
