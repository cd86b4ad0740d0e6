"""`tolaria report RUN`: one HTML page of a run, made from its files."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from tolaria.cli.printing import console, print_json, safe
from tolaria.errors import RunDirError
from tolaria.report_page import build_page
from tolaria.telemetry.words import counted
from tolaria.view.files import RunFiles, open_files
from tolaria.view.history import read_history

PAGE_NAME = "report.html"
MAX_CONFIG_BYTES = 1024 * 1024


def report(
    run: Annotated[str, typer.Argument(help="The run's directory.")],
    out: Annotated[str, typer.Option("--out", "-o", help="The page; without it RUN/report.html.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print where the page is, as JSON.")] = False,
) -> int:
    """Write one self-contained page of a run: curves with what happened on them, seeds, time, commands, recoveries.

    It needs no network and has no script; it works from a file, on a phone and on paper. Of a live run it shows
    the course so far.

    Examples: tolaria report runs/RUN | tolaria report runs/RUN --out plateau.html
    """
    files = open_files(run)
    history = read_history(files)
    page = build_page(
        history, summary=files.summary() or {}, status=files.status() or {}, config=_config(files),
        where=str(files.path), alive=files.alive, written_ns=time.time_ns(),
    )  # fmt: skip
    target = Path(out) if out else files.path / PAGE_NAME
    _write(target, page, 0o666 if out else 0o600)  # a run's directory is for its owner only
    size, commands, returns = len(page.encode()), len(history.commands), len(history.returns)
    if json:
        print_json({"page": str(target), "bytes": size, "steps": history.end_step, "commands": commands,
                    "boundaries": len(history.boundaries), "returns": returns})  # fmt: skip
    else:
        console().print(
            f"{safe(str(target))}\n{counted(history.end_step, 'step')}, {counted(commands, 'command')}, "
            f"{counted(returns, 'return')}; {size / 1024:,.0f} KiB"
        )
    return 0


def _config(files: RunFiles) -> str:
    path = files.path / "config.toml"
    try:
        with path.open("rb") as file:
            return file.read(MAX_CONFIG_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunDirError(f"{path}: cannot be read ({error.strerror})") from error


def _write(path: Path, page: str, mode: int) -> None:
    """The page whole or not at all; a former one stays until then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(page)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunDirError(f"{path}: cannot be written ({error.strerror}); choose another place with --out") from error
