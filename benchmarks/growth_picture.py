"""The picture of growth.py: report loss against training FLOPs, one panel per problem.

python benchmarks/growth_picture.py growth.json docs/growth.png     draw an earlier run's figures again
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl
import numpy as np
from growth_sides import SIDES, Point, Result
from numpy.typing import NDArray

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Floats = NDArray[np.float64]
COLOURS = dict(zip(SIDES, ("#7f7f7f", "#d62728", "#1f77b4", "#2f2f2f", "#17becf"), strict=True))
MARKERS = dict(zip(SIDES, ("o", "D", "s", "^", "v"), strict=True))
TITLES = {"digits": "handwritten digits, convolutional host", "gpt": "Python source, byte-level GPT"}
UNITS = {"digits": "nats per image", "gpt": "nats per byte"}


def draw(results: Sequence[Result], file: Path) -> None:
    """Lines: mean over run seeds while they train; markers with bars: mean and standard deviation at the end."""
    problems = list(dict.fromkeys(r.problem for r in results))
    figure, axes = plt.subplots(1, len(problems), figsize=(6.4 * len(problems), 4.8), squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        _panel(axis, [r for r in results if r.problem == problem])
        axis.set_title(TITLES[problem])
        axis.set_ylabel(f"loss on the report split, {UNITS[problem]}")
    axes[0][0].legend(fontsize=8, loc="upper right", framealpha=0.95)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _panel(axis: Axes, results: Sequence[Result]) -> None:
    lowest, highest = (pick(r.report_loss for r in results) for pick in (min, max))
    top = highest + 0.8 * (highest - lowest)
    ends = [r.flops / 1e9 for r in results]
    seen_from = max(ends)
    for side in SIDES:
        mine = [r for r in results if r.side == side]
        flops, losses = [r.flops / 1e9 for r in mine], [r.report_loss for r in mine]
        at, course = _mean_course(mine)
        axis.plot(at, course, color=COLOURS[side], alpha=0.6, linewidth=1.2)
        seen_from = min(seen_from, at[np.argmax(course < top)])
        axis.errorbar(
            mean(flops), mean(losses), xerr=_deviation(flops), yerr=_deviation(losses), label=side, capsize=3, zorder=3,
            marker=MARKERS[side], color=COLOURS[side], markersize=7, markeredgecolor="white", linestyle="none",
        )  # fmt: skip
    axis.set_xlabel("training, GFLOP")
    if max(ends) > 5 * min(ends):
        axis.set_xscale("log")
    axis.set_xlim(0.9 * seen_from, 1.1 * max(ends))
    axis.set_ylim(lowest - 0.12 * (highest - lowest), top)
    axis.grid(alpha=0.25, which="both")


def _mean_course(results: Sequence[Result]) -> tuple[Floats, Floats]:
    """FLOPs in 1e9, and the mean loss over the runs there, as far as all of them came."""
    runs = [np.array([(point.flops / 1e9, point.report_loss) for point in r.points]).T for r in results]
    at = np.geomspace(max(run[0][0] for run in runs), min(run[0][-1] for run in runs), 120)
    # Between two grid points a long run has many boundaries: their mean, not one of them.
    courses = [np.interp(at, flops, _smooth(losses, max(1, len(losses) // 60))) for flops, losses in runs]
    return at, np.mean(courses, axis=0)


def _smooth(losses: Floats, width: int) -> Floats:
    padded = np.pad(losses, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main(arguments: Sequence[str]) -> int:
    """Draw the figures of a JSON file of growth.py."""
    source, target = map(Path, arguments)
    runs = json.loads(source.read_text())["runs"]
    draw([Result(**{**run, "points": [Point(**point) for point in run["points"]]}) for run in runs], target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
