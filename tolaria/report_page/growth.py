"""The life of every seed: its stages as bars over the steps, alpha along the way, and what it brought. Pure."""

import math
from collections.abc import Mapping, Sequence

from tolaria.report_page.axes import Axis, figure, steps_axis
from tolaria.report_page.chart import Size, both, grid, picture, words
from tolaria.report_page.markup import Markup, folded, joined, table, tag
from tolaria.telemetry.words import counted
from tolaria.view.curves import Curve, Point, courses, thinned
from tolaria.view.history import History, Span
from tolaria.view.values import real, text, whole

COLOURS = {
    "GERMINATED": 8, "TRAINING": 2, "BLENDING": 4, "SHADOWING": 6, "PROBATIONARY": 7, "FOSSILIZED": 3, "CULLED": 5,
    "EMBARGOED": 5, "RESETTING": 5,
}  # fmt: skip
ROW_PX, BAR_PX = 78, 26
CHARACTER_PX = 6.6


def lifelines(history: History) -> Markup:
    """The picture, the table behind it, and what each seed gained and cost."""
    lines = {slot: spans for slot, spans in history.lifelines().items() if spans}
    if not lines:
        return tag("p", "Nothing grew in this run.", class_="soft")
    alphas = {slot: courses(history.curves.get(f"alpha/{slot}", Curve())).kept for slot in lines}
    x = steps_axis(history.end_step)
    label = "Stages of the seeds over the steps. " + " ".join(
        f"{slot}: " + ", ".join(f"{s.stage.lower()} from step {s.start:,}" for s in spans) + "."
        for slot, spans in lines.items()
    )
    drawn = both(lambda size: _draw(size, x, lines, alphas, label))
    rows = [
        [slot, span.stage.lower(), f"{span.start:,}", f"{span.end:,}"]
        for slot, spans in lines.items()
        for span in spans
    ]
    behind = folded(
        "Stages as a table", table(["slot", "stage", "from step", "to step"], rows, caption="Stages of the seeds")
    )
    return joined([drawn, behind, _gains(history)])


def _draw(
    size: Size, x: Axis, lines: Mapping[str, Sequence[Span]], alphas: Mapping[str, Sequence[Point]], label: str
) -> Markup:
    height = 8 + ROW_PX * len(lines) + 30
    size = Size(size.name, size.width, height, 8, size.right, 8, 30)
    parts = [grid(size, x, None, figure)]
    for row, (slot, spans) in enumerate(lines.items()):
        top = 8 + ROW_PX * row
        parts.append(words(size.left, top + 13, slot, "start", "strong"))
        parts += [_bar(size, x, span, top + 20) for span in spans]
        parts += _alpha(size, x, alphas[slot], top + 20 + BAR_PX + 2)
    return picture(size, label, parts)


def _bar(size: Size, x: Axis, span: Span, top: float) -> Markup:
    left, right = size.x(x, span.start), size.x(x, span.end)
    name = span.stage.lower()
    title = tag("title", f"{name}, step {span.start:,} to {span.end:,}")
    room = right - left - 6
    # A bar too short for its name gets the beginning of it; the table has it in full.
    shown = name if room >= CHARACTER_PX * len(name) else name[: int(room / CHARACTER_PX)]
    inner = [title, tag("rect", x=left, y=top, width=max(1.0, right - left), height=BAR_PX, class_="bar", rx=3)]
    if shown:
        inner.append(words(left + 4, top + BAR_PX / 2 + 4, shown, "start", "on-bar"))
    return tag("g", *inner, class_=f"s{COLOURS.get(span.stage, 6)}")


def _alpha(size: Size, x: Axis, points: Sequence[Point], top: float) -> list[Markup]:
    if not points:
        return []
    height = 18
    chosen = thinned(points, int(x.low), int(x.high), size.plot_width // 2)
    pairs = [f"{size.x(x, p.step):.1f} {top + height * (1 - p.value):.1f}" for p in chosen if not math.isnan(p.value)]
    if not pairs:
        return []
    title = tag("title", f"alpha from {points[0].value:.2f} to {points[-1].value:.2f}")
    begin = size.x(x, points[0].step)
    return [
        tag("path", title, d="M" + "L".join(pairs if len(pairs) > 1 else pairs * 2), class_="line s4"),
        words(max(begin - 5, size.left + 62), top + height - 2, "alpha 0 to 1", "end"),
    ]


def _gains(history: History) -> Markup:
    rows = []
    for seed in history.seeds.values():
        gain, noise = real(seed.get("contribution")), real(seed.get("contribution_noise"))
        told = "not measured" if gain is None else f"{gain:+.4f}" + (f" ± {noise:.4f}" if noise is not None else "")
        forward = seed.get("forward_ms")
        pair = [real(ms) or 0.0 for ms in forward] if isinstance(forward, list) and len(forward) == 2 else []
        rows.append([
            text(seed.get("slot")), text(seed.get("blueprint")), _stage(seed), _verdict(text(seed.get("verdict"))),
            told, f"{whole(seed.get('parameters')):,}", f"{pair[1]:.3g} → {pair[0]:.3g} ms" if pair else "",
        ])  # fmt: skip
    heads = ["slot", "blueprint", "stage", "verdict", "gain in validation loss", "parameters", "forward pass"]
    caption = f"{counted(len(rows), 'seed')}: the gain is the loss without the seed minus with it, ± its standard error"
    return table(heads, rows, caption=caption, class_="long") if rows else Markup("")


def _stage(seed: Mapping[str, object]) -> str:
    ended = text(seed.get("ended_in")).lower()
    return text(seed.get("stage")).lower() + (f" in {ended}" if ended else "")


def _verdict(verdict: str) -> Markup:
    kind = {"pays": "good", "harmful": "bad"}.get(verdict, "warn")
    return tag("span", verdict or "not measured", class_=f"tag {kind}")
