"""Loss, accuracy and learning rates over the steps, with every command and incident marked. Pure."""

import math
from collections.abc import Callable, Sequence

from tolaria.report_page.axes import figure, steps_axis, value_axis
from tolaria.report_page.chart import Arc, Flag, LineChart, Series, glyph
from tolaria.report_page.markup import Markup, folded, joined, table, tag
from tolaria.telemetry.words import counted, percent
from tolaria.view.curves import Courses, Curve, Point, courses, thinned
from tolaria.view.history import Asked, History, WentBack

MAX_ROWS = 120
"""Rows of the table behind a picture; of longer curves every part gives its least and its greatest."""

SIGNS = {
    "command": "command of the policy", "operator": "command of a person", "refused": "refused command",
    "incident": "incident, with the way back", "emergency": "emergency", "trouble": "warning", "mode": "change of mode",
    "paused": "paused", "start": "start from a saved state",
}  # fmt: skip


def command_anchor(command: Asked) -> str:
    """The id of a command's row."""
    return f"c-{command.command_id}"


def return_anchor(position: int) -> str:
    """The id of a return's row."""
    return f"r-{position}"


def loss(history: History) -> Markup:
    """Training and validation loss."""
    train, val = _courses(history, "train"), _courses(history, "val")
    name = "training (rank 0's batch)"
    if not train.kept:
        train, name = _courses(history, "epoch_train"), "training (mean between boundaries)"
    series = [
        Series(name=name, number=6, kept=train.kept, left=train.left, faint=True),
        Series(name="validation", number=1, kept=val.kept, left=val.left, dots=True),
    ]
    return _picture(history, series, "Loss", figure)


def accuracy(history: History) -> Markup:
    """Validation accuracy."""
    found = _courses(history, "accuracy")
    series = [Series(name="validation accuracy", number=3, kept=found.kept, left=found.left, dots=True)]
    return _picture(history, series, "Accuracy", percent, may_log=False)


def rates(history: History) -> Markup:
    """The learning rate of every group; without marks, since the commands are in the pictures above."""
    series = []
    groups = [name for name in history.curves if name.startswith("lr/")]
    for position, name in enumerate(groups):
        found = _courses(history, name)
        label = name.removeprefix("lr/")
        series.append(Series(name=label, number=position % 8 + 1, kept=found.kept, left=found.left))
    return _picture(history, series, "Learning rate", figure, marked=False)


def _courses(history: History, name: str) -> Courses:
    return courses(history.curves.get(name, Curve()))


def _picture(
    history: History, series: Sequence[Series], what: str, say: Callable[[float], str], *, may_log: bool = True,
    marked: bool = True,
) -> Markup:  # fmt: skip
    series = [each for each in series if each.kept]
    if not series:
        return tag("p", f"No {what.lower()} was recorded.", class_="soft")
    values = [p.value for each in series for line in (each.kept, *each.left) for p in line]
    y = value_axis(values, may_log=may_log)
    flags, arcs = (flags_of(history), arcs_of(history)) if marked else ([], [])
    label = f"{what} over {counted(history.end_step, 'step')}: " + "; ".join(_in_words(s, say) for s in series)
    chart = LineChart(label=label, x=steps_axis(history.end_step), y=y, unit=say, series=series, flags=flags, arcs=arcs)
    scale = tag("p", "Logarithmic scale.", class_="soft") if y.log else None
    branches = any(each.left for each in series)
    return joined([
        legend(series, {flag.shape for flag in flags}, branches=branches), chart.draw(), scale,
        _table(series, what, say),
    ])  # fmt: skip


def _in_words(series: Series, say: Callable[[float], str]) -> str:
    numbers = [p for p in series.kept if not math.isnan(p.value)]
    if not numbers:
        return f"{series.name}: no number"
    low, high = min(numbers, key=lambda p: p.value), max(numbers, key=lambda p: p.value)
    return (
        f"{series.name} from {say(numbers[0].value)} to {say(numbers[-1].value)}, least {say(low.value)} at step "
        f"{low.step:,}, greatest {say(high.value)} at step {high.step:,}"
    )


def legend(series: Sequence[Series], shapes: set[str], *, branches: bool = False, filled: bool = False) -> Markup:
    """What the lines (``filled``: areas) and signs of a picture are."""
    rows = []
    for each in series:
        style = f"swatch s{each.number}" if filled else f"line s{each.number}" + (" faint" if each.faint else "")
        rows.append(tag("li", _swatch(style), each.name))
    if branches:
        rows.append(tag("li", _swatch("line s6 left"), "left by a return"))
    for shape, meaning in SIGNS.items():
        if shape in shapes:
            sign = tag("svg", glyph(shape, 8, 8), width=16, height=16, aria_hidden="true")
            rows.append(tag("li", sign, meaning))
    return tag("ul", *rows, class_="legend")


def _swatch(style: str) -> Markup:
    form = "M6 0h12v12h-12z" if style.startswith("swatch") else "M1 6h22"
    return tag("svg", tag("path", d=form, class_=style), width=24, height=12, aria_hidden="true")


def _table(series: Sequence[Series], what: str, say: Callable[[float], str]) -> Markup:
    by_step: dict[int, dict[str, float]] = {}
    for each in series:
        last = each.kept[-1].step
        for point in thinned(each.kept, each.kept[0].step, last, MAX_ROWS // 2):
            by_step.setdefault(point.step, {})[each.name] = point.value
    steps = sorted(by_step)[:: max(1, len(by_step) // (2 * MAX_ROWS))]
    names = [each.name for each in series]
    rows = [[f"{s:,}", *(say(by_step[s][n]) if n in by_step[s] else "" for n in names)] for s in steps]
    return folded(f"{what} as a table", table(["step", *names], rows, caption=f"{what}, the course that was kept"))


def flags_of(history: History) -> list[Flag]:
    """Everything that is marked on the pictures."""
    flags = [
        Flag(
            step=each.step, shape=_shape(each), title=_command_title(each), anchor=command_anchor(each),
        )
        for each in history.commands.values()
    ]  # fmt: skip
    for position, back in enumerate(history.returns):
        shape = "operator" if back.cause == "command" else "incident"
        flags.append(Flag(step=back.step, shape=shape, title=_return_title(back), anchor=return_anchor(position)))
    return flags + [Flag(step=mark.step, shape=mark.sort, title=mark.text) for mark in history.marks]


def arcs_of(history: History) -> list[Arc]:
    """The ways back."""
    return [
        Arc(back.step, back.to_step, f"step {back.step:,}: {_return_title(back)}", return_anchor(position))
        for position, back in enumerate(history.returns)
        if back.to_step is not None
    ]


def _shape(command: Asked) -> str:
    if command.outcome == "refused":
        return "refused"
    return "operator" if command.who else "command"


def _command_title(command: Asked) -> str:
    who = f" ({command.who})" if command.who else ""
    why = f", because {command.why}" if command.why else ""
    effect = f"; {command.effect}" if command.effect else ""
    return f"{command.what}{who}, {command.outcome}{why}{effect}"


def _return_title(back: WentBack) -> str:
    to = f"; went back to {back.source or f'step {back.to_step:,}'}" if back.to_step is not None else "; gave up"
    return back.reason + to


def last_number(points: Sequence[Point]) -> float | None:
    """The newest value that is one."""
    return next((p.value for p in reversed(points) if not math.isnan(p.value)), None)
