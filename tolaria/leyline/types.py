"""Leyline's vocabulary as plain Python: the enums and messages every other package uses.

Numbers are those of Esper's contract (proto/esper/leyline/v1/leyline.proto); a test compares the two.
0 is "unknown" in every enum of the wire and has no member here, so it cannot be represented.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

# Hyperparameters of an OptimizerCommand, in the order in which they are described.
LR = "lr"
"""The learning rate itself; the schedule goes on in proportion from there."""
LR_SCALE = "lr_scale"
"""The factor by which the learning rate is multiplied."""
FREEZE = "freeze"
"""1: the group is not updated at all; 0: it goes on from where it was."""
WEIGHT_DECAY = "weight_decay"
BETA1 = "beta1"
BETA2 = "beta2"
MOMENTUM = "momentum"
CLIP_NORM = "clip_norm"
"""The largest gradient norm of the group; 0: no clipping."""
UNDO = "undo"
"""1, and alone: take back the newest command on these groups that was not taken back yet."""
HYPERPARAMETERS = (LR, LR_SCALE, FREEZE, WEIGHT_DECAY, BETA1, BETA2, MOMENTUM, CLIP_NORM, UNDO)
OPTIMIZER_CLASS = "class/"
"""Beginning of the ``optimizer_id`` of an OptimizerCommand for another class: "class/sgd"."""


class SeedStage(IntEnum):
    """Where a seed is in its life."""

    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    SHADOWING = 5
    PROBATIONARY = 6
    FOSSILIZED = 7
    CULLED = 8
    EMBARGOED = 9
    RESETTING = 10
    TERMINATED = 11


class SeedGate(IntEnum):
    """What a seed must pass before its next stage."""

    G0_SANITY = 1
    G1_GRADIENT_HEALTH = 2
    G2_STABILITY = 3
    G3_INTERFACE = 4
    G4_SYSTEM_IMPACT = 5
    G5_RESET = 6


class HealthStatus(IntEnum):
    """Health of a part or of the whole."""

    HEALTHY = 1
    DEGRADED = 2
    UNHEALTHY = 3
    CRITICAL = 4


class CircuitState(IntEnum):
    """State of a circuit breaker."""

    CLOSED = 1
    OPEN = 2
    HALF_OPEN = 3


class CommandType(IntEnum):
    """What a command is about; decides its payload."""

    SEED = 1
    ROLLBACK = 2
    OPTIMIZER = 3
    CIRCUIT_BREAKER = 4
    PAUSE = 5
    EMERGENCY = 6
    STRUCTURAL_PRUNING = 7


class SeedOp(IntEnum):
    """What is to be done with a seed."""

    GERMINATE = 1
    START_TRAINING = 2
    START_GRAFTING = 3
    STABILIZE = 4
    EVALUATE = 5
    FINE_TUNE = 6
    FOSSILIZE = 7
    CULL = 8
    CANCEL = 9


class TelemetryLevel(IntEnum):
    """Weight of a telemetry message."""

    INFO = 1
    WARNING = 2
    ERROR = 3
    CRITICAL = 4


class MessagePriority(IntEnum):
    """Order in which messages are handled."""

    LOW = 1
    NORMAL = 2
    HIGH = 3
    CRITICAL = 4


class EmergencyLevel(IntEnum):
    """How grave an emergency is; levels only rise until cleared."""

    NOTICE = 1
    ELEVATED = 2
    CONSERVATIVE = 3
    HALT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class EmergencySignal:
    """An emergency that the policy raises.

    ``reason`` and ``origin`` (who noticed; empty: the policy itself) are at most 128 printable characters each.
    ``mark`` grows from signal to signal, and one whose mark does not is a repetition; 0 in one that was not sent yet.
    """

    level: EmergencyLevel
    reason: str
    origin: str = ""
    mark: int = 0


class FieldOutcome(IntEnum):
    """What a command did to the run."""

    SUCCESS = 1
    NEUTRAL = 2
    REGRESSION = 3
    ABORTED = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareContext:
    """What rank 0 runs on. Memory in GiB, temperature in degrees C, utilization in percent."""

    device_type: str
    device_id: str = ""
    total_memory_gb: float = 0.0
    available_memory_gb: float = 0.0
    temperature_celsius: float = 0.0
    utilization_percent: float = 0.0
    compute_capability: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedState:
    """One slot as the policy sees it. ``seed_id`` is the slot's name; a free slot is DORMANT."""

    seed_id: str
    stage: SeedStage
    gradient_norm: float = 0.0
    learning_rate: float = 0.0
    layer_depth: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    age_epochs: int = 0
    risk_score: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemState:
    """The state of the whole run at one boundary, over all ranks (SystemStatePacket on the wire)."""

    packet_id: str
    current_epoch: int
    global_step: int
    validation_accuracy: float
    validation_loss: float
    training_loss: float
    timestamp_ns: int
    training_run_id: str
    experiment_name: str
    hardware: HardwareContext
    seeds: tuple[SeedState, ...] = ()
    training_metrics: Mapping[str, float] = field(default_factory=dict)
    source_subsystem: str = "tolaria"


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedCommand:
    """An operation on the seed that the command targets; GERMINATE names the blueprint."""

    operation: SeedOp
    blueprint_id: str = ""
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerCommand:
    """``optimizer_id`` is a parameter-group name, a shell pattern of names ("host*", "*"), or "class/NAME"."""

    optimizer_id: str
    hyperparameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerCommand:
    """OPEN asks for conservative mode, CLOSED asks to leave it."""

    desired_state: CircuitState
    rationale: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackCommand:
    """``target`` is "good" or "step"; ``step`` is -1 unless the target is "step"."""

    target: str
    step: int = -1
    reason: str = ""


Payload = SeedCommand | OptimizerCommand | BreakerCommand | RollbackCommand


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """An AdaptationCommand that passed validation."""

    command_id: str
    command_type: CommandType
    target_seed_id: str = ""
    payload: Payload | None = None
    execution_deadline_ms: int = 0
    issued_at_ns: int = 0
    issued_by: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The policy's own explanation, for people; it never changes what is done."""
        return self.annotations.get("reason", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldReport:
    """What became of one command, sent back to the policy with a later packet."""

    report_id: str
    command_id: str
    training_run_id: str
    outcome: FieldOutcome
    seed_id: str = ""
    blueprint_id: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    observation_window_epochs: int = 0
    issued_at_ns: int = 0
    tamiyo_policy_version: str = ""
    notes: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyRequest:
    """One boundary's question to the policy."""

    state: SystemState
    field_reports: tuple[FieldReport, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyReply:
    """The policy's answer: commands in the order in which they are to be applied."""

    commands: tuple[Command, ...] = ()
    policy_version: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What rank 0 broadcasts at a boundary; every rank applies exactly this, or none does.

    ``commands`` holds the exact serialized AdaptationCommands, so that what is hashed, voted on and
    recorded is what the policy signed. ``source`` is "policy" or "fallback"; ``reason`` is a stable code.
    """

    boundary: int
    step_effective: int
    source: str
    reason: str
    conservative: bool
    commands: tuple[bytes, ...] = ()
