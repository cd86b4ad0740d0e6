"""`tolaria runs [ROOT]`: the runs there are, newest first."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from tolaria.cli.printing import print_json
from tolaria.cli.screen import STYLES, make_console, say
from tolaria.cli.status import JsonOption
from tolaria.telemetry.words import number, percent, printable, short_duration
from tolaria.view.listing import Listed, list_runs
from tolaria.view.sections import state_style

EXAMPLES = """\
Examples:

  tolaria runs

  tolaria runs /data/runs --json
"""
WIDE = 100
MIN_REASON = 16


def runs(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="The folder that holds run directories.")] = "runs",
    as_json: JsonOption = False,
) -> int:
    """List the runs of a folder: state, step, epoch, loss, accuracy, age, ranks."""
    found = list_runs(root)
    if as_json:
        print_json([asdict(entry) for entry in found])
        return 0
    console = make_console()
    if not found:
        console.print(Text(printable(f"no runs in {root}", console.encoding)))
        return 0
    say(console, table(found, console.width, console.encoding))
    return 0


def table(found: list[Listed], width: int, encoding: str) -> list[Text]:
    """The runs in columns; what does not fit is cut off the name, and in a wide terminal off the reason."""
    head = ["state", "epoch", "step", "loss", "acc", "ranks", "last word"]
    rows = [head, *(_cells(entry) for entry in found)]
    if width < WIDE:
        rows = [[row[0], *row[2:]] for row in rows]  # no epoch
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    names = ["run", *(printable(entry.run, encoding) for entry in found)]
    name_width = min(max(map(len, names)), max(12, width - sum(widths) - 2 * len(widths)))
    left = width - name_width - sum(widths) - 2 * len(widths) - 2
    lines = []
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        numbers = "  ".join(f"{cell:>{size}}" for cell, size in zip(row[1:], widths[1:], strict=True))
        line = Text(f"{_cut(name, name_width, encoding):<{name_width}}  {row[0]:<{widths[0]}}  {numbers}")
        if place == 0:
            line.stylize(STYLES["title"])
        else:
            style = STYLES.get(state_style(found[place - 1].state), "")
            line.stylize(style, name_width + 2, name_width + 2 + len(row[0]))
            reason = printable(found[place - 1].reason, encoding)
            if reason and left >= MIN_REASON:
                line.append("  " + _cut(reason, left, encoding), STYLES["dim"])
        lines.append(line)
    return lines


def _cells(entry: Listed) -> list[str]:
    epoch = f"{entry.epoch:,}" + (f"/{entry.epochs:,}" if entry.epochs else "")
    age = f"{short_duration(entry.age_s)} ago" if entry.age_s is not None else "-"
    ranks = f"{entry.ranks:,}" if entry.ranks else "-"
    return [entry.state, epoch, f"{entry.step:,}", number(entry.loss), percent(entry.accuracy), ranks, age]


def _cut(text: str, width: int, encoding: str) -> str:
    more = printable("…", encoding).replace("?", "~")
    return text if len(text) <= width else text[: width - 1] + more
