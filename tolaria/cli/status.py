"""`tolaria status RUN`: one screen of how a run is, or was when it ended."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from tolaria.cli.printing import print_json
from tolaria.cli.screen import STYLES, can_show, lay_section, make_console, say
from tolaria.telemetry.words import printable, short_path
from tolaria.view.files import open_files
from tolaria.view.lookout import View, look
from tolaria.view.sections import SHARES, Line, Section, all_sections, headline, state_style
from tolaria.view.why import STYLE_OF, unusual

EXAMPLES = """\
Examples:

  tolaria status runs/20261125T024412Z-digits

  tolaria status runs/20261125T024412Z-digits --json
"""

MOST = 3

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's directory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program, not text for a person.")]


def status(run: RunArgument, as_json: JsonOption = False) -> int:
    """Show how a run is: state, progress, losses, ranks, seeds, steering, commands, checkpoints, time."""
    view = look(open_files(run))
    if as_json:
        print_json({"schema": 1, **asdict(view.now)})
        return 0
    console = make_console()
    say(console, page(view, console.width, console.encoding, plain=not can_show(console, SHARES)))
    return 0


def page(view: View, width: int, encoding: str, *, plain: bool = False) -> list[Text]:
    """The whole status at this width."""
    title = Text(printable(headline(view.now), encoding))
    title.stylize(STYLES["title"], 0, len(view.now.name))
    title.stylize(STYLES.get(state_style(view.now.state), ""), len(view.now.name) + 2)
    rows = [title]
    for section in [*all_sections(view, plain=plain), Section("Unusual", tuple(_unusual(view)))]:
        rows += ([Text()] if section.title else []) + lay_section(section, width, encoding)
    return rows


def _unusual(view: View) -> list[Line]:
    found = unusual(view)
    lines = [(answer.topic, answer.what, STYLE_OF[answer.urgency]) for answer in found[:MOST]]
    if len(found) > MOST:
        lines.append(("", f"and {len(found) - MOST} more", "dim"))
    return [*lines, ("", f"tolaria why {short_path(view.now.path)}", "dim")] if lines else [("", "nothing", "good")]
