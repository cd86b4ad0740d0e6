"""A run's present in words, by subject: titles with (label, text, style) lines, for whatever shows them. Pure.

Styles are names of what a line is ("", "good", "warn", "bad", "dim"); the words say the same without them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from tolaria.telemetry.words import counted, duration, large, number, percent, short_path
from tolaria.view.course import Asked, Checkpoint
from tolaria.view.lookout import View
from tolaria.view.now import Now, RankPace, Score, SeedNow
from tolaria.view.ranks import Doing
from tolaria.view.standing import GOING

Line: TypeAlias = tuple[str, str, str]

STATE_STYLES = {
    "running": "good",
    "finished": "good",
    "starting": "",
    "stopped": "",
    "unknown": "dim",
    "paused": "warn",
}
"""What is not in here is bad: halted, unstable, failed, killed."""

MAX_REASON = 50
"""Characters of a reason that stands beside the state; a longer one has a line of its own."""

SHARES = "█▓▒░"
PLAIN_SHARES = "#=-."


@dataclass(frozen=True)
class Section:
    """Lines under a title."""

    title: str
    lines: tuple[Line, ...]


def state_style(state: str) -> str:
    """How good a state is."""
    return STATE_STYLES.get(state, "bad")


def milliseconds(value: float | None) -> str:
    """A time in milliseconds, without the unit: 0.438, 12.3, 1,240; "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def headline(now: Now) -> str:
    """Name and state, with what it is doing, or in short why it is in this state."""
    more = now.activity if now.state == "running" else now.reason
    return f"{now.name}  {now.state}" + (f" ({more})" if 0 < len(more) <= MAX_REASON else "")


def all_sections(view: View, *, commands: int = 5, ranks: int = 8, plain: bool = False) -> list[Section]:
    """Everything that is known of the present; sections that have nothing to say are left out."""
    now = view.now
    sections = [
        Section("", tuple(head_lines(now))),
        Section("Training", tuple(training_lines(now))),
        Section("Ranks", tuple(rank_lines(view, ranks))),
        Section("Steering", tuple(steering_lines(now))),
        Section("Seeds", tuple(seed_line(seed) for seed in now.seeds)),
        Section("Commands", tuple(line for asked in now.commands[-commands:] for line in command_lines(asked))),
        Section("Checkpoints", tuple(checkpoint_line(saved) for saved in now.checkpoints[-4:][::-1])),
        Section("Time", tuple(time_lines(now, plain=plain))),
    ]
    return [section for section in sections if section.lines]


def head_lines(now: Now) -> list[Line]:
    """Where it is, on what, how far, since when."""
    ranks = counted(now.world_size, f"{now.device or 'unknown'} rank") if now.world_size else ""
    process = f"process {now.pid} on {now.host}" if now.alive and now.pid and now.host else now.host
    where = ", ".join(part for part in (ranks, process) if part)
    lines = [("run", short_path(now.path), "")]
    if len(now.reason) > MAX_REASON:
        lines.append(("because", now.reason, state_style(now.state)))
    if where:
        lines.append(("where", where, ""))
    lines.append(("progress", progress(now), ""))
    if now.started_ns:
        lines.append(("time", times(now), ""))
    return lines


def progress(now: Now) -> str:
    """Epoch, step, how long still."""
    epoch = f"epoch {now.epoch:,}" + (f" of {now.epochs:,}" if now.epochs else "") if now.epoch else ""
    total = now.max_steps or (now.epochs * now.steps_per_epoch if now.epochs and now.steps_per_epoch else None)
    step = f"step {now.step:,}" + (f" of {total:,}" if total else "")
    left = f"{duration(now.eta_s)} to go" if now.alive and now.eta_s is not None else ""
    return ", ".join(part for part in (epoch, step, left) if part)


def times(now: Now) -> str:
    """When it began, how long it ran, how old its last word is."""
    began = datetime.fromtimestamp(now.started_ns / 1e9).astimezone()
    text = f"started {began:%Y-%m-%d %H:%M:%S}"
    ran = now.seconds if now.seconds is not None else (now.told_ns - now.started_ns) / 1e9
    quiet = duration(max(0.0, (now.wall_ns - now.told_ns) / 1e9))
    if now.alive:
        return f"{text}, {duration((now.wall_ns - now.started_ns) / 1e9)} ago; last word {quiet} ago"
    ended = "last word" if now.state in ("killed", "unknown") else "ended"
    return f"{text}, ran {duration(max(0.0, ran))}, {ended} {quiet} ago"


def training_lines(now: Now) -> list[Line]:
    """Loss, accuracy, learning rates, speed."""
    lines = []
    losses = [f"{number(now.train_loss)} training"] if now.train_loss is not None else []
    if now.validation is not None:
        noise = f" +- {number(now.validation.noise)}" if now.validation.noise is not None else ""
        losses.append(f"{number(now.validation.loss)}{noise} validation (step {now.validation.step:,})")
    if losses:
        lines.append(("loss", ", ".join(losses), ""))
    if now.validation is not None:
        lines.append(("accuracy", percent(now.validation.accuracy) + _best(now.best), ""))
    if now.lr:
        lines.append(("rate", ", ".join(f"{group} {rate:.2e}" for group, rate in now.lr.items()), ""))
    speed = [f"{large(now.samples_per_s)} samples/s"] if now.samples_per_s else []
    speed += [f"{milliseconds(now.step_ms)} ms a step"] if now.step_ms else []
    if speed:
        lines.append(("speed", ", ".join(speed), ""))
    if now.memory_mb:
        told = [f"{large(mb * 1e6)}B {name.removesuffix('_mb')}" for name, mb in now.memory_mb.items() if mb]
        lines.append(("memory", ", ".join(told), ""))
    return lines


def _best(best: Score | None) -> str:
    return f", best {percent(best.accuracy)} at step {best.step:,}" if best is not None else ""


def rank_lines(view: View, most: int) -> list[Line]:
    """Every rank's own time and its waiting; of many ranks those that hold the others up most."""
    now = view.now
    doing = {entry.local_rank: entry for entry in view.seen.ranks} if view.seen is not None else {}
    if now.world_size is not None and len(doing) != now.world_size:
        doing = {}  # a page tells the ranks of one machine, by their number there
    rows = list(now.ranks) or [RankPace(rank=rank, own_ms=None) for rank in sorted(doing)]
    shown = rows if len(rows) <= most else sorted(rows, key=lambda row: -(row.own_ms or 0.0))[: most - 1]
    slowest = max((row.own_ms or 0.0 for row in rows), default=0.0)
    lines = [(f"rank {row.rank}", rank_text(row, doing.get(row.rank)), _slow(row, rows, slowest)) for row in shown]
    if len(shown) < len(rows):
        lines.append(("", f"and {len(rows) - len(shown):,} more ranks with less of their own", "dim"))
    return lines


def _slow(row: RankPace, rows: list[RankPace], slowest: float) -> str:
    own = sorted(other.own_ms or 0.0 for other in rows)
    usual = own[len(own) // 2 - (len(own) % 2 == 0)]
    return "warn" if row.own_ms == slowest and slowest > 3 * usual and slowest - usual > 5 else ""


def rank_text(row: RankPace, doing: Doing | None) -> str:
    """One rank in words."""
    parts = []
    if row.own_ms is not None:
        parts.append(f"{milliseconds(row.own_ms)} ms a step of its own")
    if row.data_ms is not None:
        parts.append(f"{milliseconds(row.data_ms)} of it for data")
    if row.wait_ms is not None:
        parts.append(f"{milliseconds(row.wait_ms)} waiting for others")
    if doing is not None:
        since = f" for {duration(doing.seconds)}" if doing.seconds >= 1 else ""
        parts.append(f"now in {doing.phase}{since}")
        if doing.silent_s >= 2:
            parts.append(f"no heartbeat for {duration(doing.silent_s)}")
    return ", ".join(parts)


def steering_lines(now: Now) -> list[Line]:
    """Policy, mode and emergency."""
    lines: list[Line] = []
    if now.policy:
        breaker = f", breaker {now.policy_breaker.lower()}" if now.policy_breaker else ""
        why = f" ({now.policy_reason})" if now.policy_reason and now.policy_breaker not in ("", "CLOSED") else ""
        lines.append(("policy", now.policy + breaker + why, "warn" if why else ""))
    if now.conservative:
        lines.append(("mode", f"conservative: {now.mode_reason or 'no reason told'}", "warn"))
    elif now.boundary:
        lines.append(("mode", "normal", ""))
    if now.state in GOING and now.emergency_level:
        lines.append(("emergency", f"level {now.emergency_level}: {now.emergency_reason}", "bad"))
    return lines


def seed_line(seed: SeedNow) -> Line:
    """One slot: what grows there, how far, what it brings."""
    if seed.stage in ("", "DORMANT") or not (seed.blueprint or seed.parameters or seed.alpha):
        return seed.slot, seed.stage.lower() or "unknown", "dim" if seed.stage == "DORMANT" else ""
    parts = [part for part in (seed.blueprint, seed.stage.lower()) if part]
    if seed.alpha is not None and 0 < seed.alpha < 1:
        parts.append(f"alpha {seed.alpha:.2f}")
    if seed.parameters:
        parts.append(counted(seed.parameters, "parameter"))
    if seed.contribution is not None:
        noise = f" +- {seed.contribution_noise:.2g}" if seed.contribution_noise is not None else ""
        parts.append(f"contribution {seed.contribution:+.4g}{noise}")
    if seed.breaker not in ("", "CLOSED"):
        parts.append(f"breaker {seed.breaker.lower()}")
    return seed.slot, ", ".join(parts), ""


def command_lines(asked: Asked) -> list[Line]:
    """One command: what, by whom, what came of it; why it was refused."""
    who = f", {asked.who}" if asked.who else ""
    style = {"refused": "warn", "regression": "warn", "aborted": "warn", "success": "good"}.get(asked.outcome, "")
    lines = [(f"step {asked.step:,}", f"{asked.what or 'command'} ({asked.outcome}{who})", style)]
    if asked.outcome == "refused":
        code = f" [{asked.code}]" if asked.code else ""
        lines.append(("", f"{asked.reason or 'no reason told'}{code}", style))
    elif asked.effect:
        lines.append(("", asked.effect, "dim"))
    return lines


def checkpoint_line(saved: Checkpoint) -> Line:
    """One rung of the ladder."""
    return saved.name, f"step {saved.step:,}, " + ("good" if saved.good else "not yet proven good"), ""


def shares(goodput: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(category, share, seconds) of the time, the largest first."""
    total = sum(seconds for seconds in goodput.values() if seconds > 0)
    ordered = sorted(((name, s) for name, s in goodput.items() if s > 0), key=lambda item: -item[1])
    return [(name, seconds / total, seconds) for name, seconds in ordered]


def time_lines(now: Now, *, plain: bool = False, width: int = 48) -> list[Line]:
    """What the run's time went to: a bar, and a line for each part of it."""
    marks = PLAIN_SHARES if plain else SHARES
    bar, lines, at = "", [], 0.0
    for place, (name, share, seconds) in enumerate(shares(now.goodput)):
        mark = marks[min(place, len(marks) - 1)]
        at += share * width
        bar += mark * (round(at) - len(bar))
        lines.append((f"{mark} {share:6.1%}", f"{name.replace('_', ' ')}, {duration(seconds)}", ""))
    return [("", bar, ""), *lines] if lines else []
