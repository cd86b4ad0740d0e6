"""`tolaria policy`: for people who write policies."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tolaria.errors import ConfigError
from tolaria.kit.conformance import CHECKS, FAIL, PASS, Check, Result, check_policy, check_service
from tolaria.kit.replay import Agreement, Compared, replay, summarise
from tolaria.kit.subject import Subject
from tolaria.leyline.framing import KeyRing, load_key_file
from tolaria.tamiyo.endpoint import parse_endpoint
from tolaria.tamiyo.policies import FORMS, read_args
from tolaria.telemetry.words import printable
from tolaria.view import open_files
from tolaria.view.frames import read_keys

STYLES = {PASS: "green", FAIL: "bold red"}
GUTTER = 2 + 7 + 2 + max(map(len, CHECKS)) + 2

app = typer.Typer(
    help="Test a policy before it steers anything; ask it what it would have done on a past run.",
    no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Spec = Annotated[str, typer.Argument(help=FORMS, show_default=False)]
Args = Annotated[
    list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="Keyword argument of the policy; repeatable.")
]
Deadline = Annotated[float, typer.Option(help="Milliseconds that one answer may take.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyFile = Annotated[str, typer.Option(help="Shared key of a service of its own.", show_default=False)]

TEST_HELP = (
    "Test whether a policy keeps what every trainer relies on.\n\n"
    "It is asked over a simulated run and over odd states, in a process of its own with a deadline that holds: answers "
    "in time, no exceptions, only legal commands within the bounds, the same answer to the same question, nothing that "
    "a restart would lose. Exit code 1 when a check fails."
)
REPLAY_HELP = (
    "Show what another policy would have commanded on a recorded run.\n\n"
    "Every recorded question is put to it in order. Its answers after the first difference are those to states that it "
    "would not have seen. Exit code 1 when it fails to answer one."
)
TEST_EXAMPLES = """\
Examples:

tolaria policy test heuristic

tolaria policy test my_policy:OneSeed --arg patience=3

tolaria policy test --endpoint ipc:///tmp/policy.sock --key-file keys/shared.key
"""
REPLAY_EXAMPLES = """\
Examples:

tolaria policy replay runs/20261125T024412Z-digits my_policy:OneSeed

tolaria policy replay RUN heuristic --arg patience=8 --json
"""


@app.command("test", help=TEST_HELP, epilog=TEST_EXAMPLES)
def check(
    policy: Annotated[str, typer.Argument(help=f"{FORMS}; none with --endpoint", show_default=False)] = "",
    arg: Args = None,
    deadline_ms: Deadline = 12_000,
    endpoint: Annotated[
        str, typer.Option(help="Test a service, in any language, that answers here.", show_default=False)
    ] = "",
    key_file: KeyFile = "",
    json_: AsJson = False,
) -> int:
    """`tolaria policy test`."""
    if bool(policy) == bool(endpoint):
        raise ConfigError("tolaria policy test: expected a policy, or --endpoint, and not both")
    if endpoint:
        if not key_file:
            raise ConfigError("--key-file: expected the key that the service has, with --endpoint")
        keys, where = load_key_file(key_file), parse_endpoint(endpoint, "--endpoint")
        connect = partial(_connected, where.url, keys, deadline_ms)
        result = check_service(endpoint, connect, deadline_ms=deadline_ms)
    else:
        _see_own_folder()
        result = check_policy(policy, read_args(arg or []), deadline_ms=deadline_ms)
    if json_:
        sys.stdout.write(json.dumps(result.to_dict(), indent=2) + "\n")
    else:
        _show_result(result)
    return 0 if result.passed else 1


@app.command("replay", help=REPLAY_HELP, epilog=REPLAY_EXAMPLES)
def replay_run(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    policy: Spec,
    arg: Args = None,
    deadline_ms: Deadline = 12_000,
    key_file: KeyFile = "",
    json_: AsJson = False,
) -> int:
    """`tolaria policy replay`."""
    _see_own_folder()
    files = open_files(run)
    keys = read_keys(files.path, Path(key_file) if key_file else None)
    found: list[Compared] = []
    console = _console()
    for compared in replay(files.path, keys, policy, read_args(arg or []), deadline_ms=deadline_ms):
        found.append(compared)
        if not json_:
            _show_boundary(console, compared)
    agreement = summarise(found)
    if json_:
        document = {"summary": agreement.to_dict(), "boundaries": [vars(row) for row in found]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        _show_agreement(console, agreement, verified=keys is not None)
    return 1 if agreement.failures else 0


@contextmanager
def _connected(endpoint: str, keys: KeyRing, deadline_ms: float) -> Iterator[Subject]:
    subject = Subject(endpoint, keys, deadline_ms=deadline_ms)
    try:
        yield subject
    finally:
        subject.close()


def _see_own_folder() -> None:
    """What lies where the command is typed can be imported, as with ``python -m``."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


def _line(console: Console, head: Text, text: str) -> None:
    """``head``, then foreign text, wrapped beside it."""
    width = max(20, console.width - len(head.plain))
    lines = Text(printable(text, console.encoding)).wrap(console, width)
    for number, part in enumerate(lines):
        part.rstrip()
        console.print((head if not number else Text(" " * len(head.plain))) + part, no_wrap=True, overflow="ignore")


def _show_result(result: Result) -> None:
    console = _console()
    console.print(f"Policy {printable(result.policy, console.encoding)}", style="bold")
    for check in result.checks:
        _show_check(console, check)
    failed = [check for check in result.checks if check.status == FAIL]
    passed = sum(check.status == PASS for check in result.checks)
    rest = Counter(check.status for check in result.checks if check.status not in (PASS, FAIL))
    told = ", ".join([f"{passed} passed", f"{len(failed)} failed", *(f"{n} {status}" for status, n in rest.items())])
    console.print(f"\n{told}", style=STYLES[PASS] if result.passed else STYLES[FAIL] if failed else "")


def _show_check(console: Console, check: Check) -> None:
    head = Text("  ")
    head.append(check.status.ljust(9), STYLES.get(check.status, "dim"))
    head.append(check.name.ljust(GUTTER - 11))
    text = f"{check.where}: {check.text}" if check.where else check.text
    _line(console, head, text)
    if check.status == FAIL:
        _line(console, Text(" " * GUTTER), f"expected: {CHECKS[check.name]}")


def _show_boundary(console: Console, row: Compared) -> None:
    mark = {True: " ", False: "!", None: "?"}[row.agrees]
    if not row.commanded and not row.would and row.agrees:
        return
    head = Text(f"{mark} boundary {row.boundary:>4}  ", "yellow" if mark == "!" else "")
    commanded = "no answer" if row.commanded is None else "; ".join(row.commanded) or "nothing"
    _line(console, head + Text("commanded   "), commanded)
    if not row.agrees:
        would = row.failure or "; ".join(row.would or []) or "nothing"
        _line(console, Text(" " * len(head.plain)) + Text("would have  "), would)


def _show_agreement(console: Console, found: Agreement, *, verified: bool) -> None:
    console.print(
        f"\nAgreed at {found.agreed} of {found.compared} boundaries; the run's policy commanded at {found.commanded}, "
        f"this one at {found.would_command}."
    )
    if found.first_difference is not None:
        text = (
            f"From boundary {found.first_difference} on the states are those of the course that the run took, not of "
            "the one that this policy would have led it."
        )
        _line(console, Text(""), text)
    if not verified:
        _line(console, Text(""), "The record was not verified: its key is not here (--key-file).")
