"""`tolaria send RUN ...` and `tolaria undo RUN`: orders to a live run, and what became of them on all ranks."""

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from tolaria.cli.printing import console, print_json, safe
from tolaria.errors import MessageRejected
from tolaria.leyline.codec import encode_command
from tolaria.leyline.types import Command, SeedOp
from tolaria.orders.client import RunClient, operator_name
from tolaria.orders.words import CHECKPOINT, COMMAND, EMERGENCY, PAUSE, RESUME, STOP, UNDO, Order, Outcome
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

LEVELS = {"notice": 1, "elevated": 2, "conservative": 3, "halt": 4}
SEED_OPS = {
    "germinate": SeedOp.GERMINATE, "train": SeedOp.START_TRAINING, "graft": SeedOp.START_GRAFTING,
    "stabilize": SeedOp.STABILIZE, "evaluate": SeedOp.EVALUATE, "fine-tune": SeedOp.FINE_TUNE,
    "fossilize": SeedOp.FOSSILIZE, "cull": SeedOp.CULL, "cancel": SeedOp.CANCEL,
}  # fmt: skip

send = typer.Typer(
    no_args_is_help=True,
    help="Order something of a live run. It is checked as a policy's command is, takes effect on all ranks at one step "
    "or on none, and is written to the run's log first.",
    epilog="Examples: tolaria send runs/RUN lr --scale 0.5 --groups 'host*' --reason plateau | tolaria send runs/RUN "
    "seed germinate --slot late --blueprint conv_residual --dry-run | tolaria send runs/RUN rollback --to good",
)

Reason = Annotated[str, typer.Option("--reason", "-m", help="Why, for the log.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Have all ranks check it; change nothing.")]
Wait = Annotated[float, typer.Option("--wait", min=0.1, help="Seconds to wait for the outcome.")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]
KeyFile = Annotated[str | None, typer.Option("--key-file", help="Another key file than the run's operator.key.")]


@send.callback()
def _run(context: typer.Context, run: Annotated[str, typer.Argument(help="The run's directory.")]) -> None:
    context.obj = run


@send.command()
def lr(
    context: typer.Context,
    scale: Annotated[float | None, typer.Option(help="A factor on the rate.")] = None,
    set_: Annotated[float | None, typer.Option("--set", help="The rate itself.")] = None,
    groups: Annotated[str, typer.Option(help="Shell pattern of group names.")] = "*",
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """Change the learning rate; the schedule goes on in proportion."""
    if (scale is None) == (set_ is None):
        raise typer.BadParameter("--scale FACTOR or --set RATE: one of them")
    command = do.scale_lr(groups, scale) if scale is not None else do.set_lr(groups, set_ or 0.0)
    return _command(context.obj, command, reason, dry_run=dry_run, wait=wait, as_json=json, key_file=key_file)


@send.command()
def seed(
    context: typer.Context,
    operation: Annotated[str, typer.Argument(help=", ".join(SEED_OPS))],
    slot: Annotated[str, typer.Option(help="The slot.")],
    blueprint: Annotated[str, typer.Option(help="What to grow (germinate).")] = "",
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """Grow a seed, move it to its next stage, or take it out."""
    if operation not in SEED_OPS:
        raise typer.BadParameter(f"{operation!r}: expected one of {', '.join(SEED_OPS)}")
    command = do.seed_command(SEED_OPS[operation], slot, blueprint=blueprint)
    return _command(context.obj, command, reason, dry_run=dry_run, wait=wait, as_json=json, key_file=key_file)


@send.command()
def rollback(
    context: typer.Context,
    to: Annotated[str, typer.Option("--to", help="good, or step:N for the checkpoint of step N.")],
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 60.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """Go back to a checkpoint; what was decided since is void."""
    word, _, number = to.partition(":")
    if to != "good" and not (word == "step" and number.isdecimal()):
        raise typer.BadParameter(f"--to {to!r}: expected good or step:N")
    command = do.rollback(step=int(number) if number else None, reason=reason)
    return _command(context.obj, command, reason, dry_run=dry_run, wait=wait, as_json=json, key_file=key_file)


@send.command()
def conservative(
    context: typer.Context, switch: Annotated[str, typer.Argument(help="on or off")],
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """No structural change and nothing that learns faster, until it is switched off."""
    if switch not in ("on", "off"):
        raise typer.BadParameter(f"{switch!r}: expected on or off")
    command = do.conservative(switch == "on", reason=reason)
    return _command(context.obj, command, reason, dry_run=dry_run, wait=wait, as_json=json, key_file=key_file)


@send.command()
def pause(
    context: typer.Context, reason: Reason = "", wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None
) -> int:
    """Stand still after the present step, all ranks together, also over a restart, until resume."""
    return _order(context.obj, Order(action=PAUSE, reason=reason, operator=operator_name()), wait, json, key_file)


@send.command()
def resume(
    context: typer.Context, reason: Reason = "", wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None
) -> int:
    """Go on after a pause, as if it had not been."""
    return _order(context.obj, Order(action=RESUME, reason=reason, operator=operator_name()), wait, json, key_file)


@send.command()
def checkpoint(
    context: typer.Context, reason: Reason = "", wait: Wait = 120.0, json: Json = False, key_file: KeyFile = None
) -> int:
    """Write a checkpoint now; answers when it is durable."""
    return _order(context.obj, Order(action=CHECKPOINT, reason=reason, operator=operator_name()), wait, json, key_file)


@send.command()
def stop(
    context: typer.Context, reason: Reason = "", wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None
) -> int:
    """Save a last checkpoint and end the run, to be resumed some time."""
    return _order(context.obj, Order(action=STOP, reason=reason, operator=operator_name()), wait, json, key_file)


@send.command()
def emergency(
    context: typer.Context, level: Annotated[str, typer.Argument(help=", ".join(LEVELS))],
    reason: Reason = "", wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """Raise an emergency on all ranks. Where rank 0 does not answer: python -m tolaria.emergency."""
    if level not in LEVELS:
        raise typer.BadParameter(f"{level!r}: expected one of {', '.join(LEVELS)}")
    order = Order(
        action=EMERGENCY, arguments={"level": LEVELS[level]}, reason=reason or "no reason given",
        operator=operator_name(),
    )  # fmt: skip
    return _order(context.obj, order, wait, json, key_file)


def undo(
    run: Annotated[str, typer.Argument(help="The run's directory.")],
    weights: Annotated[bool, typer.Option("--weights", help="Go back to the state before it, steps included.")] = False,
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 60.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """Take back the last command that an operator gave this run.

    Learning rates, optimizer settings, mode and a seed just grown are taken back as they were, and the weights go on.
    With --weights the whole run returns to the state before the command.

    Examples: tolaria undo runs/RUN | tolaria undo runs/RUN --weights --reason "worse"
    """
    order = Order(
        action=UNDO, arguments={"weights": weights}, reason=reason, operator=operator_name(), dry_run=dry_run
    )  # fmt: skip
    return _order(run, order, wait, json, key_file)


def _command(
    run: str, command: Command, reason: str, *, dry_run: bool, wait: float, as_json: bool, key_file: str | None
) -> int:
    order = Order(action=COMMAND, reason=reason, operator=operator_name(), dry_run=dry_run, command=b"-")
    # The id decides a seed's first weights, so it is the order's own: sent twice, it is the same seed.
    named = with_identity(
        command, f"op-{order.order_id}", issued_by=clip(order.operator), issued_at_ns=time.time_ns()
    )  # fmt: skip
    try:
        raw = encode_command(named)
    except MessageRejected as error:
        raise typer.BadParameter(str(error)) from error
    return _order(run, Order(**{**asdict(order), "command": raw}), wait, as_json, key_file)


def clip(name: str) -> str:
    """A name as a message may carry it."""
    return name[:64]


def _order(run: str, order: Order, wait: float, as_json: bool, key_file: str | None) -> int:
    try:
        outcome = RunClient.of(run, key_file=key_file).send(order, wait_s=wait)
    except MessageRejected as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        print_json(asdict(outcome))
    else:
        _tell(outcome)
    return 1 if outcome.state == "refused" else 0


def _tell(outcome: Outcome) -> None:
    out = console()
    ranks = f" on {outcome.ranks} rank{'s' if outcome.ranks != 1 else ''}" if outcome.ranks else ""
    if outcome.state == "refused":
        out.print(f"[red]refused[/] ({safe(outcome.code)}): {safe(outcome.reason)}")
        if outcome.act:
            out.print(f"nothing was changed; act {outcome.act}, step {outcome.step:,}")
        return
    if outcome.state == "checked":
        out.print(f"would be applied{ranks} (checked at step {outcome.step:,}; nothing was changed)")
        return
    out.print(f"[green]applied[/] after step {outcome.step:,}{ranks}: {safe(outcome.details.get('what', 'done'))}")
    if outcome.reason:
        out.print(f"  {safe(outcome.reason)}")
    for name, value in _shown(outcome.details).items():
        out.print(f"  {name} {safe(str(value))}")
    if outcome.digest:
        out.print(f"  act {outcome.act} in the log, state {outcome.digest[:16]} equal on all ranks")


def _shown(details: Any) -> dict[str, Any]:
    return {name: value for name, value in details.items() if name not in ("what", "to_step")}
