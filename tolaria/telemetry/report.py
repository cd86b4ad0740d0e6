"""The end of a run in words: (label, text) lines that the terminal lays out. Pure."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from tolaria.telemetry.summary import CommandRecord, IncidentRecord, RunSummary, SeedRecord
from tolaria.telemetry.words import counted, duration, large, number, percent

OUTCOMES = {
    "finished": "Finished",
    "stopped": "Stopped as asked",
    "unstable": "Gave up",
    "halted": "Halted by an emergency",
}

FEW = 4
"""So many ranks are shown one by one, and so many parts of the time of a boundary."""

WAITED = 0.2
"""A rank that takes so much longer than the others is named."""


def headline(summary: RunSummary) -> str:
    """One sentence: how the run ended, after what, on what."""
    word = OUTCOMES.get(summary.outcome, summary.outcome)
    done = f"{counted(summary.epochs, 'epoch')}, {counted(summary.steps, 'step')}"
    ranks = counted(summary.world_size, f"{summary.device} rank")
    return f"{word} after {duration(summary.seconds)}: {done} on {ranks}"


def result_lines(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """Accuracy, loss and parameters, before and after growth where there was any."""
    before, after = summary.before_growth, summary.final
    if after is not None and before is not None:
        points = 100 * (after.accuracy - before.accuracy)
        yield (
            "accuracy",
            (f"{percent(before.accuracy)} before growth, {percent(after.accuracy)} at the end ({points:+.1f} points)"),
        )
        yield "val loss", f"{number(before.loss)} before growth (step {before.step:,}), {number(after.loss)} at the end"
    elif after is not None:
        yield "accuracy", f"{percent(after.accuracy)} (the model did not grow)"
        yield "val loss", number(after.loss)
    if after is not None:
        for name, value in after.metrics.items():
            yield name, f"{value:.4g}"
    if (best := summary.best) is not None:
        yield "best", f"{percent(best.accuracy)}, val loss {number(best.loss)}, at step {best.step:,}"
    grown = summary.parameters_end - summary.parameters_start
    text = f"{summary.parameters_end:,}"
    yield "parameters", text + (f" ({summary.parameters_start:,} at the start, {grown:+,} grown)" if grown else "")


def seed_lines(seed: SeedRecord) -> Iterator[tuple[str, str]]:
    """One seed, labelled with its slot: what grew there and how far it came, what it gained, what it cost."""
    if not seed.blueprint:
        yield seed.slot, f"{seed.stage.lower()}, nothing grew here"
        return
    stage = seed.stage.lower() + (f" in {seed.ended_in.lower()}" if seed.ended_in else "")
    alpha = f", alpha {seed.alpha:.2f}" if 0 < seed.alpha < 1 else ""
    yield seed.slot, f"{seed.blueprint}, {stage}{alpha}, {counted(seed.parameters, 'parameter')}"
    gain = seed.verdict
    if seed.contribution is not None:
        noise = f" +- {seed.contribution_noise:.4f}" if seed.contribution_noise is not None else ""
        gain += f": {seed.contribution:+.4f}{noise} validation loss"
    yield "  gain", gain
    costs = []
    if seed.flops is not None:
        costs.append(f"{large(seed.flops)} FLOPs a sample, {large(seed.train_flops)} spent")
    if seed.forward_ms:
        costs.append("forward {1:.3g} -> {0:.3g} ms".format(*seed.forward_ms))
    if costs:
        yield "  cost", "; ".join(costs)


def command_lines(command: CommandRecord) -> Iterator[tuple[str, str]]:
    """One command, labelled with its step: what it asked, why, and what came of it."""
    outcome = f" ({command.outcome})" if command.outcome else ""
    yield f"step {command.step}", command.what + outcome
    if command.reason:
        yield "  why", command.reason
    if command.effect:
        yield "  effect", command.effect


def incident_lines(incident: IncidentRecord) -> Iterator[tuple[str, str]]:
    """One time that the run went wrong, labelled with its step: what was seen, and what was done about it."""
    yield f"step {incident.step}", incident.reason
    if incident.to_step is None:
        yield "  then", "gave up: the run ended here"
        return
    done = [f"went back to {incident.source}"]
    if incident.milliseconds:
        slow = incident.milliseconds >= 10_000
        done[0] += f" in {duration(incident.milliseconds / 1e3)}" if slow else f" in {incident.milliseconds:.0f} ms"
    if incident.samples_left_out:
        done.append(f"left {counted(incident.samples_left_out, 'sample')} out")
    if incident.conservative:
        done.append("was conservative for a while")
    yield "  then", ", ".join(done)


def time_lines(goodput: Mapping[str, float], *, least: float = 0.001) -> Iterator[tuple[str, str]]:
    """Seconds by category, the longest first; what is less than ``least`` of all is summed up at the end."""
    whole = sum(goodput.values())
    small = 0.0
    for category, seconds in sorted(goodput.items(), key=lambda pair: -pair[1]):
        if seconds >= least * whole and seconds >= 0.05:
            yield category, f"{seconds / whole:6.1%}  {duration(seconds)}"
        else:
            small += seconds
    if small >= 0.05:
        yield "the rest", f"{small / whole:6.1%}  {duration(small)}"


def share_line(goodput: Mapping[str, float], before: Mapping[str, float]) -> str:
    """What the time between two readings was mostly spent on, the longest first, in one line."""
    spent = {category: seconds - before.get(category, 0.0) for category, seconds in goodput.items()}
    whole = sum(spent.values())
    shares = sorted(((s / whole, c) for c, s in spent.items() if s > 0.01 * whole), reverse=True) if whole > 0 else []
    return ", ".join(f"{category} {share:.0%}" for share, category in shares[:FEW])


def balance_line(own_ms: Sequence[float], data_ms: Sequence[float], wait_ms: Sequence[float]) -> str:
    """What a step takes the ranks: by rank where they are few, else the least and the most, with whose it is."""
    parts = []
    for name, times in (("own", own_ms), ("data", data_ms), ("waiting", wait_ms)):
        if len(times) <= FEW:
            parts.append(f"{name} {' / '.join(f'{ms:.1f}' for ms in times)}")
        else:
            most = max(range(len(times)), key=times.__getitem__)
            parts.append(f"{name} {min(times):.1f} to {times[most]:.1f} (rank {most})")
    return f"{', '.join(parts)} ms a step"


def waiting_line(rank_times: Sequence[Mapping[str, float]]) -> str:
    """For whom the ranks wait, and whether it is for its data; "" where nobody waits long for anybody."""
    if len(rank_times) < 2:
        return ""
    own = [times["compute"] + times["data wait"] for times in rank_times]
    last = max(range(len(own)), key=own.__getitem__)
    usual = statistics.median(other for rank, other in enumerate(own) if rank != last)
    ahead = own[last] - usual
    if ahead < 1.0 or ahead < WAITED * own[last]:
        return ""
    data = statistics.median(times["data wait"] for rank, times in enumerate(rank_times) if rank != last)
    reason = "for its data" if rank_times[last]["data wait"] - data > ahead / 2 else "for its computing"
    return f"the others waited {duration(ahead)} for rank {last}, {reason}"


def sections(summary: RunSummary) -> list[tuple[str, list[tuple[str, str]]]]:
    """What follows the results, by title: time, seeds, commands, incidents; those without lines are empty."""
    waiting = waiting_line(summary.rank_times)
    return [
        ("Time", [*time_lines(summary.goodput), *([("ranks", waiting)] if waiting else [])]),
        ("Seeds", [line for seed in summary.seeds for line in seed_lines(seed)]),
        ("Commands", [line for command in summary.commands for line in command_lines(command)]),
        ("Incidents", [line for incident in summary.incidents for line in incident_lines(incident)]),
    ]


def digest_line(digests: Mapping[int, str]) -> str:
    """Whether all ranks ended with the same state."""
    found = Counter(digests.values())
    if len(found) == 1:
        where = "1 rank" if len(digests) == 1 else f"equal on {len(digests)} ranks"
        return f"sha256 {next(iter(found))[:16]}, {where}"
    return "DIFFERS: " + ", ".join(f"rank {rank} {digest[:12]}" for rank, digest in sorted(digests.items()))
