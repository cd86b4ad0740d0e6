"""`python -m tolaria.launch`: parse, train, leave with a code that says how it went.

    torchrun --nproc_per_node=2 -m tolaria.launch --config launch/configs/digits.toml     two ranks
    python -m tolaria.launch --config ...                                                 one process, compiled
    python -m tolaria.launch --config ... --debug                                         one process, eager, checked

Exit codes: 0 finished, or stopped on request with a checkpoint; 2 configuration or task; 65 going back did not help;
69 halted, or died three times at one step; 70 ranks differ; 71 a rank was lost; 73 run directory; 74 checkpoint or log
of decisions; 75 run directory in use. torchrun itself reports 1 for any of them.
"""

import os
import sys
import time
import warnings
from collections.abc import Sequence

from tolaria.config import Config
from tolaria.errors import PeerLost, TolariaError
from tolaria.options import parse

CULPRIT_FIRST_S = 5.0  # a rank that failed needs up to some seconds to end: torch is slow to unload


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags; the exit code. A wrong flag is answered before torch is loaded."""
    return run(parse(argv))


def run(config: Config, *, until: int = 0) -> int:
    """Train this rank's part, to the end or ``until`` a step; the exit code."""
    from tolaria.process import agent_id, set_parent_death_signal, since_start_s  # noqa: PLC0415 - after the flags

    began = time.perf_counter() - since_start_s()
    if agent_id() is not None:
        # Ranks whose torchrun was killed would train on, unseen, and write into the run directory.
        set_parent_death_signal()
    # Said once per rank for convolutions of one channel, whose gradients have two equal layouts.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    rank = os.environ.get("RANK", "0")
    try:
        from tolaria.build import train  # noqa: PLC0415 - seconds of importing torch

        train(config, until=until, began=began)
    except TolariaError as error:
        # One line: what a task raised may have many.
        text = " ".join(str(error).split())
        sys.stderr.write(f"tolaria: rank {rank}: {text}\n" if "RANK" in os.environ else f"tolaria: {text}\n")
        if isinstance(error, PeerLost):
            _leave(error.exit_code)
        return error.exit_code
    return 0


def _leave(code: int) -> None:
    """End this rank, which did nothing wrong, after the one that was lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    # torchrun reports the rank that ended first as the cause. It ends this one as soon as it has seen the other's end.
    time.sleep(CULPRIT_FIRST_S)
    # Process groups whose peer is gone may wait in their destructors.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
