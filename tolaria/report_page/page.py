"""The whole page, from head to versions."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tolaria.report_page import growth, learning, records, timing
from tolaria.report_page.markup import Markup, joined, tag
from tolaria.report_page.style import sheet
from tolaria.telemetry.report import OUTCOMES
from tolaria.telemetry.words import counted, duration, number, percent
from tolaria.view.history import History
from tolaria.view.values import mapping, numbers, real, text, whole

# No script at all, nothing loaded, no form, no frame: what stands in a reason stays text.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
ICON = "data:,"
GOOD = ("finished",)
BAD = ("unstable", "failed", "halted")


def build_page(
    history: History, *, summary: Mapping[str, Any], status: Mapping[str, Any], config: str, where: str, alive: bool,
    written_ns: int,
) -> str:  # fmt: skip
    """One HTML document. ``config``: the text of config.toml; ``where``: the run's directory; times in Unix ns."""
    name = text(summary.get("name")) or text(status.get("name")) or where.rstrip("/").rpartition("/")[2]
    outcome = (
        text(summary.get("outcome")) or text(status.get("state")) or ("running" if alive else "ended without a word")
    )
    told = numbers(summary.get("goodput")) or numbers(status.get("goodput"))
    start = history.starts[-1] if history.starts else {}
    versions = {str(k): text(v) for k, v in mapping(summary.get("versions") or start.get("versions")).items()}
    digests = {str(k): text(v) for k, v in mapping(summary.get("state_digest")).items()}
    parts: list[tuple[str, str, Markup]] = [
        ("loss", "Loss", learning.loss(history)),
        ("accuracy", "Accuracy", learning.accuracy(history)),
        ("seeds", "Seeds", growth.lifelines(history)),
        ("commands", "Commands", records.commands(history)),
        ("recoveries", "Recoveries", records.returns(history)),
        ("rates", "Learning rates", learning.rates(history)),
        ("boundaries", "Boundaries", timing.boundaries(history)),
        ("goodput", "Goodput", timing.goodput(told)),
        ("ranks", "Balance of the ranks", timing.ranks(history)),
        ("checkpoints", "Checkpoints", records.checkpoints(history)),
        ("configuration", "Configuration", records.configuration(config)),
        ("versions", "Versions", records.versions(versions, digests)),
    ]
    nav = tag(
        "nav", *(joined([tag("a", title, href=f"#{anchor}")]) for anchor, title, _ in parts), aria_label="Sections"
    )
    body = [
        tag("header", tag("h1", name), _headline(history, summary, status, outcome, where),
            _facts(history, summary, status), nav),
        tag("main", *(tag("section", tag("h2", title), body, id=anchor) for anchor, title, body in parts)),
        tag("footer", f"Written by Tolaria on {_date(written_ns)} from the run's files. The marks on a picture lead to "
            "their rows."),
    ]  # fmt: skip
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name}: {outcome}"), Markup(f'<link rel="icon" href="{ICON}"/>'),
        Markup(f"<style>{sheet()}</style>"),
    )  # fmt: skip
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def _headline(
    history: History, summary: Mapping[str, Any], status: Mapping[str, Any], outcome: str, where: str
) -> Markup:  # fmt: skip
    kind = "good" if outcome in GOOD else "bad" if outcome in BAD else "warn"
    word = OUTCOMES.get(outcome, outcome.capitalize())
    start = history.starts[0] if history.starts else {}
    world = whole(summary.get("world_size")) or whole(status.get("world_size")) or whole(start.get("world_size"), 1)
    device = text(summary.get("device")) or text(start.get("device"))
    done = f"{counted(history.end_step, 'step')} on {counted(world, f'{device} rank'.strip())}"
    spent = real(summary.get("seconds"))
    after = f" after {duration(spent)}" if spent is not None else ""
    when = f"{_date(history.first_ns)} to {_date(history.last_ns)}" if history.first_ns else ""
    return joined([
        tag("p", tag("span", word, class_=f"outcome {kind}"), f"{after}: {done}"),
        tag("p", when, class_="soft") if when else None,
        tag("p", tag("span", where, class_="mono"), class_="soft"),
    ])  # fmt: skip


def _facts(history: History, summary: Mapping[str, Any], status: Mapping[str, Any]) -> Markup:
    """The numbers that matter, each with what it is to be compared with."""
    final = mapping(summary.get("final")) or mapping(status.get("validation"))
    best, before = mapping(summary.get("best")) or mapping(status.get("best")), mapping(summary.get("before_growth"))
    facts: list[tuple[str, str, str]] = []
    if final:
        since = f"{percent(real(before.get('accuracy')))} before growth" if before else ""
        facts.append(("accuracy", percent(real(final.get("accuracy"))), since))
        since = f"{number(real(before.get('loss')))} before growth" if before else ""
        facts.append(("validation loss", number(real(final.get("loss"))), since))
    if best:
        facts.append(("best accuracy", percent(real(best.get("accuracy"))), f"at step {whole(best.get('step')):,}"))
    if end := whole(summary.get("parameters_end")):
        begun = whole(summary.get("parameters_start"))
        facts.append(("parameters", f"{end:,}", f"{begun:,} at the start" if begun != end else ""))
    people = sum(1 for each in history.commands.values() if each.who)
    facts.append(("commands", f"{len(history.commands):,}", f"{people} by a person" if people else ""))
    left_out = sum(back.samples_left_out for back in history.returns)
    facts.append(
        ("returns", f"{len(history.returns):,}", f"{counted(left_out, 'sample')} left out" if left_out else "")
    )
    if len(history.starts) > 1:
        facts.append(("starts", f"{len(history.starts):,}", ""))
    cards = (
        tag("div", tag("dt", name), tag("dd", value, tag("small", note) if note else None))
        for name, value, note in facts
    )
    return tag("dl", *cards, class_="facts")


def _date(wall_ns: int) -> str:
    return datetime.fromtimestamp(wall_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
