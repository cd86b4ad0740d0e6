"""The page from facts alone: long runs stay small, values that are none stay away, axes have numbers that are round."""

import math
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from tolaria.report_page import build_page
from tolaria.report_page.axes import Axis, figure, value_axis
from tolaria.report_page.markup import Markup, joined, table, tag
from tolaria.report_page.style import DARK, LIGHT
from tolaria.view.curves import Curve
from tolaria.view.history import Asked, Boundary, History, WentBack

STEPS = 1_000_000


def page_of(history: History, **more: object) -> str:
    facts = {"summary": {}, "status": {}, "config": "", "where": "runs/x", "alive": False, "written_ns": 10**18}
    return build_page(history, **{**facts, **more})  # type: ignore[arg-type]


def test_a_run_of_a_million_steps_has_a_page_of_less_than_two_megabytes() -> None:
    history = History(end_step=STEPS)
    for name in ("train", "lr/host", "lr/seed/a", "alpha/a"):
        curve = history.curves[name] = Curve()
        for step in range(1, STEPS + 1, 2):
            curve.add(step, 1.0 + math.sin(step / 1000) + (50.0 if step == 123_457 else 0.0))
    for number in range(1, 5001):
        step = number * 200
        own = tuple(1.0 + rank / 100 for rank in range(64))
        latency = {"report": 1.0, "guard": 0.5, "boundary": 2.0}
        history.boundaries.append(
            Boundary(step=step, boundary=number, mode="normal", seeds={}, latency_ms=latency, own_ms=own)
        )
        history.add("val", step, 1.0 / number)
        history.add("accuracy", step, 1.0 - 1.0 / number)
    for number in range(2000):
        ident = f"b{number}-0"
        history.commands[ident] = Asked(command_id=ident, step=number * 500, what="host: lr x0.9", outcome="applied")
    page = page_of(history)
    assert 100_000 < len(page.encode()) < 2_000_000
    assert "greatest 50.2 at step 123,457" in page  # the one peak, in the text alternative
    assert "the last 500 of them" in page


def test_a_return_is_a_branch_and_an_arc_never_a_line_backwards() -> None:
    history = History(end_step=40)
    for step, loss in ((10, 1.0), (20, 0.9), (30, 5.0), (20, 0.8), (30, 0.7), (40, 0.6)):
        history.add("val", step, loss)
    history.returns.append(WentBack(step=30, to_step=15, cause="loss_spike", reason="loss 5", source="snapshot"))
    page = page_of(history)
    paths = [part.split('"')[0] for part in page.split('<path d="M')[1:]]
    lines = [[float(pair.split()[0]) for pair in path.split("L")] for path in paths if "L" in path and "l" not in path]
    assert lines and all(a <= b for line in lines for a, b in pairwise(line))
    assert "left by a return" in page and 'class="arc"' in page and 'id="r-0"' in page


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        self.open += [tag] if tag not in ("meta", "link", "br") else []

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "evil", ["<script>x</script>", '" onload="x', "</style><img src=x>", "&lt;b&gt;", "\x1b]0;x\x07"]
)
def test_foreign_text_stays_text_wherever_it_comes_from(evil: str) -> None:
    history = History(end_step=10)
    history.add("val", 10, 1.0)
    history.add(f"lr/{evil}", 10, 1.0)
    history.commands[evil] = Asked(command_id=evil, step=10, what=evil, outcome=evil, why=evil, effect=evil, who=evil)
    history.returns.append(WentBack(step=10, to_step=5, cause=evil, reason=evil, source=evil))
    history.seeds["x"] = {"slot": evil, "blueprint": evil, "stage": evil, "verdict": evil}
    history.boundaries.append(
        Boundary(step=10, boundary=1, mode=evil, seeds={evil: evil}, latency_ms={evil: 1.0}, own_ms=(1.0,))
    )
    page = page_of(history, config=evil, where=evil, summary={"name": evil, "outcome": evil, "versions": {evil: evil}})
    parser = Tags()
    parser.feed(page)
    parser.close()
    assert parser.open == [] and not {"script", "img", "iframe", "object", "b"} & parser.seen
    assert "\x1b" not in page


def test_an_empty_run_has_every_section_with_a_sentence() -> None:
    page = page_of(History())
    assert page.count("<section") == 12 and page.count('class="soft"') >= 10


def test_markup_is_escaped_once_and_numbers_are_short() -> None:
    assert tag("p", "<a> & b", tag("b", "'x'")) == "<p>&lt;a&gt; &amp; b<b>&#x27;x&#x27;</b></p>"
    assert tag("path", d="M1 2", class_="x", x=1.50001, hidden=False) == '<path d="M1 2" class="x" x="1.5"/>'
    assert isinstance(joined(["<", Markup("<b></b>"), None]), Markup)
    assert 'class="num" data-head="b">1,200<' in table(["a", "b"], [["x", "1,200"]], caption="c")


def test_axes_have_round_numbers_and_are_logarithmic_where_it_helps() -> None:
    assert [round(tick, 9) for tick in Axis(0.28, 1.02).ticks(5)] == [0.4, 0.6, 0.8, 1.0]
    assert value_axis([0.001, 10.0]).log and not value_axis([0.5, 1.0]).log and not value_axis([-1.0, 900.0]).log
    assert all(
        2 <= len(Axis(low, low * 10**span, log=True).ticks(5)) <= 6 for low in (0.003, 0.5) for span in (1, 2, 7)
    )
    assert value_axis([math.nan, 3.0, 3.0]).low < 3.0 < value_axis([3.0, 3.0]).high
    assert (figure(0.02), figure(4e-5), figure(1200.0), figure(1.35e6), figure(0.0)) == (
        "0.02", "4e-05", "1,200", "1.35 M", "0",
    )  # fmt: skip


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_a_contrast_of_4_5_and_shapes_of_3(colours: dict[str, str]) -> None:
    ground = colours["ground"]
    for name in ("ink", "soft", "link", "good", "bad", "warn"):
        assert contrast(colours[name], ground) >= 4.5, name
        assert contrast(colours[name], colours["panel"]) >= 4.5, name
    assert contrast(colours["ink"], colours["mark"]) >= 4.5
    for number in range(1, 9):
        assert contrast(colours[f"s{number}"], ground) >= 4.5  # their labels are written in the ground's colour


def contrast(one: str, other: str) -> float:
    """WCAG 2: (lighter + 0.05) / (darker + 0.05) of relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
