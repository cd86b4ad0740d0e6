"""Why a run is slow: which rank, its data or its work, what of the time is no training at all. Pure rules."""

from itertools import pairwise
from statistics import median

from tolaria.telemetry.pace import FLOOR_MS, stragglers
from tolaria.telemetry.words import counted, duration
from tolaria.view.course import Boundary
from tolaria.view.lookout import View
from tolaria.view.now import RankPace
from tolaria.view.ranks import Doing
from tolaria.view.sections import milliseconds
from tolaria.view.values import mapping, real, text, whole
from tolaria.view.why.answer import Answer, Urgency, is_recent, path_of, setting, step_of

STANDS_S = 10.0
"""A step that takes longer than this, where steps take less than a tenth of it, stands."""

SLOWER = 1.5
WORKING = "compute"
MUCH = 0.25
LONG_S = 30.0
"""Less is no time that anybody misses: every short run is mostly start."""
WAIT_SHARE = 0.3
PARTS_OF_A_BOUNDARY = {
    "round_trip": "the policy's answer",
    "tamiyo": "the policy's answer",
    "validation": "validation",
    "signal": "measuring what seeds would get",
    "report": "bringing the ranks' numbers together",
    "broadcast": "telling the decision to the ranks",
    "check": "the ranks' vote",
    "apply": "carrying commands out",
    "digest": "comparing the ranks",
    "guard": "comparing the ranks' states",
    "decision": "writing the decision to the log",
    "warm_up": "trying and compiling what changed",
    "telemetry": "telemetry",
}
"""In words; "boundary" is the sum of the parts that are not the user's."""
CATEGORY_ADVICE = {
    "data wait": "More loader processes (data.num_workers), or a faster store.",
    "validation": "A smaller validation set, or fewer boundaries (train.boundary_steps).",
    "checkpoint": "Fewer saves: a larger checkpoint.every.",
    "compile": "It is once for each structure; kept code (compile.cache) spares it at the next start.",
    "sync wait": "Ranks wait for the slowest: `tolaria status {path}` shows each one's own time.",
    "boundary": "Fewer boundaries (train.boundary_steps), or a faster policy.",
    "replayed": "Steps are done again after a return or a restart: `tolaria why {path} went-back`, and `restarted`; "
    "a smaller recovery.snapshot_steps loses fewer.",
    "restart": "`tolaria why {path} restarted` tells what ended the starts before.",
    "paused": "`tolaria why {path} paused` tells by whom.",
}


def standing(view: View) -> list[Answer]:
    """A rank that does not get on at this moment."""
    if view.seen is None or view.now.state != "running" or not view.seen.ranks:
        return []
    usual_s = (view.now.step_ms or 0.0) / 1e3
    answers = []
    for doing in view.seen.ranks:
        stands = doing.phase == "step" and doing.seconds > max(STANDS_S, 10 * usual_s)
        if stands or doing.silent_s > 5:
            answers.append(_stands(view, doing))
    return answers


def _stands(view: View, doing: Doing) -> Answer:
    limit = setting(view, "watchdog", "step_s", 600.0)
    silent = f"no heartbeat for {duration(doing.silent_s)}: stopped, or the interpreter lock is held"
    facts = [silent] if doing.silent_s > 5 else []
    facts.append(f"process {doing.pid}, in {doing.phase} at step {doing.step:,} for {duration(doing.seconds)}")
    facts.append(f"the watchdog ends it after {duration(limit)} (watchdog.step_s)")
    what = f"rank {doing.local_rank} of this machine does not get on"
    return Answer(
        topic="slow",
        what=what,
        urgency=Urgency.BROKEN,
        since=doing.step,
        facts=tuple(facts),
        do=f"Its stacks:\nkill -USR1 {doing.pid}; cat {path_of(view)}/stacks-r*.txt",
    )


def straggler(view: View) -> list[Answer]:
    """Which ranks hold the others up, and whether it is their data or their work."""
    rows = [row for row in view.now.ranks if row.own_ms is not None]
    ratio = setting(view, "log", "straggler_ratio", 3.0)
    slow = stragglers([row.own_ms or 0.0 for row in rows], ratio)
    answers = [_slow_rank(view, rows[place], rows) for place in slow]
    told = view.course.of_kind("straggler", rank=0, this_start=True)
    named = {row.rank for row in (rows[place] for place in slow)}
    former = [event for event in told if whole(event.get("straggler")) not in named]
    if former and not answers:
        last = former[-1]
        own, others = milliseconds(real(last.get("own_ms"))), milliseconds(real(last.get("others_ms")))
        what = f"rank {whole(last.get('straggler'))} took {own} ms a step of its own, the others {others} ms"
        answers.append(
            Answer(
                topic="slow",
                what=what,
                urgency=Urgency.NOTE,
                since=step_of(former[0]),
                now=False,
                facts=(f"told {counted(len(former), 'time')} since the start, last at step {step_of(last):,}",),
            )
        )
    return answers


def _slow_rank(view: View, row: RankPace, rows: list[RankPace]) -> Answer:
    own = row.own_ms or 0.0
    usual = median(other.own_ms or 0.0 for other in rows if other.rank != row.rank)
    facts = [f"every rank waits for it: {milliseconds(own - usual)} ms of every step"]
    data = row.data_ms or 0.0
    if row.data_ms is None:
        do = "Its data or its machine: compare its loader, and other processes on its cores."
    elif data > 0.5 * (own - usual):
        facts.append(f"{milliseconds(data)} ms of it is waiting for data")
        do = "It waits for its data: look at its store; more loader processes (data.num_workers)."
    else:
        facts.append(f"only {milliseconds(data)} ms of it is waiting for data, the rest is its own work")
        do = "Its machine computes slower: other processes on its cores, clocks, heat."
    told = [e for e in view.course.of_kind("straggler", rank=0, this_start=True) if e.get("straggler") == row.rank]
    return Answer(
        topic="slow",
        what=f"rank {row.rank} takes {milliseconds(own)} ms a step of its own, the others {milliseconds(usual)} ms",
        urgency=Urgency.WORSE,
        now=view.now.alive,
        facts=tuple(facts),
        do=do,
        since=step_of(told[0]) if told else view.now.step,
    )


def data_wait(view: View) -> list[Answer]:
    """All ranks wait for their data."""
    rows = [row for row in view.now.ranks if row.data_ms is not None]
    step_ms = view.now.step_ms
    if not rows or not step_ms:
        return []
    waiting = median(row.data_ms or 0.0 for row in rows)
    if waiting < max(WAIT_SHARE * step_ms, 0.2 * FLOOR_MS):
        return []
    facts = (f"{milliseconds(waiting)} ms of a step of {milliseconds(step_ms)} ms, the same on most ranks",)
    return [
        Answer(
            topic="slow",
            what=f"the ranks wait for data {waiting / step_ms:.0%} of a step",
            now=view.now.alive,
            urgency=Urgency.WORSE,
            since=view.now.step,
            facts=facts,
            do=CATEGORY_ADVICE["data wait"],
        )
    ]


def slower_than_before(view: View) -> list[Answer]:
    """The pace of boundaries of this start: slower now than it was, and since what."""
    intervals = _intervals(view)
    if len(intervals) < 8:
        return []
    recent = median(ms for _, ms in intervals[-3:])
    before = median(ms for _, ms in intervals[: -len(intervals) // 3])
    if recent < SLOWER * before or recent - before < 0.2:
        return []
    turn = next((point for point, ms in intervals if ms > SLOWER * before), intervals[-1][0])
    grown = [
        a for a in view.now.commands if a.outcome != "refused" and a.what.startswith(("germinate", "start", "fine"))
    ]
    near = [a for a in grown if a.step <= turn.step]
    facts = [f"{milliseconds(recent)} ms a step, boundary included, {milliseconds(before)} ms before"]
    if near:
        facts.append(f"the last change of structure before it: {near[-1].what} at step {near[-1].step:,}")
    return [
        Answer(
            topic="slow",
            what=f"it takes {recent / before:.1f} times as long for a step as it did",
            urgency=Urgency.NOTE,
            since=turn.step,
            now=view.now.alive,
            facts=tuple(facts),
            do="A seed at work costs its FLOPs; else look for other work on this machine.",
        )
    ]


def _intervals(view: View) -> list[tuple[Boundary, float]]:
    """Boundaries of this start with the milliseconds that a step up to them took."""
    points = [point for point in view.course.boundaries if point.wall_ns >= view.course.started_ns]
    return [
        (point, (point.wall_ns - former.wall_ns) / 1e6 / (point.step - former.step))
        for former, point in pairwise(points)
        if point.step > former.step
    ]


def slow_boundary(view: View) -> list[Answer]:
    """The boundaries take much of the time, and which part of them."""
    intervals = _intervals(view)[-5:]
    if len(intervals) < 2:
        return []
    spent = median(sum(_parts(point).values()) for point, _ in intervals)
    whole_ms = median(ms * (point.step - former.step) for (former, _), (point, ms) in pairwise(intervals))
    if whole_ms <= 0 or spent < MUCH * whole_ms:
        return []
    parts = sorted(_parts(intervals[-1][0]).items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{PARTS_OF_A_BOUNDARY.get(name, name)} {milliseconds(ms)} ms" for name, ms in parts)
    return [
        Answer(
            topic="slow",
            what=f"boundaries take {spent / whole_ms:.0%} of the time",
            urgency=Urgency.NOTE,
            since=intervals[0][0].step,
            now=view.now.alive,
            facts=(f"the last one: {shown}",),
            do=CATEGORY_ADVICE["boundary"],
        )
    ]


def _parts(point: Boundary) -> dict[str, float]:
    return {part: ms for part, ms in point.latency_ms.items() if part != "boundary"}


def lost_time(view: View) -> list[Answer]:
    """What the run's ledger of time says went to something else than training."""
    total = sum(seconds for seconds in view.now.goodput.values() if seconds > 0)
    if total <= 0:
        return []
    lost = {name: s for name, s in view.now.goodput.items() if name != WORKING and s >= MUCH * total and s >= LONG_S}
    return [
        Answer(
            topic="slow",
            what=f"{seconds / total:.0%} of the run's time went to {name.replace('_', ' ')}",
            urgency=Urgency.NOTE,
            now=view.now.alive,
            since=None,
            facts=(f"{duration(seconds)} of {duration(total)}, over all its starts",),
            do=CATEGORY_ADVICE.get(name, "").format(path=path_of(view)),
        )
        for name, seconds in sorted(lost.items(), key=lambda item: -item[1])
    ]


def eager(view: View) -> list[Answer]:
    """It runs without torch.compile although it was to be compiled."""
    events = view.course.of_kind("compile_fallback", this_start=True)
    if not events or mapping(view.config.get("compile")).get("enabled") is False:
        return []
    last = events[-1]
    return [
        Answer(
            topic="slow",
            what=f"it goes on without torch.compile: {text(last.get('reason'))}",
            now=view.now.alive,
            urgency=Urgency.NOTE,
            since=step_of(last),
            do="Mend what it names; compile.structure_limit bounds how many structures stay compiled.",
        )
    ]


def replaced_loader(view: View) -> list[Answer]:
    """Loader processes died or hung."""
    events = view.course.of_kind("loader_restarted", this_start=True)
    if not events:
        return []
    last = events[-1]
    return [
        Answer(
            topic="slow",
            what=f"loader processes were replaced {counted(len(events), 'time')}, last: {text(last.get('reason'))}",
            urgency=Urgency.NOTE,
            since=step_of(events[0]),
            now=view.now.alive and is_recent(view, last),
            facts=(f"rank {whole(last.get('rank'))}, batch {whole(last.get('batch')):,}; no batch was lost",),
            do="Memory of loader processes (the kernel's log), or a longer data.timeout_s.",
        )
    ]
