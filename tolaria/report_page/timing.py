"""Where the time went: of the whole run, of a boundary, of each rank's step. Pure."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from tolaria.report_page.axes import Axis, figure, steps_axis
from tolaria.report_page.chart import LineChart, Series, Size, both, grid, picture, words
from tolaria.report_page.learning import legend
from tolaria.report_page.markup import Markup, folded, joined, table, tag
from tolaria.telemetry.split import OUTSIDE
from tolaria.telemetry.summary import latency_split
from tolaria.telemetry.words import duration, percent
from tolaria.view.curves import Point
from tolaria.view.history import Boundary, History

BUDGET_MS = 18.0
GROUPS: dict[str, tuple[str, ...]] = {
    "state": ("report", "packet", "state"),
    "policy": ("encode", "round_trip", "tamiyo"),
    "decision": ("decision", "broadcast"),
    "commands": ("check", "apply", "digest"),
    "guard": ("guard",),
    "telemetry and rest": ("telemetry", "rest"),
}
"""The parts of a boundary in groups for the picture; those of older versions among them."""
GOODPUT_COLOURS = {
    "compute": 3, "data wait": 2, "sync wait": 8, "compile": 4, "validation": 7, "boundary": 1, "checkpoint": 6,
    "rollback": 5, "replayed": 5, "restart": 5, "paused": 6, "rehearsal": 7, "start-up": 6,
}  # fmt: skip
MANY_RANKS = 6


def boundaries(history: History) -> Markup:
    """The latency of every boundary by part, beside the budget."""
    kept = [b for b in history.kept_boundaries if b.latency_ms]
    if not kept:
        return tag("p", "No boundary was timed.", class_="soft")
    split = latency_split([dict(b.latency_ms) for b in kept])
    whole = split.get("boundary", {"p50": 0.0, "p99": 0.0, "max": 0.0})
    within = "within" if whole["p99"] <= BUDGET_MS else "over"
    said = (
        f"A boundary took {whole['p50']:.1f} ms in the median and {whole['p99']:.1f} ms at the 99th percentile, "
        f"{within} the budget of {BUDGET_MS:.0f} ms (validation, measuring of growth and compiling are outside it)."
    )
    label = f"Milliseconds of each boundary by part. {said}"
    x = steps_axis(history.end_step)
    top = max(BUDGET_MS * 1.25, min(max(_groups(b, "") for b in kept), 4 * whole["p99"]))
    drawn = both(lambda size: _stacks(size, x, Axis(0, top), kept, label))
    colours = [Series(name=name, number=n, kept=()) for n, name in enumerate(GROUPS, 1)]
    rows = [
        [part.replace("_", " "), *(f"{split[part][k]:.2f}" for k in ("p50", "p99", "max")),
         "outside" if part in OUTSIDE else f"{BUDGET_MS:.0f} ms in all" if part == "boundary" else ""]
        for part in sorted(split, key=lambda part: (part in OUTSIDE, part == "boundary", -split[part]["p50"]))
    ]  # fmt: skip
    heads = ["part", "p50 ms", "p99 ms", "max ms", "budget"]
    behind = table(heads, rows, caption=f"Latency of {len(kept)} boundaries by part, rank 0")
    return joined([tag("p", said), legend(colours, set(), filled=True), drawn, behind])


def _groups(boundary: Boundary, name: str) -> float:
    """Milliseconds of one group, of all of them for ""."""
    parts = GROUPS[name] if name else [part for group in GROUPS.values() for part in group]
    return max(0.0, sum(boundary.latency_ms.get(part, 0.0) for part in parts))


def _stacks(size: Size, x: Axis, y: Axis, kept: Sequence[Boundary], label: str) -> Markup:
    most = size.plot_width // 4
    # Of a long run the slowest boundary of each stretch: an average would hide those that matter.
    stretch = -(-len(kept) // most)
    shown = [max(kept[i : i + stretch], key=lambda b: _groups(b, "")) for i in range(0, len(kept), stretch)]
    width = max(1.5, min(18.0, size.plot_width / max(1, len(shown)) * 0.75))
    parts = [grid(size, x, y, lambda ms: f"{ms:.0f} ms")]
    for boundary in shown:
        at, low = size.x(x, boundary.step) - width, 0.0
        bars = [tag("title", _told(boundary))]
        for number, name in enumerate(GROUPS, 1):
            high = low + _groups(boundary, name)
            bottom, top = size.y(y, min(low, y.high)), size.y(y, min(high, y.high))
            if bottom - top > 0.05:
                bars.append(tag("rect", x=at, y=top, width=width, height=bottom - top, class_=f"swatch s{number}"))
            low = high
        parts.append(tag("g", *bars))
    line = size.y(y, BUDGET_MS)
    parts.append(tag("line", x1=size.left, x2=size.width - size.right, y1=line, y2=line, class_="budget"))
    parts.append(words(size.left + 6, line - 6, f"budget {BUDGET_MS:.0f} ms", "start", "halo"))
    return picture(size, label, parts)


def _told(boundary: Boundary) -> str:
    parts = ", ".join(f"{name} {_groups(boundary, name):.2f}" for name in GROUPS)
    return f"boundary {boundary.boundary}, step {boundary.step:,}: {_groups(boundary, ''):.2f} ms ({parts})"


def goodput(seconds: Mapping[str, float]) -> Markup:
    """What the wall time was spent on, as one bar."""
    spent = {name: s for name, s in sorted(seconds.items(), key=lambda pair: -pair[1]) if s > 0}
    whole = sum(spent.values())
    if not whole:
        return tag("p", "This run kept no account of its time.", class_="soft")
    useful = spent.get("compute", 0.0) / whole
    said = f"{percent(useful)} of {duration(whole)} went into compute, the part that trains."
    label = "Wall time by what it was spent on: " + ", ".join(f"{n} {percent(s / whole)}" for n, s in spent.items())
    rows = [[name, f"{s:,.2f}", percent(s / whole)] for name, s in spent.items()]
    behind = table(["spent on", "seconds", "share"], rows, caption="Wall time of rank 0 over all starts")
    return joined([tag("p", said), both(lambda size: _one_bar(size, spent, whole, label)), behind])


def _one_bar(size: Size, spent: Mapping[str, float], whole: float, label: str) -> Markup:
    size = Size(size.name, size.width, 64, 0, 0, 0, 0)
    parts, at = [], 0.0
    for name, seconds in spent.items():
        width = seconds / whole * size.width
        inner = [
            tag("title", f"{name}: {duration(seconds)}, {percent(seconds / whole)}"),
            tag("rect", x=at, y=4, width=width, height=36, class_="bar", rx=3),
        ]
        if width > 7.2 * len(name) + 8:
            inner.append(words(at + 7, 27, name, "start", "on-bar"))
        if width > 46:
            inner.append(words(at + 2, 57, percent(seconds / whole), "start"))
        parts.append(tag("g", *inner, class_=f"s{GOODPUT_COLOURS.get(name, 6)}"))
        at += width
    return picture(size, label, parts)


def ranks(history: History) -> Markup:
    """Each rank's own time in a step, over the boundaries; of many ranks least, median and slowest."""
    kept = [b for b in history.kept_boundaries if b.own_ms]
    if not kept:
        return tag("p", "No rank told its own time.", class_="soft")
    count = max(len(b.own_ms) for b in kept)
    spread: dict[str, Callable[[Sequence[float]], float]] = {"slowest": max, "median": median, "fastest": min}
    if count > MANY_RANKS:
        series = [
            Series(name=name, number=number, kept=[Point(b.step, float(of(b.own_ms))) for b in kept])
            for number, (name, of) in enumerate(spread.items(), 1)
        ]
    else:
        series = [
            Series(
                name=f"rank {rank}", number=rank % 8 + 1,
                kept=[Point(b.step, b.own_ms[rank]) for b in kept if rank < len(b.own_ms)],
            )
            for rank in range(count)
        ]  # fmt: skip
    high = max(p.value for each in series for p in each.kept)
    means = [_mean([b.own_ms[rank] for b in kept if rank < len(b.own_ms)]) for rank in range(count)]
    slowest = max(range(count), key=means.__getitem__)
    said = (
        f"Rank {slowest} was the slowest with {means[slowest]:.2f} ms a step of its own; the least was "
        f"{min(means):.2f}."
    )
    chart = LineChart(
        label=f"Milliseconds that each of {count} ranks took for its own part of a step. {said}",
        x=steps_axis(history.end_step), y=Axis(0, high * 1.1 or 1.0), unit=lambda ms: f"{figure(ms)} ms", series=series,
    )  # fmt: skip
    order = sorted(range(count), key=lambda rank: -means[rank])[:40]
    rows = [[f"rank {rank}", f"{means[rank]:.3f}", f"{max(b.own_ms[rank] for b in kept if rank < len(b.own_ms)):.3f}"]
            for rank in order]  # fmt: skip
    behind = folded(
        "Ranks as a table", table(["rank", "mean ms", "max ms"], rows, caption="Own time in a step, by rank")
    )
    return joined([tag("p", said if count > 1 else ""), legend(series, set()), chart.draw(), behind])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
