"""Ranks of a benchmark, each a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def own_environment(**more: str) -> dict[str, str]:
    """The environment of a benchmark's process: one thread, this code, and ``more``.

    It has no folder for inductor's code: what was compiled for something else would make a cold start a warm one.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run_ranks(ranks: int, module: str, *arguments: str, **environment: str) -> None:
    """Run ``python -m benchmarks.MODULE ARGUMENTS`` on so many ranks, several under torchrun.

    ``environment``: beside `own_environment`. Returns when they have ended; raises SystemExit when they have failed.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=own_environment(**environment), check=False)
    if done.returncode:
        raise SystemExit(f"{module}: ended with exit code {done.returncode} on {ranks} ranks; its output says why")
