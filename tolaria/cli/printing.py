"""What commands print: rich text for people on a terminal, plain text elsewhere, JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

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
