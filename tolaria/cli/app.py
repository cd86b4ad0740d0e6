"""The `tolaria` command. Every command is a module beside this one; here they get their names and their order.

No command imports torch before it needs it: `tolaria status` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import Any

import typer

from tolaria.cli import logs, policy, runs, status, top, why
from tolaria.cli.attempt import attempt
from tolaria.cli.audit import audit
from tolaria.cli.export import export
from tolaria.cli.replay import replay
from tolaria.cli.report import report
from tolaria.cli.send import UNDO_EXAMPLES, send, undo
from tolaria.cli.verify import verify
from tolaria.errors import TolariaError

EXIT_CODES = """\
Exit codes: 0 done; 1 the answer is no (a check failed, a command was
refused); 2 wrong arguments; 73 no such run, or its directory cannot be read;
74 a checkpoint or log is damaged; 75 the run is not running, or does not
answer.
"""

app = typer.Typer(
    name="tolaria", help="See a run of Tolaria, steer it while it trains, and check afterwards what happened.",
    epilog=EXIT_CODES, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


app.command("audit")(audit)
app.command("export")(export)
app.command("logs", epilog=logs.EXAMPLES)(logs.logs)
app.add_typer(policy.app, name="policy")
app.command("replay")(replay)
app.command("report")(report)
app.command("runs", epilog=runs.EXAMPLES)(runs.runs)
app.add_typer(send, name="send")
app.command("status", epilog=status.EXAMPLES)(status.status)
app.command("top", epilog=top.EXAMPLES)(top.top)
app.command("try")(attempt)
app.command("undo", epilog=UNDO_EXAMPLES)(undo)
app.command("verify")(verify)
app.command("why", epilog=why.EXAMPLES)(why.why)


# Newer typer brings click along under a name of its own, older ones use the one beside it.
_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments; the exit code. Errors are one line on stderr."""
    try:
        result = app(args=list(sys.argv[1:] if argv is None else argv), prog_name="tolaria", standalone_mode=False)
    except _USAGE as error:
        error.show()
        return int(error.exit_code)
    except typer.Abort:
        return 130
    except TolariaError as error:
        sys.stderr.write(f"tolaria: {' '.join(str(error).split())}\n")
        return error.exit_code
    except BrokenPipeError:
        # `tolaria logs RUN | head`: nobody reads on, and that is no error.
        sys.stderr.close()
        return 0
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
