"""The schemas are Esper's contract: numbers as agreed, code generated from them, domain enums equal to theirs."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor, FileDescriptor

from tolaria.leyline import types
from tolaria.leyline.generated import leyline_pb2, tolaria_pb2

REPOSITORY = Path(__file__).resolve().parents[2]
LEYLINE: FileDescriptor = leyline_pb2.DESCRIPTOR
TOLARIA: FileDescriptor = tolaria_pb2.DESCRIPTOR

ENUMS = {
    "SeedLifecycleStage": ("SEED_STAGE_", types.SeedStage),
    "SeedLifecycleGate": ("SEED_GATE_", types.SeedGate),
    "HealthStatus": ("HEALTH_STATUS_", types.HealthStatus),
    "CircuitBreakerState": ("CIRCUIT_STATE_", types.CircuitState),
    "CommandType": ("COMMAND_", types.CommandType),
    "SeedOperation": ("SEED_OP_", types.SeedOp),
    "TelemetryLevel": ("TELEMETRY_LEVEL_", types.TelemetryLevel),
    "MessagePriority": ("MESSAGE_PRIORITY_", types.MessagePriority),
    "EmergencyLevel": ("EMERGENCY_LEVEL_", types.EmergencyLevel),
    "FieldReportOutcome": ("FIELD_REPORT_OUTCOME_", types.FieldOutcome),
}

# Written out once more, by hand: a number changed in the schema by mistake must not pass.
MESSAGES = {
    "HardwareContext": "device_type:string=1 device_id:string=2 total_memory_gb:float=3 available_memory_gb:float=4 "
    "temperature_celsius:float=5 utilization_percent:float=6 compute_capability:uint32=7",
    "SeedState": "seed_id:string=1 stage:SeedLifecycleStage=2 gradient_norm:float=3 learning_rate:float=4 "
    "layer_depth:uint32=5 metrics:map<string,float>=6 age_epochs:uint32=7 risk_score:float=8",
    "SystemStatePacket": "version:uint32=1 current_epoch:uint32=2 validation_accuracy:float=3 validation_loss:float=4 "
    "timestamp_ns:uint64=5 hardware_context:HardwareContext=6 training_metrics:map<string,float>=7 "
    "seed_states:SeedState*=8 packet_id:string=9 global_step:uint64=10 training_loss:float=11 "
    "source_subsystem:string=12 training_run_id:string=13 experiment_name:string=14",
    "CommandSeedOperation": "operation:SeedOperation=1 blueprint_id:string=2 parameters:map<string,float>=3",
    "CommandOptimizerAdjustment": "optimizer_id:string=1 hyperparameters:map<string,float>=2",
    "CommandCircuitBreaker": "desired_state:CircuitBreakerState=1 rationale:string=2",
    "AdaptationCommand": "version:uint32=1 command_id:string=2 command_type:CommandType=3 target_seed_id:string=4 "
    "execution_deadline_ms:uint32=5 issued_at:Timestamp=6 issued_by:string=7 "
    "seed_operation:CommandSeedOperation=10/payload optimizer_adjustment:CommandOptimizerAdjustment=11/payload "
    "circuit_breaker:CommandCircuitBreaker=12/payload rollback_payload:Struct=13/payload "
    "annotations:map<string,string>=20",
    "EmergencySignal": "version:uint32=1 level:EmergencyLevel=2 reason:string=3 origin:string=4 "
    "triggered_at:Timestamp=5 monotonic_time_ms:uint64=6 run_id:string=7 attributes:map<string,string>=8 "
    "payload_checksum:bytes=9",
    "MitigationAction": "action_type:string=1 rationale:string=2",
    "FieldReport": "version:uint32=1 report_id:string=2 command_id:string=3 training_run_id:string=4 seed_id:string=5 "
    "blueprint_id:string=6 outcome:FieldReportOutcome=7 metrics:map<string,float>=8 "
    "observation_window_epochs:uint32=9 issued_at:Timestamp=10 tamiyo_policy_version:string=11 "
    "follow_up_actions:MitigationAction*=12 notes:string=13",
    "MetricPoint": "name:string=1 value:double=2 unit:string=3 attributes:map<string,string>=4",
    "TelemetryEvent": "event_id:string=1 description:string=2 level:TelemetryLevel=3 attributes:map<string,string>=4",
    "TraceSpan": "span_id:string=1 parent_span_id:string=2 name:string=3 start_time:Timestamp=4 end_time:Timestamp=5 "
    "attributes:map<string,string>=6",
    "SystemHealth": "status:HealthStatus=1 summary:string=2 indicators:map<string,string>=3",
    "TelemetryPacket": "packet_id:string=1 timestamp:Timestamp=2 source_subsystem:string=3 level:TelemetryLevel=4 "
    "metrics:MetricPoint*=10 events:TelemetryEvent*=20 spans:TraceSpan*=30 system_health:SystemHealth=40",
}

_SCALARS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}


def _type_name(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_number[n] for n in (1, 2))
        return f"map<{_type_name(key)},{_type_name(value)}>"
    if field.enum_type is not None:
        return str(field.enum_type.name)
    name = field.message_type.name if field.message_type is not None else _SCALARS[field.type]
    return f"{name}*" if field.is_repeated else str(name)


def _written_out(name: str) -> str:
    fields = sorted(LEYLINE.message_types_by_name[name].fields, key=lambda f: f.number)
    return " ".join(
        f"{f.name}:{_type_name(f)}={f.number}" + (f"/{f.containing_oneof.name}" if f.containing_oneof else "")
        for f in fields
    )


@pytest.mark.parametrize("name", ENUMS)
def test_domain_enum_has_the_names_and_numbers_of_the_wire(name: str) -> None:
    prefix, domain = ENUMS[name]
    wire: EnumDescriptor = LEYLINE.enum_types_by_name[name]
    expected = {f"{prefix}{member.name}": member.value for member in domain} | {f"{prefix}UNKNOWN": 0}
    assert {value.name: value.number for value in wire.values} == expected


def test_every_enum_of_the_contract_is_compared() -> None:
    assert set(LEYLINE.enum_types_by_name) == set(ENUMS)


@pytest.mark.parametrize("name", MESSAGES)
def test_message_has_the_agreed_fields_and_numbers(name: str) -> None:
    assert _written_out(name) == MESSAGES[name]


def test_every_message_of_the_contract_is_compared() -> None:
    assert set(LEYLINE.message_types_by_name) == set(MESSAGES)


def test_packages_and_reserved_numbers() -> None:
    assert (LEYLINE.package, TOLARIA.package) == ("esper.leyline.v1", "tolaria.v1")
    proto = leyline_pb2.SystemStatePacket.DESCRIPTOR
    copied = LEYLINE.message_types_by_name["SystemStatePacket"]
    assert copied is proto
    schema = (REPOSITORY / "proto/esper/leyline/v1/leyline.proto").read_text(encoding="utf-8")
    assert "reserved 100 to 199;" in schema


def test_no_field_is_packed() -> None:
    # The strict wire reader knows one wire type per field; a packed field has two.
    for file in (LEYLINE, TOLARIA):
        for message in file.message_types_by_name.values():
            for field in message.fields:
                packable = field.message_type is None and _SCALARS.get(field.type) not in ("string", "bytes")
                assert not (field.is_repeated and packable), field.full_name


def test_committed_code_is_what_the_schemas_generate(tmp_path: Path) -> None:
    script = REPOSITORY / "proto" / "generate.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True, timeout=120)
    committed = REPOSITORY / "tolaria" / "leyline" / "generated"
    fresh = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    present = {path.name: path.read_text(encoding="utf-8") for path in committed.iterdir() if path.is_file()}
    assert fresh == present, "tolaria/leyline/generated differs from proto/: run 'make proto' and commit the result"
