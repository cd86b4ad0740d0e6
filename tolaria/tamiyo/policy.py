"""A policy: the class that a user writes to steer a run, and short constructors for its commands.

    from tolaria.tamiyo.policy import Policy, germinate

    class GrowOnce(Policy):
        version = "grow-once-1"

        def decide(self, state, reports):
            if state.current_epoch == 3:
                return [germinate("middle", "residual_mlp", reason="third epoch")]
            return []

A policy that sees something go wrong between two boundaries raises an emergency; the run answers at its next step:

    from tolaria.tamiyo.policy import Policy, raise_level

    class Watchful(Policy):
        def decide(self, state, reports):
            self.alarmed = state.validation_loss > 5
            return []

        def emergency(self):
            return raise_level(3, "validation loss above 5") if self.alarmed else None

Run it with ``--tamiyo.policy my_package.my_module:GrowOnce`` or as a service of its own with
``python -m tolaria.tamiyo.server``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tolaria.leyline.limits import clip_text
from tolaria.leyline.types import (
    FREEZE,
    HYPERPARAMETERS,
    LR,
    LR_SCALE,
    OPTIMIZER_CLASS,
    UNDO,
    BreakerCommand,
    CircuitState,
    Command,
    CommandType,
    EmergencyLevel,
    EmergencySignal,
    FieldReport,
    OptimizerCommand,
    RollbackCommand,
    SeedCommand,
    SeedOp,
    SystemState,
)

BOUNDARY = "boundary"
"""Key of `SystemState.training_metrics` under which the server gives a policy the number of the boundary."""


def boundary_of(state: SystemState) -> int:
    """Number of the boundary that a state describes; its epoch when the state did not come through a server."""
    return int(state.training_metrics.get(BOUNDARY, state.current_epoch))


def with_identity(command: Command, command_id: str, *, issued_by: str, issued_at_ns: int) -> Command:
    """The command with what a policy may leave open filled in; what it did fill stays."""
    return replace(
        command,
        command_id=command.command_id or command_id,
        issued_by=command.issued_by or issued_by,
        issued_at_ns=command.issued_at_ns or issued_at_ns,
    )


class Policy:
    """Steers one run. The server makes one instance per run and calls it from one thread.

    ``version`` names the policy and its settings in every record of the run: at most 128 printable
    characters. Empty: the class's import path.
    """

    version: str = ""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        """Commands for this boundary, in the order in which they are to be applied; none is an answer too.

        state: the run at this boundary, over all ranks; ``training_metrics["boundary"]`` is the boundary's number.
        reports: what became of earlier commands; one may come more than once (same ``report_id``).
        An answer after the trainer's deadline is lost. An exception is logged and answered with no commands.
        A restart of the trainer restarts an embedded policy: what a decision needs should come from ``state``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define decide(self, state, reports)")

    def emergency(self) -> EmergencySignal | None:
        """What is wrong now, None for nothing. The default: nothing, ever.

        Called after each `decide`, before its answer is sent, and about 20 times a second between two boundaries, by
        the same thread: it must return at once. What needs watching for longer belongs in a thread of the policy's
        own, whose finding this hands out. The first call comes after the run's first question.

        A level is sent when it appears and when it rises, not each time it is returned; to raise the same level again
        return None once in between (it is called again at once after each one sent). What could not be delivered is
        sent again, and taken once. A new start of the run is told again what is still wrong. An exception is logged and
        raises nothing. Levels: see `raise_level`.
        """
        return None


def seed_command(
    operation: SeedOp,
    slot: str,
    *,
    blueprint: str = "",
    parameters: Mapping[str, float] | None = None,
    reason: str = "",
) -> Command:
    """Any operation on the seed in a slot. The short forms below are the usual ones."""
    payload = SeedCommand(operation=operation, blueprint_id=blueprint, parameters=dict(parameters or {}))
    return Command(
        command_id="", command_type=CommandType.SEED, target_seed_id=slot, payload=payload, annotations=_why(reason)
    )


def germinate(slot: str, blueprint: str, *, reason: str = "") -> Command:
    """Build a seed of a blueprint in a DORMANT slot."""
    return seed_command(SeedOp.GERMINATE, slot, blueprint=blueprint, reason=reason)


def start_training(slot: str, *, reason: str = "") -> Command:
    """GERMINATED to TRAINING: the seed learns behind the host, whose output stays the same."""
    return seed_command(SeedOp.START_TRAINING, slot, reason=reason)


def start_grafting(slot: str, *, blend_steps: int | None = None, reason: str = "") -> Command:
    """TRAINING to BLENDING: alpha goes from 0 to 1 over ``blend_steps`` optimizer steps (None: as configured)."""
    parameters = {} if blend_steps is None else {"blend_steps": float(blend_steps)}
    return seed_command(SeedOp.START_GRAFTING, slot, parameters=parameters, reason=reason)


def stabilize(slot: str, *, reason: str = "") -> Command:
    """BLENDING (alpha at 1) to SHADOWING: host output again, the seed probed in validation."""
    return seed_command(SeedOp.STABILIZE, slot, reason=reason)


def evaluate(slot: str, *, reason: str = "") -> Command:
    """SHADOWING to PROBATIONARY: fully active, its contribution measured."""
    return seed_command(SeedOp.EVALUATE, slot, reason=reason)


def fine_tune(slot: str, *, reason: str = "") -> Command:
    """Let a PROBATIONARY seed learn."""
    return seed_command(SeedOp.FINE_TUNE, slot, reason=reason)


def fossilize(slot: str, *, reason: str = "") -> Command:
    """PROBATIONARY to FOSSILIZED: the seed stays, as part of the host."""
    return seed_command(SeedOp.FOSSILIZE, slot, reason=reason)


def cull(slot: str, *, reason: str = "") -> Command:
    """Remove the seed; the slot is closed for the embargo."""
    return seed_command(SeedOp.CULL, slot, reason=reason)


def cancel(slot: str, *, reason: str = "") -> Command:
    """Remove a GERMINATED or TRAINING seed without an embargo."""
    return seed_command(SeedOp.CANCEL, slot, reason=reason)


def set_optimizer(group: str, *, reason: str = "", **hyperparameters: float) -> Command:
    """Change hyperparameters of the groups whose name matches the shell pattern ``group``, all of them or none.

    lr: the rate itself, see `set_lr`. lr_scale: a factor on it. freeze: 1 or 0. weight_decay, beta1, beta2, momentum:
    where the optimizer has them. clip_norm: largest gradient norm of the group. Bounds: ``[tuning]`` of the trainer.
    In conservative mode, no larger lr, momentum, beta1 or clip_norm, and no smaller beta2. lr, lr_scale and freeze=0
    pass over a group that the configuration freezes, and are refused where there is no other. Raises ValueError for
    another name.
    """
    unknown = sorted(hyperparameters.keys() - set(HYPERPARAMETERS))
    if unknown or not hyperparameters:
        raise ValueError(f"hyperparameters {unknown}: expected one or more of {', '.join(HYPERPARAMETERS)}")
    payload = OptimizerCommand(optimizer_id=group, hyperparameters=dict(hyperparameters))
    return Command(command_id="", command_type=CommandType.OPTIMIZER, payload=payload, annotations=_why(reason))


def set_lr(group: str, lr: float, *, reason: str = "") -> Command:
    """Set the learning rate of the groups at this step; from there their schedule goes on in proportion.

    ``lr`` is the rate without what holds it back for a while: warm-ups, the re-warm after a return and
    ``lr.conservative_factor`` act on top of it. While one of them acts the rate is lower.
    """
    return set_optimizer(group, reason=reason, **{LR: lr})


def scale_lr(group: str, factor: float, *, reason: str = "") -> Command:
    """Multiply the learning rate of the groups whose name matches the shell pattern ``group``."""
    return set_optimizer(group, reason=reason, **{LR_SCALE: factor})


def freeze(group: str, *, reason: str = "") -> Command:
    """Stop updating the groups: parameters and optimizer state stay as they are, bit for bit."""
    return set_optimizer(group, reason=reason, **{FREEZE: 1.0})


def thaw(group: str, *, reason: str = "") -> Command:
    """Let frozen groups go on from where they were."""
    return set_optimizer(group, reason=reason, **{FREEZE: 0.0})


def undo(group: str = "*", *, reason: str = "") -> Command:
    """Take back the newest command of hyperparameters on these groups that was not taken back yet.

    A change of the optimizer's class can not be undone, and ends what can be.
    """
    return set_optimizer(group, reason=reason, **{UNDO: 1.0})


def change_optimizer(
    name: str, *, lr: float | None = None, momentum: float | None = None, weight_decay: float | None = None,
    reason: str = "",
) -> Command:  # fmt: skip
    """Go on with another optimizer: one of ``optim.name``'s, or the class that the run was configured with.

    At least one setting has to be given, for all groups: ``lr``, the host's new peak rate (needed unless both are of
    adam, adamw and nadam, which also keep their state), ``momentum``, ``weight_decay``.
    ``[tuning]`` of the trainer bounds them, and each group's new rate. It can not be undone, nor what came before it.
    """
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    given = {key: value for key, value in settings.items() if value is not None}
    payload = OptimizerCommand(optimizer_id=f"{OPTIMIZER_CLASS}{name}", hyperparameters=given)
    return Command(command_id="", command_type=CommandType.OPTIMIZER, payload=payload, annotations=_why(reason))


def rollback(*, step: int | None = None, reason: str = "") -> Command:
    """Return to the newest good checkpoint, or to the one of ``step``."""
    target = "good" if step is None else "step"
    payload = RollbackCommand(target=target, step=-1 if step is None else step, reason=clip_text(reason))
    return Command(command_id="", command_type=CommandType.ROLLBACK, payload=payload, annotations=_why(reason))


def conservative(on: bool, *, reason: str = "") -> Command:
    """Ask for conservative mode, or to leave it."""
    desired = CircuitState.OPEN if on else CircuitState.CLOSED
    payload = BreakerCommand(desired_state=desired, rationale=clip_text(reason))
    return Command(command_id="", command_type=CommandType.CIRCUIT_BREAKER, payload=payload, annotations=_why(reason))


def pause(*, reason: str = "") -> Command:
    """Ask the run to pause at this boundary."""
    return Command(command_id="", command_type=CommandType.PAUSE, annotations=_why(reason))


def raise_level(level: int, reason: str, *, origin: str = "") -> EmergencySignal:
    """An emergency for `Policy.emergency` to return.

    1 NOTICE: an event in the run's record. 2 ELEVATED: back to the newest good checkpoint. 3 CONSERVATIVE: back to
    the newest snapshot, in conservative mode. 4 HALT: stand still, and end with the state saved if nobody clears it.
    ``origin``: who noticed; the policy's version when empty. Raises ValueError for another level.
    """
    return EmergencySignal(level=EmergencyLevel(level), reason=clip_text(reason), origin=clip_text(origin))


def _why(reason: str) -> dict[str, str]:
    return {"reason": clip_text(reason)} if reason else {}
