"""`tolaria verify PATH`: every hash of a checkpoint, of a run's checkpoints, of its log."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tolaria.cli.printing import console, print_json, print_row
from tolaria.errors import CheckpointError
from tolaria.evidence import checkpoint as hashing
from tolaria.evidence.checkpoint import Checked
from tolaria.evidence.soundness import CHECKPOINTS, LOG, Plan, check, plan_for
from tolaria.telemetry.words import counted, large
from tolaria.view.files import RunFiles

SHOW_PROGRESS_BYTES = 200_000_000


def verify(
    path: Annotated[str, typer.Argument(help="A run's directory, or one checkpoint: RUN/ckpt/NAME.")],
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> int:
    """Read every byte of checkpoints and log, and say of each whether it is as it was written.

    Changes nothing, so it may be the run that is training. Exit code 74 when anything is damaged.

    Examples: tolaria verify runs/RUN | tolaria verify runs/RUN/ckpt/c8-s792
    """
    plan = plan_for(path)
    alive = (plan.root / CHECKPOINTS).is_dir() and RunFiles(plan.root).alive
    found: list[Checked] = []
    with _progress(plan, hidden=json) as advance:
        for each in check(plan, alive=alive, progress=advance):
            found.append(each)
            if not json:
                _tell(each, max(len(LOG), *(len(path.name) for path in plan.checkpoints), 0))
    damaged = [each for each in found if not each.sound]
    if json:
        print_json({"path": path, "sound": not damaged, "checked": [{**asdict(e), "sound": e.sound} for e in found]})
    else:
        read = f"{large(sum(each.size for each in found))}B read"
        console().print(f"[bold red]{len(damaged)} of {len(found)} damaged[/], {read}" if damaged else
                        f"[green]all sound[/]: {counted(len(found), 'part')}, {read}")  # fmt: skip
    return CheckpointError.exit_code if damaged else 0


def _tell(each: Checked, width: int) -> None:
    name = each.name.ljust(width)
    if each.sound and not each.files:
        print_row(name, "-", each.note)
    elif each.sound:
        what = counted(each.files, "segment" if each.name == LOG else "file")
        print_row(
            name, "[green]sound[/]", ", ".join(part for part in (what, f"{large(each.size)}B", each.note) if part)
        )
    for fault in each.faults:
        print_row(name, "[bold red]DAMAGED[/]", fault)


@contextmanager
def _progress(plan: Plan, *, hidden: bool) -> Iterator[hashing.Progress]:
    """A bar on stderr for what takes its time; nothing where nobody looks."""
    console_ = Console(stderr=True)
    size = plan.size
    if hidden or size < SHOW_PROGRESS_BYTES or not console_.is_terminal:
        yield lambda count: None
        return
    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console_, transient=True) as bar:
        task = bar.add_task("hashing", total=size)
        yield lambda count: bar.advance(task, count)
