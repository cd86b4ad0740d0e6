"""Domain objects to generated messages and back, field by field. Called by the codec, which does the checking.

What the generated types allow and the domain types cannot hold is refused here: unknown enum numbers ("enum"),
absent parts ("missing"), another version ("version"), a rollback payload of another form ("payload").
"""

from enum import IntEnum
from typing import TypeVar, cast

from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from tolaria.errors import MessageRejected
from tolaria.leyline.generated import leyline_pb2 as pb
from tolaria.leyline.generated import tolaria_pb2 as tolaria_pb
from tolaria.leyline.limits import MAX_TIME_NS, MESSAGE_VERSION, check_version
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
    RollbackCommand,
    SeedCommand,
    SeedOp,
    SeedStage,
    SeedState,
    SystemState,
)

_E = TypeVar("_E", bound=IntEnum)
_NS = 1_000_000_000
_SOURCES = {
    "policy": tolaria_pb.DECISION_SOURCE_POLICY, "fallback": tolaria_pb.DECISION_SOURCE_FALLBACK,
    "operator": tolaria_pb.DECISION_SOURCE_OPERATOR,
}  # fmt: skip
_SOURCE_NAMES = {number: name for name, number in _SOURCES.items()}


def state_to_wire(state: SystemState) -> pb.SystemStatePacket:
    """The packet of a checked state."""
    hardware = state.hardware
    return pb.SystemStatePacket(
        version=MESSAGE_VERSION,
        current_epoch=state.current_epoch,
        validation_accuracy=state.validation_accuracy,
        validation_loss=state.validation_loss,
        timestamp_ns=state.timestamp_ns,
        hardware_context=pb.HardwareContext(
            device_type=hardware.device_type,
            device_id=hardware.device_id,
            total_memory_gb=hardware.total_memory_gb,
            available_memory_gb=hardware.available_memory_gb,
            temperature_celsius=hardware.temperature_celsius,
            utilization_percent=hardware.utilization_percent,
            compute_capability=hardware.compute_capability,
        ),
        training_metrics=state.training_metrics,
        seed_states=[_seed_to_wire(seed) for seed in state.seeds],
        packet_id=state.packet_id,
        global_step=state.global_step,
        training_loss=state.training_loss,
        source_subsystem=state.source_subsystem,
        training_run_id=state.training_run_id,
        experiment_name=state.experiment_name,
    )


def state_from_wire(packet: pb.SystemStatePacket) -> SystemState:
    """The state of a parsed packet, values still unchecked."""
    check_version("SystemStatePacket", packet.version)
    if not packet.HasField("hardware_context"):
        raise MessageRejected("missing", "SystemStatePacket has no hardware_context")
    hardware = packet.hardware_context
    return SystemState(
        packet_id=packet.packet_id,
        current_epoch=packet.current_epoch,
        global_step=packet.global_step,
        validation_accuracy=packet.validation_accuracy,
        validation_loss=packet.validation_loss,
        training_loss=packet.training_loss,
        timestamp_ns=packet.timestamp_ns,
        training_run_id=packet.training_run_id,
        experiment_name=packet.experiment_name,
        hardware=HardwareContext(
            device_type=hardware.device_type,
            device_id=hardware.device_id,
            total_memory_gb=hardware.total_memory_gb,
            available_memory_gb=hardware.available_memory_gb,
            temperature_celsius=hardware.temperature_celsius,
            utilization_percent=hardware.utilization_percent,
            compute_capability=hardware.compute_capability,
        ),
        seeds=tuple(_seed_from_wire(seed) for seed in packet.seed_states),
        training_metrics=dict(packet.training_metrics),
        source_subsystem=packet.source_subsystem,
    )


def _seed_to_wire(seed: SeedState) -> pb.SeedState:
    return pb.SeedState(
        seed_id=seed.seed_id,
        stage=cast(pb.SeedLifecycleStage, seed.stage),
        gradient_norm=seed.gradient_norm,
        learning_rate=seed.learning_rate,
        layer_depth=seed.layer_depth,
        metrics=seed.metrics,
        age_epochs=seed.age_epochs,
        risk_score=seed.risk_score,
    )


def _seed_from_wire(seed: pb.SeedState) -> SeedState:
    return SeedState(
        seed_id=seed.seed_id,
        stage=member("SeedState.stage", SeedStage, seed.stage),
        gradient_norm=seed.gradient_norm,
        learning_rate=seed.learning_rate,
        layer_depth=seed.layer_depth,
        metrics=dict(seed.metrics),
        age_epochs=seed.age_epochs,
        risk_score=seed.risk_score,
    )


def report_to_wire(report: FieldReport) -> pb.FieldReport:
    """The message of a checked report."""
    return pb.FieldReport(
        version=MESSAGE_VERSION,
        report_id=report.report_id,
        command_id=report.command_id,
        training_run_id=report.training_run_id,
        seed_id=report.seed_id,
        blueprint_id=report.blueprint_id,
        outcome=cast(pb.FieldReportOutcome, report.outcome),
        metrics=report.metrics,
        observation_window_epochs=report.observation_window_epochs,
        issued_at=timestamp(report.issued_at_ns),
        tamiyo_policy_version=report.tamiyo_policy_version,
        notes=report.notes,
    )


def report_from_wire(report: pb.FieldReport) -> FieldReport:
    """The report of a parsed message, values still unchecked."""
    # follow_up_actions are advice between Esper's other parts; Tolaria neither writes nor reads them.
    check_version("FieldReport", report.version)
    return FieldReport(
        report_id=report.report_id,
        command_id=report.command_id,
        training_run_id=report.training_run_id,
        outcome=member("FieldReport.outcome", FieldOutcome, report.outcome),
        seed_id=report.seed_id,
        blueprint_id=report.blueprint_id,
        metrics=dict(report.metrics),
        observation_window_epochs=report.observation_window_epochs,
        issued_at_ns=nanoseconds("FieldReport.issued_at", report.issued_at),
        tamiyo_policy_version=report.tamiyo_policy_version,
        notes=report.notes,
    )


def command_to_wire(command: Command) -> pb.AdaptationCommand:
    """The message of a checked command."""
    wire = pb.AdaptationCommand(
        version=MESSAGE_VERSION,
        command_id=command.command_id,
        command_type=cast(pb.CommandType, command.command_type),
        target_seed_id=command.target_seed_id,
        execution_deadline_ms=command.execution_deadline_ms,
        issued_at=timestamp(command.issued_at_ns),
        issued_by=command.issued_by,
        annotations=command.annotations,
    )
    payload = command.payload
    if isinstance(payload, SeedCommand):
        wire.seed_operation.operation = cast(pb.SeedOperation, payload.operation)
        wire.seed_operation.blueprint_id = payload.blueprint_id
        wire.seed_operation.parameters.update(payload.parameters)
    elif isinstance(payload, OptimizerCommand):
        wire.optimizer_adjustment.optimizer_id = payload.optimizer_id
        wire.optimizer_adjustment.hyperparameters.update(payload.hyperparameters)
    elif isinstance(payload, BreakerCommand):
        wire.circuit_breaker.desired_state = cast(pb.CircuitBreakerState, payload.desired_state)
        wire.circuit_breaker.rationale = payload.rationale
    elif isinstance(payload, RollbackCommand):
        wire.rollback_payload["target"] = payload.target
        if payload.target == "step":
            wire.rollback_payload["step"] = payload.step
        if payload.reason:
            wire.rollback_payload["reason"] = payload.reason
    return wire


def command_from_wire(wire: pb.AdaptationCommand) -> Command:
    """The command of a parsed message, values still unchecked."""
    check_version("AdaptationCommand", wire.version)
    return Command(
        command_id=wire.command_id,
        command_type=member("AdaptationCommand.command_type", CommandType, wire.command_type),
        target_seed_id=wire.target_seed_id,
        payload=_payload_from_wire(wire),
        execution_deadline_ms=wire.execution_deadline_ms,
        issued_at_ns=nanoseconds("AdaptationCommand.issued_at", wire.issued_at),
        issued_by=wire.issued_by,
        annotations=dict(wire.annotations),
    )


def _payload_from_wire(wire: pb.AdaptationCommand) -> Payload | None:
    which = wire.WhichOneof("payload")
    if which == "seed_operation":
        seed = wire.seed_operation
        return SeedCommand(
            operation=member("CommandSeedOperation.operation", SeedOp, seed.operation),
            blueprint_id=seed.blueprint_id,
            parameters=dict(seed.parameters),
        )
    if which == "optimizer_adjustment":
        adjustment = wire.optimizer_adjustment
        return OptimizerCommand(optimizer_id=adjustment.optimizer_id, hyperparameters=dict(adjustment.hyperparameters))
    if which == "circuit_breaker":
        breaker = wire.circuit_breaker
        state = member("CommandCircuitBreaker.desired_state", CircuitState, breaker.desired_state)
        return BreakerCommand(desired_state=state, rationale=breaker.rationale)
    if which == "rollback_payload":
        return _rollback_from_wire(wire.rollback_payload)
    return None


def _rollback_from_wire(struct: Struct) -> RollbackCommand:
    if extra := sorted(set(struct.fields) - {"target", "step", "reason"}):
        raise MessageRejected("payload", f"rollback_payload has the unknown key {extra[0]!r:.40}")
    for key, kind in (("target", "string_value"), ("step", "number_value"), ("reason", "string_value")):
        if key in struct.fields and struct.fields[key].WhichOneof("kind") != kind:
            raise MessageRejected("payload", f"rollback_payload.{key}: expected a {kind}")
    # Reading an absent key of the map would insert it.
    target = struct.fields["target"].string_value if "target" in struct.fields else ""
    reason = struct.fields["reason"].string_value if "reason" in struct.fields else ""
    step = -1
    if "step" in struct.fields:
        number = struct.fields["step"].number_value
        if not (0 <= number <= 2**53 and number.is_integer()):
            raise MessageRejected("payload", f"rollback_payload.step={number}: expected an integer of 0 or more")
        step = int(number)
    return RollbackCommand(target=target, step=step, reason=reason)


def decision_to_wire(decision: Decision) -> tolaria_pb.Decision:
    """The message of a checked decision."""
    return tolaria_pb.Decision(
        version=MESSAGE_VERSION,
        boundary=decision.boundary,
        step_effective=decision.step_effective,
        source=_SOURCES[decision.source],
        reason=decision.reason,
        conservative=decision.conservative,
        commands=decision.commands,
    )


def decision_from_wire(wire: tolaria_pb.Decision) -> Decision:
    """The decision of a parsed message, values still unchecked."""
    check_version("Decision", wire.version)
    if wire.source not in _SOURCE_NAMES:
        raise MessageRejected("enum", f"Decision.source={wire.source}: not a known value")
    return Decision(
        boundary=wire.boundary,
        step_effective=wire.step_effective,
        source=_SOURCE_NAMES[wire.source],
        reason=wire.reason,
        conservative=wire.conservative,
        commands=tuple(wire.commands),
    )


def member(where: str, kind: type[_E], number: int) -> _E:
    """The member of ``kind`` with this number. Raises MessageRejected("enum")."""
    try:
        return kind(number)
    except ValueError:
        raise MessageRejected("enum", f"{where}={number}: not a known value") from None


def timestamp(time_ns: int) -> Timestamp | None:
    """A time as the wire has it."""
    # 0 means "not said" and takes no bytes.
    return Timestamp(seconds=time_ns // _NS, nanos=time_ns % _NS) if time_ns else None


def nanoseconds(where: str, time: Timestamp) -> int:
    """A time of the wire in nanoseconds since 1970. Raises MessageRejected("range")."""
    if not (0 <= time.seconds <= MAX_TIME_NS // _NS and 0 <= time.nanos < _NS):
        raise MessageRejected("range", f"{where}: {time.seconds} s, {time.nanos} ns is no time after 1970")
    return time.seconds * _NS + time.nanos
