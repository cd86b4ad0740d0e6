"""A rank as the watchdog knows it: a process that signs in to a page. Arguments: PAGE RANK RUN WHAT."""

import faulthandler
import os
import re
import signal
import sys
import time
from pathlib import Path

from tolaria.process import start_time
from tolaria.recovery.page import Page, Phase
from tolaria.recovery.pulse import Pulse
from tolaria.recovery.watchdog import stack_file


def main() -> None:
    """Sign in, say so, and do what is asked for until somebody ends it."""
    path, rank, run_dir, what = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    page = Page.attach(path, line=2 + rank)
    faulthandler.register(signal.SIGUSR1, file=stack_file(run_dir, rank).open("a"), all_threads=True)
    page.sign_in(start_time(os.getpid()))
    Pulse(page).start()
    page.enter(Phase.STEP, 7)
    sys.stdout.write("in\n")
    sys.stdout.flush()
    sys.stdin.readline()
    if what == "hold":
        re.match(r"(a?){34}a{34}", "a" * 34)  # minutes, and the interpreter lock all the while
    while True:
        if what == "work":
            page.enter(Phase.STEP, 7)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
