"""One frame of `tolaria top`: curves and panels that fill a terminal of any size from 60 x 16. Pure."""

from collections.abc import Sequence
from datetime import datetime

from rich.text import Text

from tolaria.cli.screen import STYLES
from tolaria.telemetry.words import printable
from tolaria.view.drawing import draw, thinned
from tolaria.view.lookout import View
from tolaria.view.now import Now
from tolaria.view.panels import panels
from tolaria.view.sections import Section, headline, progress, state_style
from tolaria.view.selection import Selection
from tolaria.view.telling import clock, style_of, tell
from tolaria.view.why import STYLE_OF, Answer, unusual

MIN_WIDTH, MIN_HEIGHT = 60, 16
GAP = 2
LABEL = 9
MIN_EVENTS = 3


def frame(view: View, width: int, height: int, encoding: str, *, plain: bool = False, keys: str = "") -> list[Text]:
    """Exactly ``height`` lines of at most ``width`` characters. ``keys``: what can be typed, for the last line."""
    width, height = max(width, MIN_WIDTH), max(height, MIN_HEIGHT)
    head = [_title(view.now, width, encoding), _progress(view.now, width, plain=plain)]
    foot = _foot(unusual(view), width, encoding, keys)
    room = height - len(head) - len(foot)
    curves = _curves(view, width, _curve_height(room), plain=plain)
    body = _columns(panels(view, plain=plain), width, room - len(curves), encoding)
    while body and not body[-1].plain.strip():
        body.pop()
    happened = _happened(view, width, room - len(curves) - len(body), encoding)
    return [*head, *curves, *body, *happened, *foot]


def _title(now: Now, width: int, encoding: str) -> Text:
    title = printable(headline(now), encoding)
    clock = f"{datetime.fromtimestamp(now.wall_ns / 1e9).astimezone():%H:%M:%S}"
    line = Text(_fit(title, width - len(clock) - 2, encoding).ljust(width - len(clock)) + clock)
    line.stylize(STYLES["title"], 0, len(now.name))
    line.stylize(STYLES.get(state_style(now.state), ""), len(now.name) + 2, min(len(title), width - len(clock) - 2))
    return line


def _progress(now: Now, width: int, *, plain: bool) -> Text:
    """How far it is, and a bar of it where the end is known."""
    text = progress(now)
    total = now.max_steps or (now.epochs * now.steps_per_epoch if now.epochs and now.steps_per_epoch else 0)
    share = now.step / total if total else (now.epoch / now.epochs if now.epochs else 0.0)
    room = width - len(text) - 2
    if room < 10 or not share:
        return Text(text[:width])
    done = round(min(1.0, share) * room)
    full, rest = ("#", "-") if plain else ("━", "─")
    bar = Text(f"{text}  ")
    bar.append(full * done, STYLES["good"])
    return bar.append(rest * (room - done), STYLES["dim"])


def _curve_height(room: int) -> int:
    return max(5, min(18, room * 2 // 5))


def _curves(view: View, width: int, height: int, *, plain: bool) -> list[Text]:
    """Loss and accuracy, side by side."""
    left = (width - GAP) // 2
    right = width - GAP - left
    losses = [(float(p.step), p.loss) for p in view.steps if p.loss is not None]
    validation = [(float(b.step), b.val_loss) for b in view.course.boundaries if b.val_loss is not None]
    if not losses:
        losses = [(float(b.step), b.train_loss) for b in view.course.boundaries if b.train_loss is not None]
    accuracy = [(float(b.step), b.val_accuracy) for b in view.course.boundaries if b.val_accuracy is not None]
    loss = draw(thinned(losses, left), validation, width=left, height=height, plain=plain,
                label="loss, o validation")  # fmt: skip
    gain = draw(thinned(accuracy, 2 * right), [], width=right, height=height, plain=plain, label="accuracy")
    return [Text(f"{a:<{left}}{' ' * GAP}{b}") for a, b in zip(loss, gain, strict=True)]


def _columns(sections: Sequence[Section], width: int, height: int, encoding: str) -> list[Text]:
    """Panels in columns, each to the one with the most room; what does not fit is cut off."""
    count = 2 if width < 120 else 3
    size = (width - GAP * (count - 1)) // count
    columns: list[list[Text]] = [[] for _ in range(count)]
    for section in sections:
        laid = _panel(section, size, encoding)
        column = min(columns, key=len)
        if len(column) + min(len(laid), 2) <= height:
            column += laid
    lines = []
    for row in range(height):
        line = Text()
        for place, column in enumerate(columns):
            cell = column[row] if row < len(column) else Text()
            if row == height - 1 and len(column) > height:
                cell = Text(printable("…", encoding).replace("?", "~"), STYLES["dim"])
            line.append_text(cell)
            if place < count - 1:
                line.append(" " * (size + GAP - cell.cell_len))
        lines.append(line)
    return lines


def _happened(view: View, width: int, height: int, encoding: str) -> list[Text]:
    """The newest events in what room is left, oldest first."""
    if height < MIN_EVENTS + 1:
        return [Text()] * height
    chosen = Selection(level="info")
    told = [event for event in view.course.remembered if chosen.takes(event, step=0)][-(height - 1) :]
    lines = tuple((clock(event), tell(event), style_of(event)) for event in told)
    rows = _panel(Section("Happened", lines), width, encoding)
    return rows + [Text()] * (height - len(rows))


def _panel(section: Section, width: int, encoding: str) -> list[Text]:
    """A title ruled over the column, then one line for each entry."""
    rule = printable("─", encoding).replace("?", "-")
    rows = [Text(f"{section.title} {rule * max(0, width - len(section.title) - 1)}", STYLES["title"])]
    for name, text, style in section.lines:
        label = _fit(printable(name, encoding), LABEL, encoding)
        head = f"{label:<{LABEL}} " if name else ""
        line = Text(head + _fit(printable(text, encoding), width - len(head), encoding))
        line.stylize(STYLES.get(style, ""), len(head))
        rows.append(line)
    return rows


def _foot(answers: Sequence[Answer], width: int, encoding: str, keys: str) -> list[Text]:
    """What is unusual, the most urgent first, one line each; and the keys."""
    rows = []
    for answer in answers[:2]:
        since = f" (step {answer.since:,})" if answer.since is not None else ""
        style = STYLE_OF[answer.urgency]
        told = printable(f"! {answer.what}{since}", encoding)
        rows.append(Text(_fit(told, width, encoding), STYLES.get(style, "")))
    if not rows:
        rows.append(Text("nothing unusual", STYLES["dim"]))
    more = f"and {len(answers) - 2} more: tolaria why RUN" if len(answers) > 2 else ""
    last = "   ".join(part for part in (keys, more) if part)
    return [*rows, Text(_fit(last, width, encoding), STYLES["dim"])] if last else rows


def _fit(text: str, width: int, encoding: str) -> str:
    if len(text) <= width:
        return text
    return text[: max(0, width - 1)] + printable("…", encoding).replace("?", "~")
