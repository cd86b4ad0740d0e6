"""`tolaria replay RUN`: the run once more from its log, without its policy, and whether it comes out the same."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tolaria.cli.printing import console, print_json, safe
from tolaria.errors import ConfigError
from tolaria.telemetry.words import counted, duration, short_path
from tolaria.view.files import open_files

if TYPE_CHECKING:
    from tolaria.replay.again import Replayed
    from tolaria.replay.course import Course
    from tolaria.replay.trace import Difference

SHOWN = 5
DIFFERENT = 1
NOTHING_COMPARED = "nothing of the whole state was kept to compare with"


def replay(
    run: Annotated[str, typer.Argument(help="Directory of a run that is over: finished, stopped, or cut off.")],
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="Where the replay is put, and stays.")] = "",
    ranks: Annotated[int, typer.Option("--ranks", help="Only the run's own number can come out the same.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the replay's directory when all is equal too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Do a run once more from its log, without its policy, and compare.

    Every decision, return and order is taken from the log. The state of every
    rank has to come out as recorded, bit for bit: weights, optimizer, seeds,
    rates, mode. Losses and the structure after each command are compared on
    the way, and the first place that differs is named. A run that was cut off
    is followed to its newest checkpoint.

    The run's directory is only read. A replay needs the task and its data, as
    many ranks, and about as much time. A sample may depend on its index and on
    random numbers, but not on how often it was read.

    Examples:
      tolaria replay runs/RUN
      tolaria replay runs/RUN --to /scratch/again --json

    Exit codes: 0 equal; 1 different; 74 the log is damaged;
    75 the run is still training.
    """
    from tolaria.recovery.fsops import FileOps  # noqa: PLC0415 - after the arguments, as below: they load torch
    from tolaria.replay import again  # noqa: PLC0415
    from tolaria.replay.course import read_course  # noqa: PLC0415

    files = open_files(run)
    fs = FileOps()
    course = read_course(files, fs)
    if ranks not in (0, course.world_size):
        raise ConfigError(
            f"--ranks {ranks}: the run was recorded with {counted(course.world_size, 'rank')}, and with another number "
            "its sums come out in another order; leave --ranks out"
        )
    folder = Path(to) if to else _beside(files.path)
    folder = Path(os.path.abspath(folder))
    command = again.prepare(course, folder, fs)
    warnings = again.warnings_of(course)
    try:
        # As after Ctrl-C: the ranks must not train on, unseen, when this process is ended.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with _progress(course) as tell:
            found = again.run(command, course, folder, tell)
    except KeyboardInterrupt:
        if not to and not keep:
            fs.remove_tree(folder)
        raise
    equal = not found.differences and not found.failure and (not course.digests or course.digests == found.digests)
    kept = bool(to) or keep or not equal
    if not kept:
        fs.remove_tree(folder)
    if json:
        print_json(_document(course, found, warnings, equal=equal, kept=kept))
    else:
        _tell(course, found, warnings, equal=equal, kept=kept)
    return 0 if equal else DIFFERENT


def _beside(run: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return run.parent / f"{stamp}-replay-of-{run.name}"


@contextmanager
def _progress(course: "Course") -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error, nothing elsewhere."""
    shown = Console(stderr=True)
    with Progress(
        TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn(),
        console=shown, transient=True, disable=not shown.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=course.step)
        yield lambda step: bar.update(task, completed=step)


def _document(
    course: "Course", found: "Replayed", warnings: list[str], *, equal: bool, kept: bool
) -> dict[str, Any]:  # fmt: skip
    return {
        "run": str(course.path), "equal": equal, "outcome": course.outcome, "steps": course.step,
        "ranks": course.world_size, "state_from": course.source, "recorded": course.digests, "replayed": found.digests,
        "compared": found.compared,
        "returns": [{"cause": r.cause, "from_step": r.from_step, "to_step": r.to_step} for r in course.returns],
        "differences": [
            {"step": d.place.step, "number": d.place.number, "place": d.place.in_words(), "recorded": d.recorded,
             "replayed": d.replayed, "commands": list(d.commands)}
            for d in found.differences
        ],
        "failure": found.failure, "warnings": warnings, "seconds": found.seconds, "run_seconds": course.seconds,
        "kept": str(found.folder) if kept else None,
    }  # fmt: skip


def _tell(course: "Course", found: "Replayed", warnings: list[str], *, equal: bool, kept: bool) -> None:
    out = console()
    took = f" (the run took {duration(course.seconds)})" if course.seconds is not None else ""
    out.print(
        f"replayed {counted(course.step, 'step')} on {counted(course.world_size, 'rank')} in "
        f"{duration(found.seconds)}{took}"
    )
    for back in course.returns:
        out.print(f"  back      step {back.from_step:,} to {back.to_step:,}: {safe(back.reason)}")
    nouns = {"boundary": "boundaries"}
    parts = [
        f"{count:,} {kind if count == 1 else nouns.get(kind, f'{kind}s' if kind != 'loss' else 'losses')}"
        for kind, count in sorted(found.compared.items())
    ]
    out.print(f"  compared  {', '.join(parts) or 'nothing on the way'}")
    if course.digests and found.digests:
        out.print(f"            and the whole state of {counted(len(course.digests), 'rank')} at the end")
    for text in warnings:
        out.print(f"  [yellow]note[/]      {safe(text)}")
    if equal:
        end = f"every rank ends with the state in {course.source}, bit for bit" if course.digests else NOTHING_COMPARED
        out.print(f"[green]equal[/]: {end}")
        if course.digests:
            out.print(f"  state     {course.digests[0]}")
    else:
        _tell_differences(out, course, found)
    if kept:
        out.print(f"  kept      {safe(short_path(str(found.folder)))}")


def _tell_differences(out: Console, course: "Course", found: "Replayed") -> None:
    first = found.differences[0] if found.differences else None
    if first is not None:
        out.print(f"[red]different[/], first at {safe(first.place.in_words())}")
        _tell_one(out, first)
    else:
        out.print(f"[red]different[/] at the end only: the state is not that in {course.source}")
    for rank, digest in sorted(course.digests.items()):
        if found.digests.get(rank) != digest:
            replayed = found.digests.get(rank, "not reached")
            out.print(f"  rank {rank}    recorded {digest[:16]}, replayed {replayed[:16]}")
    if found.failure:
        out.print(f"  ended     {safe(found.failure)}")
        out.print("            Do the data depend on how often they are read? Then no replay can follow.")
    if len(found.differences) > 1:
        out.print(f"  after it  {counted(len(found.differences) - 1, 'further place')}, such as")
        for other in found.differences[1:SHOWN]:
            out.print(f"            {safe(other.place.in_words())}")


def _tell_one(out: Console, difference: "Difference") -> None:
    for text in difference.commands:
        out.print(f"  the log   {safe(text)}")
    if difference.recorded is not None:
        out.print(f"  recorded  {safe(str(difference.recorded))}")
    out.print(f"  replayed  {safe(str(difference.replayed))}")
