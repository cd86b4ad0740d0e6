"""What the commands print with: a console that adds colour where a terminal shows it, labelled lines that wrap."""

import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from tolaria.telemetry.words import printable
from tolaria.view.sections import Line, Section

STYLES = {"good": "green", "warn": "yellow", "bad": "bold red", "dim": "dim", "title": "bold"}
LABEL = 12
MIN_WIDTH, MAX_WIDTH = 40, 400


def make_console(file: TextIO | None = None, *, width: int | None = None) -> Console:
    """A console on stdout. Not a terminal: no colours, 80 columns unless COLUMNS says other."""
    console = Console(file=file or sys.stdout, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)
    console.width = max(MIN_WIDTH, min(console.width, MAX_WIDTH))
    return console


def can_show(console: Console, text: str) -> bool:
    """Whether the console's encoding has these characters."""
    try:
        text.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def say(console: Console, lines: Sequence[Text]) -> None:
    """Print lines as they are."""
    for line in lines:
        console.print(line, overflow="ignore", no_wrap=True, crop=False)


def lay_section(section: Section, width: int, encoding: str) -> list[Text]:
    """A section at this width: its title, then its lines."""
    head = [Text(section.title, STYLES["title"])] if section.title else []
    return head + [row for line in section.lines for row in lay_line(line, width, encoding)]


def lay_line(line: Line, width: int, encoding: str, *, label: int = LABEL, hang: int = 0) -> list[Text]:
    """``  label       text``, wrapped ``hang`` columns further in; nothing foreign in it steers the terminal."""
    name, text, style = printable(line[0], encoding), printable(line[1], encoding), STYLES.get(line[2], "")
    indent = " " * (label + 2 + hang)
    head = f"  {name:<{label}}" if len(name) < label else f"  {name}  "
    rows = textwrap.wrap(text, width=max(20, width), initial_indent=head, subsequent_indent=indent,
                         break_on_hyphens=False, drop_whitespace=True) or [head]  # fmt: skip
    first = Text(rows[0].rstrip())
    first.stylize(style, len(head))
    return [first, *(Text(row, style) for row in rows[1:])]
