"""What commands print: rich text for people on a terminal, plain text elsewhere, JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tolaria.telemetry.lines import to_json
from tolaria.telemetry.words import printable


def console() -> Console:
    """Standard output; without colours and control codes where it is no terminal."""
    return Console(highlight=False, soft_wrap=False)


def print_json(document: Mapping[str, Any] | Sequence[Any]) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(to_json(document), indent=2) + "\n")


def safe(text: str) -> str:
    """Text that came from a run, a policy or a file, for a line of `console`: it steers neither terminal nor markup."""
    return escape(printable(str(text), sys.stdout.encoding or "utf-8"))


def print_row(name: str, state: str, text: str) -> None:
    """A name, a word in `console`'s markup, and text, foreign or not: folded on a terminal, else on one line."""
    out = console()
    if not out.is_terminal:
        out.print(f"{safe(name)}  {state}  {safe(text)}", soft_wrap=True)
        return
    row = Table.grid(padding=(0, 2))
    row.add_column(no_wrap=True)
    row.add_column(no_wrap=True, min_width=7)
    row.add_column()
    row.add_row(safe(name), state, safe(text))
    out.print(row)
