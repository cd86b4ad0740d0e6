"""``python -m tolaria.tamiyo.child PARENT_PID ARGUMENTS``: the policy server as somebody's child.

Ties the process's life to its parent's before anything slow is imported, so that also a parent that dies while the
server is starting leaves none behind.
"""

import sys
from collections.abc import Sequence

from tolaria.process import set_parent_death_signal


def main(argv: Sequence[str]) -> int:
    """Run the server with the arguments after the parent's process id; returns the exit code."""
    parent_pid, *arguments = argv
    set_parent_death_signal(int(parent_pid))
    from tolaria.tamiyo import server  # noqa: PLC0415  (see above)

    return server.main(["--parent-pid", parent_pid, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
