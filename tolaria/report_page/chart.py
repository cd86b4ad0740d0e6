"""Line pictures over the steps of a run, with what happened to it marked on them. Pure: facts in, SVG out.

Every picture is drawn twice, for a wide and for a narrow page, so that its text has its size on both; the style sheet
shows one of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from tolaria.report_page.axes import Axis, figure
from tolaria.report_page.markup import Markup, joined, tag
from tolaria.view.curves import Point, thinned

MARK_PX = 11
"""Marks closer than this are drawn as one."""


@dataclass(frozen=True)
class Size:
    """Where the plot lies in a picture, in pixels."""

    name: str
    width: int
    height: int
    left: int = 58
    right: int = 16
    top: int = 14
    bottom: int = 30

    @property
    def plot_width(self) -> int:
        """Pixels between the axes."""
        return self.width - self.left - self.right

    def x(self, axis: Axis, value: float) -> float:
        """The pixel of a value along the page."""
        return self.left + axis.at(value) * self.plot_width

    def y(self, axis: Axis, value: float) -> float:
        """The pixel of a value, upwards."""
        return self.height - self.bottom - axis.at(value) * (self.height - self.top - self.bottom)


SIZES = (Size("wide", 1000, 320), Size("narrow", 358, 270, left=46, right=10))


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: ``number`` is its colour's; ``left``: what returns left, drawn as branches; ``dots``: each point."""

    name: str
    number: int
    kept: Sequence[Point]
    left: Sequence[Sequence[Point]] = ()
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Something to mark at a step: a shape, what it was, and the row on the page that tells more."""

    step: int
    shape: str
    title: str
    anchor: str = ""


@dataclass(frozen=True)
class Arc:
    """A return from one step to an earlier one."""

    start: int
    end: int
    title: str
    anchor: str


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """A picture of lines. ``flags`` and ``arcs`` are drawn below the plot and on the first line that has dots."""

    label: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    unit: Callable[[float], str] = figure
    flags: Sequence[Flag] = ()
    arcs: Sequence[Arc] = field(default=())

    def draw(self) -> Markup:
        """The picture, once for each width of page."""
        return both(self._draw)

    def _draw(self, size: Size) -> Markup:
        lane = bool(self.flags or self.arcs)
        size = Size(size.name, size.width, size.height, size.left, size.right, size.top, size.bottom + 34 * lane)
        parts = [grid(size, self.x, self.y, self.unit, lane=lane)]
        parts += [_line(size, self.x, self.y, each) for each in self.series]
        if lane:
            parts += [_arc(size, self.x, arc) for arc in self.arcs]
            parts += _flags(size, self.x, self.y, self.flags, _anchor_line(self.series))
        return picture(size, self.label, parts, interactive=lane)


def both(draw: Callable[[Size], Markup]) -> Markup:
    """A picture for a wide page and for a narrow one."""
    return joined(tag("div", draw(size), class_=size.name) for size in SIZES)


def picture(size: Size, label: str, parts: Sequence[Markup], *, interactive: bool = False) -> Markup:
    """The SVG element. ``label`` is its text alternative."""
    role = "group" if interactive else "img"
    return tag(
        "svg", *parts, viewBox=f"0 0 {size.width} {size.height}", role=role, aria_label=label, class_="picture",
        width=size.width, height=size.height,
    )  # fmt: skip


def words(x: float, y: float, content: str, anchor: str = "middle", class_: str = "") -> Markup:
    """Text in a picture."""
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=class_ or None)


def grid(size: Size, x: Axis, y: Axis | None, unit: Callable[[float], str], *, lane: bool = False) -> Markup:
    """Axes with their numbers, and lines across at those of the upright one."""
    base = size.height - size.bottom
    parts = []
    if y is not None:
        for value in y.ticks(5):
            at = size.y(y, value)
            parts.append(tag("line", x1=size.left, x2=size.width - size.right, y1=at, y2=at, class_="grid"))
            parts.append(words(size.left - 7, at + 4, unit(value), "end"))
    parts.append(tag("line", x1=size.left, x2=size.width - size.right, y1=base, y2=base, class_="axis"))
    ticks = x.ticks(9 if size.plot_width > 600 else 5)
    below = size.height - 10
    for number, value in enumerate(ticks):
        at = size.x(x, value)
        if not lane:
            parts.append(tag("line", x1=at, x2=at, y1=base, y2=base + 4, class_="axis"))
        edge = at > size.width - size.right - 24
        named = f"step {value:,.0f}" if number == 0 else f"{value:,.0f}"
        parts.append(words(at, below, named, "end" if edge else "start" if number == 0 else "middle"))
    return tag("g", *parts, class_="scale")


def _line(size: Size, x: Axis, y: Axis, series: Series) -> Markup:
    buckets = size.plot_width // 2
    first, last = int(x.low), int(x.high)
    style = f"line s{series.number}" + (" faint" if series.faint else "")
    parts = [tag("path", d=_path(size, x, y, thinned(series.kept, first, last, buckets)), class_=style)]
    for branch in series.left:
        title = tag("title", f"{series.name}: left by a return to step {branch[0].step:,}")
        path = _path(size, x, y, thinned(branch, first, last, buckets))
        parts.append(tag("path", title, d=path, class_=f"{style} left"))
    if series.dots and len(series.kept) <= size.plot_width // 5:
        for point in series.kept:
            if not math.isnan(point.value):
                title = tag("title", f"{series.name} {figure(point.value)} at step {point.step:,}")
                parts.append(tag("circle", title, cx=size.x(x, point.step), cy=size.y(y, point.value), r=2.5,
                                 class_=f"dot s{series.number}"))  # fmt: skip
    return tag("g", *parts)


def _path(size: Size, x: Axis, y: Axis, points: Sequence[Point]) -> str:
    found = []
    for gap, run in groupby(points, key=lambda p: math.isnan(p.value)):
        if not gap:
            pairs = [f"{size.x(x, p.step):.1f} {size.y(y, p.value):.1f}" for p in run]
            found.append("M" + "L".join(pairs if len(pairs) > 1 else pairs * 2))
    return "".join(found)


def _anchor_line(series: Sequence[Series]) -> Sequence[Point]:
    dotted = [each.kept for each in series if each.dots and each.kept]
    return dotted[0] if dotted else series[0].kept if series else ()


def value_at(points: Sequence[Point], step: int) -> float | None:
    """The line's value at a step, between its points in proportion; None before its first number and after its last."""
    numbers = [p for p in points if not math.isnan(p.value)]
    for before, after in pairwise(numbers):
        if before.step <= step <= after.step:
            share = (step - before.step) / max(1, after.step - before.step)
            return before.value + share * (after.value - before.value)
    return numbers[-1].value if numbers and numbers[-1].step == step else None


def _flags(size: Size, x: Axis, y: Axis, flags: Sequence[Flag], line: Sequence[Point]) -> list[Markup]:
    parts: list[Markup] = []
    base = size.height - size.bottom
    for group in _clustered(size, x, sorted(flags, key=lambda f: f.step)):
        at = sum(size.x(x, flag.step) for flag in group) / len(group)
        top = value_at(line, group[0].step)
        on_line = size.y(y, top) if top is not None else base
        told = [f"step {flag.step:,}: {flag.title}" for flag in group[:8]]
        told += [f"and {len(group) - 8} more"] if len(group) > 8 else []
        worst = max(group, key=lambda flag: _ORDER.index(flag.shape))
        inner = [
            tag("title", "\n".join(told)),
            tag("line", x1=at, x2=at, y1=on_line, y2=base + 10, class_="thread"),
            tag("circle", cx=at, cy=on_line, r=3.2, class_=f"on-line {worst.shape}"),
            glyph(worst.shape, at, base + 15),
            tag("rect", x=at - 8, y=min(on_line, base) - 6, width=16, height=base + 26 - min(on_line, base) + 6,
                class_="target"),
        ]  # fmt: skip
        if len(group) > 1:
            inner.insert(-1, words(at, base + 32, str(len(group)), class_="count"))
        anchor = next((flag.anchor for flag in group if flag.anchor), "")
        label = "; ".join(told)
        if anchor:
            parts.append(tag("a", *inner, href=f"#{anchor}", aria_label=label))
        else:
            parts.append(tag("g", *inner, tabindex="0", role="img", aria_label=label))
    return parts


_ORDER = ("start", "mode", "paused", "command", "operator", "trouble", "refused", "emergency", "incident")


def _clustered(size: Size, x: Axis, flags: Sequence[Flag]) -> list[list[Flag]]:
    found: list[list[Flag]] = []
    for flag in flags:
        if found and size.x(x, flag.step) - size.x(x, found[-1][0].step) < MARK_PX:
            found[-1].append(flag)
        else:
            found.append([flag])
    return found


def glyph(shape: str, x: float, y: float) -> Markup:
    """The sign of a sort of mark, 10 pixels wide; its form says as much as its colour."""
    forms = {
        "command": f"M{x - 5:.1f} {y + 5:.1f}h10l-5-9z",
        "operator": f"M{x:.1f} {y - 6:.1f}l5.5 6l-5.5 6l-5.5-6z",
        "refused": f"M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8",
        "incident": f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
        "emergency": f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10z",
        "trouble": f"M{x - 5:.1f} {y - 4:.1f}h10l-5 9z",
        "mode": f"M{x - 5:.1f} {y - 2:.1f}h10v4h-10z",
        "paused": f"M{x - 4:.1f} {y - 5:.1f}v10m8-10v10",
        "start": f"M{x - 4:.1f} {y - 5:.1f}v10l9-5z",
    }
    return tag("path", d=forms[shape], class_=f"glyph {shape}")


def _arc(size: Size, x: Axis, arc: Arc) -> Markup:
    start, end, base = size.x(x, arc.start), size.x(x, arc.end), size.height - size.bottom + 4
    end = min(end, start - 6)  # a short way back is still seen
    path = f"M{start:.1f} {base}C{start:.1f} {base + 20},{end:.1f} {base + 20},{end:.1f} {base + 1}"
    head = f"M{end - 3.5:.1f} {base + 5}l3.5-5l3.5 5"
    inner = [tag("title", arc.title), tag("path", d=path, class_="arc"), tag("path", d=head, class_="arc")]
    return tag("a", *inner, href=f"#{arc.anchor}", aria_label=arc.title)
