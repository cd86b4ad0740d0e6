"""A run's present in short lines, for a view with little room; `sections` says the same at length. Pure."""

from tolaria.telemetry.words import large, number, percent, short_duration
from tolaria.view.lookout import View
from tolaria.view.now import Now
from tolaria.view.sections import Line, Section, milliseconds, steering_lines, time_lines

BAR = 36
MAX_RATES = 3


def panels(view: View, *, plain: bool = False) -> list[Section]:
    """All panels that have something to say, those that matter most first."""
    now = view.now
    found = [
        Section("Training", tuple(_training(now))),
        Section("Ranks", tuple(_ranks(view))),
        Section("Steering", tuple(_steering(now))),
        Section("Seeds", tuple(_seeds(now))),
        Section("Commands", tuple(_commands(now))),
        Section("Time", tuple(time_lines(now, plain=plain, width=BAR)[:6])),
        Section("Memory", tuple(_memory(now))),
    ]
    return [section for section in found if section.lines]


def _training(now: Now) -> list[Line]:
    lines: list[Line] = []
    if now.train_loss is not None:
        lines.append(("train", number(now.train_loss), ""))
    if (score := now.validation) is not None:
        noise = f" +-{number(score.noise)}" if score.noise is not None else ""
        lines.append(("val", f"{number(score.loss)}{noise} at {score.step:,}", ""))
        best = f", best {percent(now.best.accuracy)} at {now.best.step:,}" if now.best is not None else ""
        lines.append(("accuracy", percent(score.accuracy) + best, ""))
    speed = [f"{large(now.samples_per_s)} samples/s"] if now.samples_per_s else []
    speed += [f"{milliseconds(now.step_ms)} ms/step"] if now.step_ms else []
    if speed:
        lines.append(("speed", ", ".join(speed), ""))
    rates = list(now.lr.items())[:MAX_RATES]
    return lines + [("lr", f"{rate:.2e}" + (f" {group}" if len(now.lr) > 1 else ""), "") for group, rate in rates]


def _ranks(view: View, most: int = 6) -> list[Line]:
    rows = view.now.ranks
    shown = list(rows) if len(rows) <= most else sorted(rows, key=lambda row: -(row.own_ms or 0.0))[: most - 1]
    doing = {entry.local_rank: entry for entry in view.seen.ranks} if view.seen is not None else {}
    same_machine = view.now.world_size == len(doing)
    lines = []
    for row in shown:
        parts = [f"own {milliseconds(row.own_ms)}"]
        parts += [f"wait {milliseconds(row.wait_ms)}"] if row.wait_ms is not None else []
        parts += [f"data {milliseconds(row.data_ms)}"] if row.data_ms is not None else []
        parts = [" ".join(parts) + " ms"]
        if same_machine and row.rank in doing:
            entry = doing[row.rank]
            if entry.phase != "step" or entry.seconds >= 2:
                parts.append(f"{entry.phase} {short_duration(entry.seconds)}")
        lines.append((f"rank {row.rank}", " ".join(parts), ""))
    if len(rows) > len(shown):
        lines.append(("", f"and {len(rows) - len(shown):,} more, with less of their own", "dim"))
    return lines


def _steering(now: Now) -> list[Line]:
    lines = steering_lines(now)
    if now.checkpoints:
        newest = now.checkpoints[-1]
        good = next((saved for saved in reversed(now.checkpoints) if saved.good), None)
        told = f"newest {newest.name}" + (f", good {good.name}" if good is not None else ", none good yet")
        lines.append(("saved", told, ""))
    return lines


def _seeds(now: Now) -> list[Line]:
    lines: list[Line] = []
    for seed in now.seeds:
        parts = [seed.stage.lower() or "unknown"]
        if seed.alpha is not None and 0 < seed.alpha < 1:
            parts.append(f"{seed.alpha:.2f}")
        if seed.contribution is not None:
            parts.append(f"{seed.contribution:+.3g}")
        parts += [seed.blueprint] if seed.blueprint else []
        lines.append((seed.slot, " ".join(parts), "dim" if seed.stage == "DORMANT" else ""))
    return lines


def _commands(now: Now, most: int = 5) -> list[Line]:
    styles = {"refused": "warn", "regression": "warn", "aborted": "warn", "success": "good"}
    return [
        (f"{asked.step:,}", f"{asked.what or 'command'}: {asked.outcome}", styles.get(asked.outcome, ""))
        for asked in now.commands[-most:][::-1]
    ]


def _memory(now: Now) -> list[Line]:
    return [(name.removesuffix("_mb"), f"{large(mb * 1e6)}B", "") for name, mb in now.memory_mb.items() if mb]
