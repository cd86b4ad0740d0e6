"""`tolaria logs RUN`: what happened in a run, of all ranks, as sentences or as the lines that stand in the file."""

import sys
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tolaria.cli.screen import STYLES, lay_line, make_console, say
from tolaria.cli.status import RunArgument
from tolaria.view.files import open_files
from tolaria.view.selection import LEVELS, Selection
from tolaria.view.tail import Tail
from tolaria.view.telling import clock, style_of, tell
from tolaria.view.values import text, whole

EXAMPLES = """\
Examples:

  tolaria logs runs/20261125T024412Z-digits --level warning

  tolaria logs runs/20261125T024412Z-digits --kind went_back,incident --json

  tolaria logs runs/20261125T024412Z-digits --since 500 --follow
"""
POLL_S = 0.25
LABEL = 22


def logs(
    run: RunArgument,
    rank: Annotated[
        list[int] | None,
        typer.Option(help="Only this rank's; may be given again. Else rank 0, and what only others tell."),
    ] = None,
    level: Annotated[str, typer.Option(help=f"At least this: {', '.join(LEVELS)}.")] = "info",
    kind: Annotated[str, typer.Option(help="Only these kinds of events, with commas between.")] = "",
    since: Annotated[int, typer.Option(metavar="STEP", help="From this step on.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the run goes on; Ctrl-C leaves.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The lines as they stand in events.jsonl.")] = False,
) -> int:
    """Show what happened in a run: starts, boundaries, commands, incidents, checkpoints, one line each."""
    if level not in LEVELS:
        raise typer.BadParameter(f"--level {level}: expected {', '.join(LEVELS)}")
    kinds = frozenset(name.strip() for name in kind.split(",") if name.strip())
    selection = Selection(ranks=frozenset(rank or ()), level=level, kinds=kinds, since=since)
    files = open_files(run)
    shown = Shown(Tail(files.path / "events.jsonl"), selection, as_json=as_json)
    shown.more()
    try:
        while follow:
            time.sleep(POLL_S)
            shown.more()
    except KeyboardInterrupt:
        return 0
    return 0


class Shown:
    """Prints the events that are new since the last time."""

    def __init__(self, tail: Tail, selection: Selection, *, as_json: bool, console: Console | None = None) -> None:
        self._tail = tail
        self._selection = selection
        self._as_json = as_json
        self._console = console or make_console()
        self._step = 0

    def more(self) -> None:
        """Print what has come."""
        for raw, event in self._tail.new_lines():
            self._step = _step(event, self._step)
            if not self._selection.takes(event, step=self._step):
                continue
            if self._as_json:
                sys.stdout.write(raw + "\n")
            else:
                say(self._console, sentence(event, self._console.width, self._console.encoding, step=self._step))
        sys.stdout.flush()


def _step(event: Mapping[str, Any], before: int) -> int:
    """Where the run is at an event. What a start or the watchdog tells carries no step of its own."""
    if event.get("kind") == "run_started":
        return 0
    return whole(event.get("step")) or whole(event.get("saved_step")) or before


def sentence(event: dict[str, Any], width: int, encoding: str, *, step: int) -> list[Text]:
    """``time  step  rank  sentence``, wrapped below the sentence."""
    rank = whole(event.get("rank"))
    who = "watchdog" if rank < 0 else f"r{rank}"
    label = f"{clock(event)} {step:>7,} {who}"
    level = text(event.get("level"))
    words = f"{level.upper()}: " if level in ("error", "critical") else ""
    lines = lay_line((label, words + tell(event), style_of(event)), width, encoding, label=LABEL)
    lines[0].stylize(STYLES["dim"], 0, len(label) + 2)
    return lines
