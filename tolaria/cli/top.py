"""`tolaria top RUN`: a live view of a run in the terminal: curves, ranks, seeds, steering, commands, time."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live

from tolaria.cli.frame import MIN_HEIGHT, frame
from tolaria.cli.printing import print_json
from tolaria.cli.screen import can_show, make_console, say
from tolaria.cli.status import JsonOption, RunArgument
from tolaria.view.drawing import BRAILLE
from tolaria.view.files import open_files
from tolaria.view.lookout import Lookout, View
from tolaria.view.sections import SHARES

EXAMPLES = """\
Examples:

  tolaria top runs/20261125T024412Z-digits

  tolaria top runs/20261125T024412Z-digits --once

  COLUMNS=160 LINES=50 tolaria top runs/20261125T024412Z-digits --once
"""
KEYS = "q leaves"


def top(
    run: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and leave.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="Seconds between frames.")] = 1.0,
    as_json: JsonOption = False,
) -> int:
    """Watch a run: it is drawn again every second, through its end and its next start, until you leave with q."""
    lookout = Lookout(open_files(run))
    console = make_console()
    plain = not can_show(console, SHARES + chr(BRAILLE))
    if as_json:
        print_json(_document(lookout.look()))
        return 0
    if once or not (console.is_terminal and sys.stdin.isatty()):
        view = lookout.look()
        say(console, frame(view, console.width, _height(console), console.encoding, plain=plain))
        return 0
    with suppress(KeyboardInterrupt):
        _watch(lookout, console, every, plain=plain)
    return 0


def _watch(lookout: Lookout, console: Console, every: float, *, plain: bool) -> None:
    """Draw until q or Ctrl-C."""
    with _single_keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        end = 0.0
        while True:
            if time.monotonic() >= end:
                end = time.monotonic() + every
                view = lookout.look()
                size = console.size
                lines = frame(view, size.width, size.height, console.encoding, plain=plain, keys=KEYS)
                live.update(Group(*lines), refresh=True)
            if pressed(max(0.0, end - time.monotonic())) in ("q", "Q"):
                return


@contextmanager
def _single_keys() -> "Iterator[_Pressed]":
    """Keys one at a time, without waiting for Enter; the terminal is as before afterwards. Ctrl-C interrupts."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield _Pressed(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class _Pressed:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, wait_s: float) -> str:
        """The next key within ``wait_s`` seconds, "" for none; q where nobody can type any more."""
        ready, _, _ = select.select([self._descriptor], [], [], wait_s)
        return os.read(self._descriptor, 1).decode(errors="replace") or "q" if ready else ""


def _height(console: Console) -> int:
    """Lines of a frame that is printed once: those of LINES or the terminal; 24 where there is none."""
    lines = os.environ.get("LINES", "")
    if lines.isdigit() and int(lines) >= MIN_HEIGHT:
        return int(lines)
    return console.height - 1 if console.is_terminal else 24


def _document(view: View) -> dict[str, object]:
    """What a frame shows, for a program."""
    boundaries = [
        {"step": b.step, "train_loss": b.train_loss, "val_loss": b.val_loss, "val_accuracy": b.val_accuracy}
        for b in view.course.boundaries
    ]
    return {"schema": 1, "now": asdict(view.now), "boundaries": boundaries,
            "steps": [{"step": p.step, "loss": p.loss} for p in view.steps]}  # fmt: skip
