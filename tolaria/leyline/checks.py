"""What a domain object must satisfy to be sent or accepted, whatever carried it.

Pure; raises MessageRejected with the codes of `tolaria.leyline.limits`, or "payload" when a command's payload
does not fit its type. Whether a seed exists or a move is legal now is not decided here.
"""

from collections.abc import Mapping

from tolaria.errors import MessageRejected
from tolaria.leyline import limits
from tolaria.leyline.limits import (
    check_count,
    check_enum,
    check_integer,
    check_mapping,
    check_name,
    check_number,
    check_numbers,
    check_pattern,
    check_text,
)
from tolaria.leyline.types import (
    BreakerCommand,
    CircuitState,
    Command,
    CommandType,
    Decision,
    EmergencyLevel,
    EmergencySignal,
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

DECISION_SOURCES = ("policy", "fallback", "operator")

_PAYLOAD_TYPES: dict[CommandType, type[Payload] | None] = {
    CommandType.SEED: SeedCommand,
    CommandType.ROLLBACK: RollbackCommand,
    CommandType.OPTIMIZER: OptimizerCommand,
    CommandType.CIRCUIT_BREAKER: BreakerCommand,
    CommandType.PAUSE: None,
    CommandType.EMERGENCY: None,
    CommandType.STRUCTURAL_PRUNING: None,
}


def check_state(state: SystemState) -> None:
    """Check a whole system state, its hardware and its seeds."""
    check_name("state.packet_id", state.packet_id)
    check_name("state.training_run_id", state.training_run_id)
    check_text("state.experiment_name", state.experiment_name)
    check_name("state.source_subsystem", state.source_subsystem, optional=True)
    check_integer("state.current_epoch", state.current_epoch, limits.MAX_UINT32)
    check_integer("state.global_step", state.global_step, limits.MAX_UINT64)
    check_integer("state.timestamp_ns", state.timestamp_ns, limits.MAX_UINT64)
    for name, value in (
        ("state.validation_accuracy", state.validation_accuracy),
        ("state.validation_loss", state.validation_loss),
        ("state.training_loss", state.training_loss),
    ):
        check_number(name, value, limits.MAX_MEASUREMENT)
    check_numbers(
        "state.training_metrics", state.training_metrics,
        most=limits.MAX_TRAINING_METRICS, bound=limits.MAX_MEASUREMENT,
    )  # fmt: skip
    _check_hardware(state.hardware)
    check_count("state.seeds", len(state.seeds), limits.MAX_SEEDS)
    for seed in state.seeds:
        _check_seed(seed)


def _check_hardware(hardware: HardwareContext) -> None:
    check_name("hardware.device_type", hardware.device_type)
    check_text("hardware.device_id", hardware.device_id)
    check_integer("hardware.compute_capability", hardware.compute_capability, limits.MAX_UINT32)
    for name, value in (
        ("hardware.total_memory_gb", hardware.total_memory_gb),
        ("hardware.available_memory_gb", hardware.available_memory_gb),
        ("hardware.temperature_celsius", hardware.temperature_celsius),
        ("hardware.utilization_percent", hardware.utilization_percent),
    ):
        check_number(name, value, limits.MAX_MEASUREMENT)


def _check_seed(seed: SeedState) -> None:
    check_name("seed.seed_id", seed.seed_id)
    check_enum("seed.stage", seed.stage, SeedStage)
    check_integer("seed.layer_depth", seed.layer_depth, limits.MAX_UINT32)
    check_integer("seed.age_epochs", seed.age_epochs, limits.MAX_UINT32)
    check_number("seed.gradient_norm", seed.gradient_norm, limits.MAX_MEASUREMENT)
    check_number("seed.learning_rate", seed.learning_rate, limits.MAX_MEASUREMENT)
    check_number("seed.risk_score", seed.risk_score, limits.MAX_MEASUREMENT)
    check_numbers("seed.metrics", seed.metrics, most=limits.MAX_SEED_METRICS, bound=limits.MAX_MEASUREMENT)


def check_command(command: Command) -> None:
    """Check one command; its payload must be the one that its type calls for."""
    check_name("command.command_id", command.command_id)
    check_name("command.target_seed_id", command.target_seed_id, optional=True)
    check_text("command.issued_by", command.issued_by)
    check_integer("command.execution_deadline_ms", command.execution_deadline_ms, limits.MAX_UINT32)
    check_integer("command.issued_at_ns", command.issued_at_ns, limits.MAX_TIME_NS)
    check_mapping("command.annotations", command.annotations)
    check_count("command.annotations", len(command.annotations), limits.MAX_ANNOTATIONS)
    for key, text in command.annotations.items():
        check_name("key of command.annotations", key)
        check_text(f"command.annotations[{key}]", text)
    check_enum("command.command_type", command.command_type, CommandType)
    _check_payload(command)


def _check_payload(command: Command) -> None:
    wanted, payload = _PAYLOAD_TYPES[command.command_type], command.payload
    if type(payload) is not (wanted or type(None)):
        has = "no payload" if payload is None else type(payload).__name__
        needs = "no payload" if wanted is None else wanted.__name__
        raise MessageRejected("payload", f"a {command.command_type.name} command with {has}, expected {needs}")
    if isinstance(payload, SeedCommand):
        _check_seed_command(payload, command.target_seed_id)
    elif isinstance(payload, OptimizerCommand):
        check_pattern("optimizer.optimizer_id", payload.optimizer_id)
        _check_values("optimizer.hyperparameters", payload.hyperparameters)
        if not payload.hyperparameters:
            raise MessageRejected("payload", "optimizer.hyperparameters is empty: the command asks for nothing")
    elif isinstance(payload, BreakerCommand):
        check_enum("breaker.desired_state", payload.desired_state, CircuitState)
        check_text("breaker.rationale", payload.rationale)
    elif isinstance(payload, RollbackCommand):
        _check_rollback(payload)


def _check_values(where: str, values: Mapping[str, float]) -> None:
    check_numbers(where, values, most=limits.MAX_PARAMETERS, bound=limits.MAX_COMMAND_VALUE)


def _check_seed_command(payload: SeedCommand, target: str) -> None:
    check_enum("seed_operation.operation", payload.operation, SeedOp)
    if not target:
        raise MessageRejected("payload", f"{payload.operation.name} names no target_seed_id")
    check_name("seed_operation.blueprint_id", payload.blueprint_id, optional=payload.operation is not SeedOp.GERMINATE)
    _check_values("seed_operation.parameters", payload.parameters)


def _check_rollback(payload: RollbackCommand) -> None:
    check_text("rollback.reason", payload.reason)
    if payload.target == "step":
        # The wire carries the step as a double, which is exact up to here.
        check_integer("rollback.step", payload.step, 2**53)
    elif payload.target != "good":
        raise MessageRejected("payload", f"rollback.target={payload.target!r:.40}: expected 'good' or 'step'")
    elif payload.step != -1:
        raise MessageRejected("payload", "rollback.step is set, but the target is 'good'")


def check_report(report: FieldReport) -> None:
    """Check one field report."""
    check_name("report.report_id", report.report_id)
    check_text("report.command_id", report.command_id)
    check_enum("report.outcome", report.outcome, FieldOutcome)
    check_name("report.training_run_id", report.training_run_id)
    check_text("report.seed_id", report.seed_id)
    check_text("report.blueprint_id", report.blueprint_id)
    check_text("report.tamiyo_policy_version", report.tamiyo_policy_version)
    check_text("report.notes", report.notes)
    check_integer("report.observation_window_epochs", report.observation_window_epochs, limits.MAX_UINT32)
    check_integer("report.issued_at_ns", report.issued_at_ns, limits.MAX_TIME_NS)
    check_numbers("report.metrics", report.metrics, most=limits.MAX_SEED_METRICS, bound=limits.MAX_MEASUREMENT)


def check_signal_values(signal: EmergencySignal) -> None:
    """Check the level and the texts of an emergency; its mark is the frame's affair."""
    check_enum("signal.level", signal.level, EmergencyLevel)
    check_text("signal.reason", signal.reason)
    check_text("signal.origin", signal.origin)
    check_integer("signal.mark", signal.mark, limits.MAX_UINT64)


def check_decision(decision: Decision) -> None:
    """Check a decision; its commands are checked when each is decoded."""
    check_integer("decision.boundary", decision.boundary, limits.MAX_UINT32)
    check_integer("decision.step_effective", decision.step_effective, limits.MAX_UINT64)
    check_name("decision.reason", decision.reason)
    if decision.source not in DECISION_SOURCES:
        raise MessageRejected("text", f"decision.source={decision.source!r:.40}: expected one of {DECISION_SOURCES}")
    check_count("decision.commands", len(decision.commands), limits.MAX_COMMANDS)
