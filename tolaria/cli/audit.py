"""`tolaria audit RUN`: who decided what and why, what came of it, and whether the record of it is whole."""

from dataclasses import asdict
from typing import Annotated

import typer

from tolaria.cli.printing import console, print_json, print_row, safe
from tolaria.evidence.audit import Audit, audit_run
from tolaria.evidence.keys import keys_for
from tolaria.evidence.signed import Tally
from tolaria.evidence.trail import Entry
from tolaria.telemetry.words import counted
from tolaria.view.files import open_files

QUIET_SORTS = ("checkpoint", "good")


def audit(
    run: Annotated[str, typer.Argument(help="The run's directory.")],
    key_file: Annotated[
        list[str] | None, typer.Option("--key-file", help="Keys to verify signatures with, beside those in the run.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Checkpoints too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Tell the run's decisions from its log, in order, and check that log.

    Checked are the chain of hashes, each order's signature and that the log says what was ordered, the signed frames
    of the policy, and the events and checkpoints against the log. Exit code 1 when anything is wrong.

    The chain shows damage and careless changes. It has no key: against somebody who may write the run's directory and
    rewrites all of it, only signatures with a key that is kept elsewhere prove anything.

    Examples: tolaria audit runs/RUN | tolaria audit runs/RUN --key-file keys/shared.key --json
    """
    found = audit_run(open_files(run), keys_for(open_files(run).path, key_file or []))
    if json:
        print_json({**asdict(found), "faults": found.faults, "verdict": "WRONG" if found.faults else "verified"})
    else:
        _tell(found, every=every)
    return 1 if found.faults else 0


def _tell(found: Audit, *, every: bool) -> None:
    out = console()
    for entry in found.entries:
        if every or entry.sort not in QUIET_SORTS:
            _tell_entry(entry)
    out.print()
    whole = f"{counted(found.records, 'record')} in {counted(found.segments, 'segment')}"
    whole += ", the last one not finished" if found.torn else ""
    print_row("log      ", _verdict(found.chain + found.story), f"{whole}, {counted(found.quiet, 'boundary')}"
              .replace("boundarys", "boundaries") + " without a command")  # fmt: skip
    print_row("orders   ", _verdict(found.orders.faults, found.orders), _counts(found.orders, "signed order"))
    print_row("policy   ", _verdict(found.policy.faults, found.policy), _counts(found.policy, "signed frame"))
    print_row("files    ", _verdict(found.files), "events and checkpoints, held against the log")
    for fault in found.faults:
        print_row("WRONG    ", "", fault)


def _tell_entry(entry: Entry) -> None:
    out = console()
    step = f"step {entry.step:,}" if entry.step is not None else ""
    signed = {"verified": "  [green]verified[/]", "no key": "  [yellow]not verifiable (no key)[/]",
              "WRONG": "  [bold red]WRONG[/]"}.get(entry.proof, "")  # fmt: skip
    who = f"{safe(entry.who)}: " if entry.who else ""
    out.print(f"{step:<12}{who}[bold]{safe(entry.what)}[/]{signed}", soft_wrap=not out.is_terminal)
    for name, told in (("why", entry.why), ("effect", entry.effect)):
        if told:
            print_row("          " + name.ljust(6), "", told)


def _verdict(faults: list[str], tally: Tally | None = None) -> str:
    if faults:
        return "[bold red]WRONG[/]"
    if tally is not None and not tally.verified:
        return "[yellow]not verifiable[/]" if tally.no_key else "-"
    return "[green]verified[/]"


def _counts(tally: Tally, noun: str) -> str:
    total = tally.verified + tally.no_key + len(tally.faults)
    if not total:
        return f"no {noun} was recorded"
    parts = [f"{tally.verified} verified"]
    parts += [f"{tally.no_key} without a key to verify them"] if tally.no_key else []
    return f"{counted(total, noun)}: {', '.join(parts)}" if not tally.faults else ", ".join(parts)
