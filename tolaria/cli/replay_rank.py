"""`python -m tolaria.cli.replay_rank STEP --section.key VALUE ...`: one rank of what `tolaria replay` starts.

As `python -m tolaria.launch` with these flags, but it stops after that step; 0: at the run's own end.
"""

import sys

from tolaria.launch import run
from tolaria.options import parse

if __name__ == "__main__":
    sys.exit(run(parse(sys.argv[2:]), until=int(sys.argv[1])))
