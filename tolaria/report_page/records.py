"""Tables of what happened: returns, commands, checkpoints; and what the run was: configuration, versions. Pure."""

from collections.abc import Mapping

from tolaria.report_page.learning import command_anchor, return_anchor
from tolaria.report_page.markup import Child, Markup, folded, joined, table, tag
from tolaria.telemetry.words import counted, duration
from tolaria.view.history import Asked, History

MAX_COMMANDS = 500
GOOD, BAD = ("success", "applied"), ("refused", "regression", "aborted")


def returns(history: History) -> Markup:
    """What went wrong, and what was done about it."""
    if not history.returns:
        return tag("p", "Nothing went wrong: the run never had to go back.", class_="soft")
    rows: list[list[Child]] = []
    for back in history.returns:
        then = f"went back to {back.source or 'an earlier state'}" if back.to_step is not None else "gave up"
        notes = [counted(back.samples_left_out, "sample") + " left out"] if back.samples_left_out else []
        notes += ["conservative for a while"] if back.conservative else []
        rows.append([
            f"{back.step:,}", back.cause.replace("_", " "), back.reason, then,
            f"{back.to_step:,}" if back.to_step is not None else "", _spent(back.milliseconds), ", ".join(notes),
        ])  # fmt: skip
    heads = ["step", "cause", "what was seen", "what was done", "to step", "took", "also"]
    ids = [return_anchor(position) for position in range(len(rows))]
    return table(heads, rows, caption=counted(len(rows), "return"), ids=ids, class_="long")


def _spent(milliseconds: float) -> str:
    if not milliseconds:
        return ""
    return duration(milliseconds / 1e3) if milliseconds >= 10_000 else f"{milliseconds:.0f} ms"


def commands(history: History) -> Markup:
    """Every command: who asked for what and why, and what came of it."""
    asked = sorted(history.commands.values(), key=lambda each: each.step)
    if not asked:
        return tag("p", "Nobody steered this run.", class_="soft")
    shown = asked[-MAX_COMMANDS:]
    rows: list[list[Child]] = [
        [f"{each.step:,}", each.who or "policy", each.what, each.why, _outcome(each), each.effect] for each in shown
    ]
    caption = counted(len(asked), "command")
    caption += f", the last {len(shown)} of them" if len(shown) < len(asked) else ""
    heads = ["step", "by", "what", "why", "outcome", "effect"]
    return table(heads, rows, caption=caption, ids=[command_anchor(each) for each in shown], class_="long")


def _outcome(command: Asked) -> Markup:
    kind = "good" if command.outcome in GOOD else "bad" if command.outcome in BAD else "warn"
    return tag("span", command.outcome or "applied", class_=f"tag {kind}")


def checkpoints(history: History) -> Markup:
    """What was saved."""
    if not history.checkpoints:
        return tag("p", "No checkpoint was committed.", class_="soft")
    found = sorted(history.checkpoints.items())
    rows = [[f"c{seq}-s{step}", f"{step:,}", "good" if good else "not yet good"] for seq, (step, good) in found]
    say = (
        f"{counted(len(rows), 'checkpoint')}, the newest of step {found[-1][1][0]:,}; older ones may be deleted by now."
    )
    body = table(["name", "step", "state"], rows, caption="Checkpoints that were committed")
    return joined([tag("p", say), folded("Checkpoints as a table", body)])


def configuration(toml: str) -> Markup:
    """config.toml, folded."""
    if not toml:
        return tag("p", "The run has no config.toml.", class_="soft")
    return folded(f"config.toml, {counted(len(toml.splitlines()), 'line')}", tag("pre", tag("code", toml)))


def versions(found: Mapping[str, str], digests: Mapping[str, str]) -> Markup:
    """What computed, and the digest of what came out."""
    rows: list[list[Child]] = [[name, version] for name, version in found.items()]
    parts = [table(["package", "version"], rows, caption="Versions at the newest start")] if rows else []
    if digests:
        alike = len(set(digests.values())) == 1
        word = f"equal on {counted(len(digests), 'rank')}" if alike else "DIFFERENT between ranks"
        parts.append(tag("p", "State at the end, sha256, ", word, ":"))
        parts += [tag("p", tag("code", digest)) for digest in sorted(set(digests.values()))]
    return joined(parts) if parts else tag("p", "Not recorded.", class_="soft")
