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

HINTS = {
    "conservative": "tolaria send RUN conservative off",
    "lr_increase_conservative": "tolaria send RUN conservative off",
    "paused": "tolaria send RUN resume", "needs_weights": "tolaria undo RUN --weights",
    "changed_since": "tolaria undo RUN --weights", "busy": "the same again in a while",
}  # fmt: skip
"""What one may want to do about a refusal."""


def _examples(*words: str, command: str = "send ") -> str:
    """A line each, for the end of a help page."""
    tail = "tolaria undo runs/RUN" if command == "undo " else "tolaria send runs/RUN"
    return "Examples:\n\n" + "\n\n".join(f"  {tail} {line}".rstrip() for line in words)


send = typer.Typer(
    no_args_is_help=True,
    help="Order something of a live run. It is checked as a policy's command is, takes effect on all ranks at one step "
    "or on none, and is written to the run's log first.",
    subcommand_metavar="ORDER [OPTIONS]...",
    epilog=_examples(
        "lr --scale 0.5 --groups 'host*' --reason plateau",
        "seed cull --slot late --dry-run", "rollback --to good", "lr --help",
    ),
)  # fmt: skip

Reason = Annotated[str, typer.Option("--reason", "-m", metavar="TEXT", help="Why, for the log.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Have all ranks check it; change nothing.")]
Wait = Annotated[float, typer.Option("--wait", min=0.1, metavar="SECONDS", help="For the outcome; then exit code 75.")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]
KeyFile = Annotated[
    str | None, typer.Option("--key-file", metavar="FILE", help="Another key file than the run's operator.key.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's directory.")]


@send.callback()
def _run(context: typer.Context, run: Run) -> None:
    context.obj = run


@send.command(epilog=_examples("lr --scale 0.5 --reason plateau", "lr --set 1e-3 --groups 'seed/*' --dry-run"))
def lr(
    context: typer.Context,
    scale: Annotated[float | None, typer.Option(metavar="FACTOR", help="Multiply the rate: 0.5 halves it.")] = None,
    set_: Annotated[
        float | None, typer.Option("--set", metavar="RATE", help="The rate from here on, warm-ups apart.")
    ] = None,
    groups: Annotated[str, typer.Option(metavar="PATTERN", help="Which groups: host, seed/SLOT.")] = "*",
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """Change the learning rate; the schedule goes on in proportion."""
    if (scale is None) == (set_ is None):
        raise typer.BadParameter("--scale FACTOR or --set RATE: one of them")
    command = do.scale_lr(groups, scale) if scale is not None else do.set_lr(groups, set_ or 0.0)
    return _command(context.obj, command, reason, dry_run=dry_run, wait=wait, as_json=json, key_file=key_file)


@send.command(epilog=_examples("seed germinate --slot late --blueprint conv_residual", "seed cull --slot late"))
def seed(
    context: typer.Context,
    operation: Annotated[str, typer.Argument(metavar="OPERATION", help=", ".join(SEED_OPS))],
    slot: Annotated[str, typer.Option(metavar="NAME", help="The slot.")],
    blueprint: Annotated[str, typer.Option(metavar="NAME", help="What to grow; for germinate.")] = "",
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """Grow a seed, move it to its next stage, or take it out."""
    if operation not in SEED_OPS:
        raise typer.BadParameter(f"{operation!r}: expected one of {', '.join(SEED_OPS)}")
    if bool(blueprint) != (operation == "germinate"):
        raise typer.BadParameter("germinate needs --blueprint NAME, and nothing else takes one")
    command = do.seed_command(SEED_OPS[operation], slot, blueprint=blueprint)
    return _command(context.obj, command, reason, dry_run=dry_run, wait=wait, as_json=json, key_file=key_file)


@send.command(epilog=_examples("rollback --to good --reason 'diverged since'", "rollback --to step:1200"))
def rollback(
    context: typer.Context,
    to: Annotated[str, typer.Option("--to", metavar="WHERE", help="good, or step:N for the checkpoint of step N.")],
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 60.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """Go back to a checkpoint; what was decided since is void."""
    word, _, number = to.partition(":")
    if to != "good" and not (word == "step" and number.isdecimal()):
        raise typer.BadParameter(f"--to {to!r}: expected good or step:N")
    command = do.rollback(step=int(number) if number else None, reason=reason)
    return _command(context.obj, command, reason, dry_run=dry_run, wait=wait, as_json=json, key_file=key_file)


@send.command(epilog=_examples("conservative on --reason 'over the weekend'", "conservative off"))
def conservative(
    context: typer.Context,
    switch: Annotated[str, typer.Argument(metavar="on|off", help="Into the mode, or out of it.")],
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """No structural change and nothing that learns faster, until it is switched off."""
    if switch not in ("on", "off"):
        raise typer.BadParameter(f"{switch!r}: expected on or off")
    command = do.conservative(switch == "on", reason=reason)
    return _command(context.obj, command, reason, dry_run=dry_run, wait=wait, as_json=json, key_file=key_file)


@send.command(epilog=_examples("pause --reason 'the disk is being moved'"))
def pause(
    context: typer.Context, reason: Reason = "", wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None
) -> int:
    """Stand still after the present step, all ranks together, also over a restart, until resume."""
    return _order(context.obj, Order(action=PAUSE, reason=reason, operator=operator_name()), wait, json, key_file)


@send.command(epilog=_examples("resume"))
def resume(
    context: typer.Context, reason: Reason = "", wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None
) -> int:
    """Go on after a pause, as if it had not been."""
    return _order(context.obj, Order(action=RESUME, reason=reason, operator=operator_name()), wait, json, key_file)


@send.command(epilog=_examples("checkpoint --wait 600", "checkpoint --json | jq -r .details.checkpoint"))
def checkpoint(
    context: typer.Context, reason: Reason = "", wait: Wait = 120.0, json: Json = False, key_file: KeyFile = None
) -> int:
    """Write a checkpoint now; answers when it is durable."""
    return _order(context.obj, Order(action=CHECKPOINT, reason=reason, operator=operator_name()), wait, json, key_file)


@send.command(epilog=_examples("stop --reason 'good enough'"))
def stop(
    context: typer.Context, reason: Reason = "", wait: Wait = 30.0, json: Json = False, key_file: KeyFile = None
) -> int:
    """Save a last checkpoint and end the run, to be resumed some time."""
    return _order(context.obj, Order(action=STOP, reason=reason, operator=operator_name()), wait, json, key_file)


@send.command(epilog=_examples("emergency halt --reason 'smoke'", "emergency conservative"))
def emergency(
    context: typer.Context, level: Annotated[str, typer.Argument(metavar="LEVEL", help=", ".join(LEVELS))],
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


UNDO_EXAMPLES = _examples("", "--weights --reason worse", "--dry-run", command="undo ")


def undo(
    run: Run,
    weights: Annotated[bool, typer.Option("--weights", help="Go back to the state before it, steps included.")] = False,
    reason: Reason = "", dry_run: DryRun = False, wait: Wait = 60.0, json: Json = False, key_file: KeyFile = None,
) -> int:  # fmt: skip
    """Take back the last command that an operator gave this run.

    Learning rates, optimizer settings, mode and a seed just grown are taken back as they were, and the weights go on.
    With --weights the whole run returns to the state before the command.
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
        _tell(outcome, run)
    return 1 if outcome.state == "refused" else 0


def _tell(outcome: Outcome, run: str) -> None:
    out = console()
    ranks = f" on {outcome.ranks} rank{'s' if outcome.ranks != 1 else ''}" if outcome.ranks else ""
    if outcome.state == "refused":
        out.print(f"[red]refused[/] ({safe(outcome.code)}): {safe(outcome.reason)}")
        if outcome.act:
            out.print(f"  nothing was changed{ranks}; act {outcome.act} in the log, after step {outcome.step:,}")
        if outcome.code in HINTS:
            out.print(f"  try: {safe(HINTS[outcome.code].replace('RUN', run))}")
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
