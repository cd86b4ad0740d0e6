"""`tolaria try RUN CHANGE`: what a change would do, tried on the live run itself and taken back."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from tolaria.cli.printing import console, print_json, safe
from tolaria.errors import ConfigError, MessageRejected
from tolaria.orders.client import RunClient, operator_name
from tolaria.orders.words import TRY, Order, Outcome
from tolaria.rehearsal.change import parse_change
from tolaria.rehearsal.effect import with_error
from tolaria.telemetry.words import counted, duration, number, percent

REFUSED = 1


def attempt(
    run: Annotated[str, typer.Argument(help="Directory of a run that is training.")],
    change: Annotated[str, typer.Argument(help="What to try, such as 'lr*=0.5'.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of each of the two arms.")] = 200,
    reason: Annotated[str, typer.Option("--reason", "-m", help="Why, for the log.")] = "",
    wait: Annotated[float, typer.Option("--wait", min=0.1, help="Seconds to wait for the result.")] = 3600.0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    key_file: Annotated[str | None, typer.Option("--key-file", help="Another key than RUN/operator.key.")] = None,
) -> int:
    """Try a change on a live run, measure what it does, take it back.

    All ranks keep a copy of their state, train --steps steps as they would
    come, validate, go back; then the same with the change, over the same data.
    The run goes on bit for bit as if nothing had been tried. It stands still
    meanwhile: twice the steps and two validations. A stop, a pause or an
    emergency ends a rehearsal at once.

    Changes:
      lr*=0.5   lr=1e-3   weight_decay=0.05   momentum=0.95   freeze=1
      host.lr*=0.5        of one group; seed/late.lr*=2, seed/*.freeze=1
      lr*=2, clip_norm=0.5                    several at once
    They keep within the bounds that hold for commands. Seeds cannot be tried:
    germinate one, and undo it.

    Training loss is compared step by step over the last half of the steps,
    validation loss sample by sample. The error says how far another sample of
    data might be off; nothing is said of other seeds or of later steps.

    Examples:
      tolaria try runs/RUN "lr*=0.5" --steps 200
      tolaria try runs/RUN "host.lr*=0.5, weight_decay=0.02" --json

    Exit codes: 0 tried; 1 refused or interrupted; 2 the change cannot be
    read; 75 the run is not running, or does not answer.
    """
    parse_change(change)
    order = Order(
        action=TRY, arguments={"change": change, "steps": steps}, reason=reason, operator=operator_name()
    )  # fmt: skip
    try:
        outcome = RunClient.of(run, key_file=key_file).send(order, wait_s=wait)
    except MessageRejected as error:
        raise ConfigError(str(error)) from error
    if json:
        print_json(asdict(outcome))
    else:
        _tell(run, outcome)
    return REFUSED if outcome.state == "refused" else 0


def _tell(run: str, outcome: Outcome) -> None:
    out, found = console(), outcome.details
    if outcome.state == "refused" or "verdict" not in found:
        out.print(f"[red]refused[/] ({safe(outcome.code)}): {safe(outcome.reason)}", soft_wrap=True)
        return
    control, changed = found["control"], found["changed"]
    out.print(f"tried  [bold]{safe(found['what'])}[/]")
    out.print(
        f"       {counted(found['steps'], 'step')} from step {found['at_step']:,}{_on(outcome.ranks)}, with and without"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_edge=False)
    table.add_column("")
    for name in ("without", "with it", "difference"):
        table.add_column(name, justify="right")
    last = found["train_steps"]
    table.add_row(
        "  training loss", number(control["train_loss"]), number(changed["train_loss"]),
        _difference(found["train_difference"], found["train_error"]), f"last {counted(last, 'step')}",
    )  # fmt: skip
    if found["val_difference"] is not None:
        table.add_row(
            "  validation loss", number(control["val_loss"]), number(changed["val_loss"]),
            _difference(found["val_difference"], found["val_error"]), "same samples",
        )  # fmt: skip
        table.add_row(
            "  accuracy", percent(control["accuracy"]), percent(changed["accuracy"]),
            f"{100 * (changed['accuracy'] - control['accuracy']):+.1f} points", "",
        )  # fmt: skip
    out.print(table)
    out.print(safe(found["verdict"]), style=_style(found))
    spent = control["seconds"] + changed["seconds"]
    out.print(f"  the run stood still for {duration(spent)}; its state is the one from before, bit for bit")
    out.print(f"  act {outcome.act} in the log, state {outcome.digest[:16]} equal on all ranks")


def _on(ranks: int) -> str:
    return f" on {counted(ranks, 'rank')}" if ranks else ""


def _difference(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:+.2g}" if error is None else with_error(value, error)


def _style(found: Mapping[str, Any]) -> str:
    if found["changed"]["ended"]:
        return "red"
    return "green" if found["verdict"].startswith("lowers") else "yellow"
