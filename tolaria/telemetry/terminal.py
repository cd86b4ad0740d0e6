"""Writing to a person's terminal, or to a file: calm, safe from what others wrote, and never the end of a run."""

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NoReturn, TextIO, TypeAlias

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from tolaria.telemetry.lines import warn
from tolaria.telemetry.words import printable

Mode: TypeAlias = Literal["auto", "plain", "off"]
Line: TypeAlias = tuple[str, str]  # label, text

LABEL_WIDTH, MAX_LABEL_WIDTH = 10, 24
MIN_WIDTH, MAX_WIDTH = 60, 120
NO_STYLES: Mapping[str, str] = {}


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # rich would end the process here; training goes on without its progress.
        raise BrokenPipeError("the reader of the progress is gone")


class Terminal:
    """Lines and labelled blocks, and one line that is overwritten, on a terminal or in a file.

    "auto": colours and the overwritten line, on a capable terminal; plain text elsewhere and under NO_COLOR. "plain":
    always plain text. "off": nothing. Local; draws at once. An output that fails (closed pipe, full disk) turns it off,
    told once on stderr; nothing is raised.
    """

    def __init__(self, mode: Mode, *, file: TextIO | None, environ: Mapping[str, str], width: int | None) -> None:
        self._file = sys.stdout if file is None else file
        self._on = mode != "off"
        capable = not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"
        self._live = mode == "auto" and capable and self._file.isatty()
        self._fixed_width = width
        self._console = _Console(
            file=self._file, force_terminal=self._live, no_color=not self._live,
            color_system="auto" if self._live else None, _environ=environ,
            highlight=False, markup=False, emoji=False, legacy_windows=False,
        )  # fmt: skip
        self._transient = False

    def close(self) -> None:
        """Take away the overwritten line, if there is one; idempotent."""
        self._write(self._erase)

    def _block(
        self, title: str, lines: Sequence[Line], *, styles: Mapping[str, str] = NO_STYLES, wrap: bool = True
    ) -> None:
        self._print(Text(self._clean(title), style="bold"))
        width = max([LABEL_WIDTH, *(min(len(label), MAX_LABEL_WIDTH) for label, _ in lines)])
        for label, text in lines:
            self._labelled(label, text, width=width, style=styles.get(label, ""), wrap=wrap)

    def _labelled(
        self, label: str, text: str, *, indent: int = 2, width: int = LABEL_WIDTH, style: str = "", wrap: bool = True
    ) -> None:
        margin = " " * indent + f"{self._clean(label):<{width}}  "
        body = self._clean(text)
        room = max(20, self._width - len(margin))
        pieces = textwrap.wrap(body, room, break_on_hyphens=False) if wrap else [body]
        for index, piece in enumerate(pieces):
            self._print(Text.assemble((margin if index == 0 else " " * len(margin), "dim"), (piece, style)))

    @property
    def _width(self) -> int:
        columns = self._fixed_width or shutil.get_terminal_size((80, 24)).columns
        return max(MIN_WIDTH, min(columns, MAX_WIDTH))

    def _clean(self, text: str) -> str:
        return printable(text, self._file.encoding or "utf-8")

    def _print(self, line: Text) -> None:
        def draw() -> None:
            self._erase()
            self._console.print(line, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)

        self._write(draw)

    def _draw(self, text: str) -> None:
        def draw() -> None:
            self._erase()
            # One column stays free: a full line would wrap, and erasing it would leave half of it.
            cut = self._clean(text)[: self._width - 1]
            self._console.print(Text(cut, style="dim"), end="", no_wrap=True, overflow="ignore", soft_wrap=True)
            self._transient = True

        self._write(draw)

    def _erase(self) -> None:
        if self._transient:
            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            self._transient = False

    def _write(self, draw: Callable[[], None]) -> None:
        if not self._on:
            return
        try:
            draw()
            self._file.flush()
        except (OSError, ValueError) as error:  # ValueError: the file was closed
            self._on = False
            warn(f"tolaria: progress output stopped ({error}); training goes on")
            self._discard_output()

    def _discard_output(self) -> None:
        # What is still buffered would fail again when the interpreter flushes it at exit, and turn a finished run
        # into exit code 120.
        try:
            target = self._file.fileno()
        except (OSError, ValueError):
            return  # no descriptor: nothing is flushed to it later
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, target)
        os.close(null)
