"""The picture of boundary.py: where a boundary's time goes on two ranks, and what rank 0 works among many."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.figures import Spread

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("#1f77b4", "#d62728")
OMITTED = ("validation", "signal")


def draw(
    sides: Mapping[str, Mapping[str, Spread]], work: Mapping[int, float], line: tuple[float, float], file: Path
) -> None:
    """``sides``: part -> spread in milliseconds. ``work``: ranks -> milliseconds of rank 0; ``line`` through it:
    milliseconds at no rank, microseconds for each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    _parts(left, sides)
    ranks = np.array(sorted(work))
    right.plot(ranks, [work[n] for n in ranks], "o", color=COLOURS[0], label="measured, simulated ranks")
    right.plot(ranks, line[0] + line[1] * ranks / 1e3, color="#7f7f7f",
               label=f"{line[0]:.2f} ms + {line[1]:.2f} us for each rank")  # fmt: skip
    right.set_xlabel("ranks")
    right.set_ylabel("rank 0's own work at a boundary, ms")
    right.set_ylim(bottom=0)
    right.legend(fontsize=9)
    right.set_title("rank 0 among many ranks")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _parts(axis: Axes, sides: Mapping[str, Mapping[str, Spread]]) -> None:
    """Bars to the median, whiskers to the 99th percentile."""
    first = next(iter(sides.values()))
    names = [name for name in first if name.islower() and name not in OMITTED]
    height = 0.8 / len(sides)
    for at, ((side, found), colour) in enumerate(zip(sides.items(), COLOURS, strict=True)):
        medians = np.array([found[name].median for name in names])
        tails = np.array([found[name].p99 for name in names]) - medians
        whole = found["BOUNDARY"]
        axis.barh(
            np.arange(len(names)) + at * height, medians, height, xerr=[0 * tails, tails], color=colour, capsize=2,
            ecolor="#4f4f4f", label=f"{side}: {whole.median:.1f} ms in all, 99th percentile {whole.p99:.1f}",
        )  # fmt: skip
    axis.set_yticks(np.arange(len(names)) + height / 2, names)
    axis.invert_yaxis()
    axis.set_xlabel("ms: median, and up to the 99th percentile")
    axis.legend(fontsize=9, loc="lower right")
    axis.set_title("a boundary on two ranks, by part")
