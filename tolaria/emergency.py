"""The operator's hand on a running job: raise an emergency on every rank of this machine, take it back, or look.

    python -m tolaria.emergency runs/20261124T010203Z-digits halt --reason "disk needs replacing"
    python -m tolaria.emergency runs/20261124T010203Z-digits clear
    python -m tolaria.emergency runs/20261124T010203Z-digits status

What a rank does about a level it does at its next step, together with all others.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tolaria.recovery.page import OPERATOR, Page

LEVELS = {"notice": 1, "elevated": 2, "conservative": 3, "halt": 4}
ANSWER_S = 1.0
NOT_RUNNING = 73
EPILOG = """\
levels:
  notice        an event in the run's log
  elevated      back to the newest good checkpoint
  conservative  back to the newest snapshot, then conservative mode
  halt          stand still; after recovery.halt_wait_s save and end, or go on
                when it is cleared before

example:
  python -m tolaria.emergency runs/RUN halt --reason "disk needs replacing"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments; the exit code: 0, 2 for wrong ones, 73 when no such run is running here."""
    options = _parser().parse_args(argv)
    try:
        page = _attach(Path(options.run))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"tolaria: {options.run}: no run is running here on this machine ({error})\n")
        return NOT_RUNNING
    try:
        if options.what == "status":
            print(_status(page))  # noqa: T201
            return 0
        before = page.token()
        start = time.monotonic_ns()
        if options.what == "clear":
            page.clear(everywhere=True)
        else:
            page.raise_level(LEVELS.get(options.what) or int(options.what), f"operator: {options.reason}")
        if page.token() == before:
            print(f"nothing to do: {_status(page)}")  # noqa: T201
            return 0
        return _wait_for_ranks(page, start)
    finally:
        page.close()


def _attach(run: Path) -> Page:
    return Page.attach(Path((run / "PAGE").read_text().strip()), line=OPERATOR)


def _status(page: Page) -> str:
    level = page.level()
    return f"level {level}: {page.reason()}" if level else "no emergency"


def _wait_for_ranks(page: Page, start_ns: int) -> int:
    token, end = page.token(), time.monotonic() + ANSWER_S
    while time.monotonic() < end and any(page.rank_line(r).ack < token for r in range(page.ranks)):
        time.sleep(0.002)
    for rank in range(page.ranks):
        line = page.rank_line(rank)
        what = f"seen after {(line.ack_ns - start_ns) / 1e6:.1f} ms" if line.ack >= token else "not seen yet"
        print(f"rank {rank} of this machine: {what}{', stopped meanwhile' if line.stopped else ''}")  # noqa: T201
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tolaria.emergency", description="Raise an emergency in a running job, take it back, or look.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
    )  # fmt: skip
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("what", metavar="LEVEL|clear|status", choices=[*LEVELS, "1", "2", "3", "4", "clear", "status"],
                        help="notice, elevated, conservative, halt (or 1 to 4), clear, status")  # fmt: skip
    parser.add_argument("--reason", default="no reason given", help="why, for the log")
    return parser


if __name__ == "__main__":
    sys.exit(main())
