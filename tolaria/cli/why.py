"""`tolaria why RUN [TOPIC]`: why a run is as it is, with steps, numbers, and what can be done."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from tolaria.cli.printing import print_json
from tolaria.cli.screen import STYLES, lay_line, make_console, say
from tolaria.cli.status import JsonOption, RunArgument
from tolaria.telemetry.words import printable
from tolaria.view.files import open_files
from tolaria.view.lookout import View, look
from tolaria.view.sections import headline
from tolaria.view.why import NOTHING, STYLE_OF, TOPICS, Answer, Urgency, before, explain, unusual

EXAMPLES = """\
Examples:

  tolaria why runs/20261125T024412Z-digits

  tolaria why runs/20261125T024412Z-digits conservative

  tolaria why runs/20261125T024412Z-digits refused --command b12-0
"""
LABEL = 14
LIST_IDS = "tolaria logs {run} --kind command_applied,command_refused,act_applied,act_refused --json"


def why(
    run: RunArgument,
    topic: Annotated[str, typer.Argument(metavar="[TOPIC]", help=f"One of: {', '.join(TOPICS)}.")] = "",
    command: Annotated[str, typer.Option("--command", metavar="ID", help="The command that was refused.")] = "",
    as_json: JsonOption = False,
) -> int:
    """Say why a run is as it is. Without a topic: all that is unusual now, the most urgent first."""
    topic = topic or ("refused" if command else "")
    if topic and topic not in TOPICS:
        raise typer.BadParameter(f"{topic!r}: expected one of {', '.join(TOPICS)}")
    view = look(open_files(run))
    if command and command not in _known_ids(view):
        raise typer.BadParameter(f"--command {command}: no such command; `{LIST_IDS.format(run=run)}` has the ids")
    answers = explain(view, topic, command_id=command) if topic else unusual(view)
    if as_json:
        listed = [{**asdict(answer), "urgency": answer.urgency.name.lower()} for answer in answers]
        print_json({"schema": 1, "run": view.now.path, "state": view.now.state, "topic": topic, "answers": listed})
        return 0
    console = make_console()
    say(console, page(view, topic, answers, console.width, console.encoding))
    return 0


def page(view: View, topic: str, answers: list[Answer], width: int, encoding: str) -> list[Text]:
    """The answers as text at this width."""
    rows = [Text(printable(headline(view.now), encoding), STYLES["title"])]
    for answer in answers:
        rows += laid(answer, width, encoding)
    if not answers:
        rows += lay_line(("", NOTHING[topic] if topic else "nothing unusual", "good"), width, encoding, label=LABEL)
    past = [name for name in before(view) if not topic and name not in {answer.topic for answer in answers}]
    if past:
        told = f"over, but it happened: {', '.join(past)} (`tolaria why RUN TOPIC`)"
        rows += lay_line(("earlier", told, "dim"), width, encoding, label=LABEL)
    return rows


def laid(answer: Answer, width: int, encoding: str) -> list[Text]:
    """One answer: what, since when, by which numbers, what to do."""
    style = STYLE_OF[answer.urgency] if answer.now or answer.urgency < Urgency.NOTE else ""
    rows = lay_line((answer.topic, answer.what, style), width, encoding, label=LABEL)
    if answer.since is not None:
        rows += lay_line(("", f"since step {answer.since:,}" if answer.now else f"at step {answer.since:,}", ""),
                         width, encoding, label=LABEL)  # fmt: skip
    for fact in answer.facts:
        rows += lay_line(("", f"- {fact}", ""), width, encoding, label=LABEL, hang=2)
    advice, *commands = answer.do.split("\n")
    if advice:
        rows += lay_line(("", f"> {advice}", "dim"), width, encoding, label=LABEL, hang=2)
    # Never broken, so that they can be taken over whole.
    rows += [Text(" " * (LABEL + 4) + printable(command, encoding)) for command in commands]
    return rows


def _known_ids(view: View) -> set[str]:
    ids = {asked.command_id for asked in view.now.commands}
    return ids | {name[-8:] for name in ids}
