"""Packets as a trainer sends them to a policy, and what the policy answers, in short."""

from collections.abc import Iterable

from tolaria.leyline.types import Command, HardwareContext, SeedCommand, SeedOp, SeedStage, SeedState, SystemState


def state(
    boundary: int = 1, loss: float = 1.0, seeds: tuple[SeedState, ...] = (), history: Iterable[float] = (),
    **metrics: float,
) -> SystemState:  # fmt: skip
    """``history``: earlier losses, newest first. Metrics by name, "/" written "__"."""
    sent = {name.replace("__", "/"): value for name, value in metrics.items()}
    sent |= {f"loss_history/{back}": earlier for back, earlier in enumerate(history, 1)}
    return SystemState(
        packet_id=f"p{boundary}", current_epoch=boundary, global_step=boundary * 10, validation_accuracy=0.5,
        validation_loss=loss, training_loss=loss, timestamp_ns=1, training_run_id="run", experiment_name="test",
        hardware=HardwareContext(device_type="cpu"), seeds=seeds, training_metrics=sent,
    )  # fmt: skip


def slot(name: str, stage: SeedStage, *, norm: float = 0.0, age: int = 0, **metrics: float) -> SeedState:
    """One slot; metrics by name, "/" written "__"."""
    sent = {name.replace("__", "/"): value for name, value in metrics.items()}
    return SeedState(seed_id=name, stage=stage, gradient_norm=norm, age_epochs=age, metrics=sent)


def operations(commands: list[Command]) -> list[tuple[SeedOp, str]]:
    """The operation and the slot of each seed command."""
    found = []
    for command in commands:
        assert isinstance(command.payload, SeedCommand)
        found.append((command.payload.operation, command.target_seed_id))
    return found
