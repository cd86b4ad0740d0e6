"""Ranks of a benchmark, each a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_ranks(ranks: int, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Run ``python -m benchmarks.MODULE ARGUMENTS`` on so many ranks, one thread each, several under torchrun.

    ``environment`` comes on top of one without a folder for inductor's code: what was compiled for something else
    before would make a cold start a warm one. Returns when they have ended; raises SystemExit when they have failed.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", f"benchmarks.{module}", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=inherited | own, check=False)
    if done.returncode:
        raise SystemExit(f"{module}: ended with exit code {done.returncode} on {ranks} ranks; its output says why")
