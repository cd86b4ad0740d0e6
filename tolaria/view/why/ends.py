"""Why a run stands still, ended, or began again. Pure rules."""

from tolaria.telemetry.words import counted, duration
from tolaria.view.course import Event, root_cause
from tolaria.view.lookout import View
from tolaria.view.values import mapping, text, whole
from tolaria.view.why.answer import Answer, Urgency, path_of, resume_command, step_of

ADVICE = {
    "TaskError": "Mend the task or its data, then resume:\n{resume}",
    "ConfigError": "Correct the key it names, then start again.",
    "CheckpointError": "See `tolaria verify {path}`; --resume PATH takes an older checkpoint.",
    "CheckpointMismatch": "The checkpoint is of another model: start with the task and settings it was made by.",
    "WalError": "See `tolaria verify {path}`; free the disk or mend it, then resume:\n{resume}",
    "RunDirError": "Free the disk or choose another --run.root, then resume:\n{resume}",
    "RunLocked": "Another process trains here: wait for it, or stop it.",
    "ReplicaMismatch": "The ranks ended with different states: resume from a good checkpoint, and look for a rank "
    "whose hardware errs (`tolaria logs {path} --kind drift_traced`).",
    "TrainingUnstable": "Look at the data of those steps and at the rate, then resume with a lower one:\n{resume}",
    "CrashLoop": "Mend what ends every start at this step (the output of the rank that died), then resume:\n{resume}",
    "RunHalted": "Clear what it was halted for, then resume:\n{resume}",
    "PeerLost": "The rank that is gone says why in its own output, or the kernel in its log (out of memory?). "
    "Resume:\n{resume}",
}


def paused(view: View) -> list[Answer]:
    """It stands still because somebody asked for it."""
    event, now = view.course.paused, view.now
    if now.state != "paused" and not (event is not None and now.state in ("killed", "stopped")):
        return []
    event = event or {}
    who = text(event.get("who")) or ("the policy" if not event.get("order_id") else "an operator")
    why = text(event.get("why")) or text(event.get("reason"))
    since = whole(event.get("wall_ns"))
    facts = [f"for {duration((now.wall_ns - since) / 1e9)}"] if since else []
    facts += ["the policy is not asked meanwhile, and no data is used up"]
    do = f"Go on:\ntolaria send {path_of(view)} resume"
    if now.state != "paused":
        facts, do = (
            ["a start goes on standing still"],
            f"Start it, then let it go on:\n{resume_command(view)}\ntolaria send {path_of(view)} resume",
        )
    return [
        Answer(
            topic="paused",
            what=f"paused by {who}" + (f": {why}" if why else ""),
            urgency=Urgency.WAITING,
            since=step_of(event) or now.step,
            facts=tuple(facts),
            do=do,
        )
    ]


def halted(view: View) -> list[Answer]:
    """An emergency of the highest level froze it, or froze it and ended it."""
    event, now = view.course.last.get("halted"), view.now
    if event is None or now.state != "halted":
        return []
    reason, wait = text(event.get("reason")) or "no reason told", event.get("wait_s")
    path = path_of(view)
    if now.alive:
        left = (
            (whole(event.get("wall_ns")) / 1e9 + float(wait)) - now.wall_ns / 1e9 if isinstance(wait, float) else None
        )
        facts = (
            [f"ends, with the state saved, in {duration(max(0.0, left))} unless it is cleared"]
            if left is not None
            else []
        )
        do = f"Go on as if nothing had been:\npython -m tolaria.emergency {path} clear"
    else:
        facts = [f"it was not cleared within {wait:g} s; the state is saved"] if isinstance(wait, float) else []
        do = f"When the cause is mended:\n{resume_command(view)}"
    return [
        Answer(
            topic="halted",
            what=f"halted by an emergency: {reason}",
            urgency=Urgency.BROKEN,
            since=step_of(event),
            facts=tuple(facts),
            do=do,
        )
    ]


def stopped(view: View) -> list[Answer]:
    """Why nobody trains any more."""
    now = view.now
    if now.alive or now.state == "unknown":
        return []
    teller = {"finished": _finished, "stopped": _asked_to_stop, "killed": _killed, "halted": halted}.get(
        now.state, _failed
    )
    return teller(view)


def _finished(view: View) -> list[Answer]:
    now = view.now
    limit = (
        f"train.max_steps={now.max_steps:,}"
        if now.max_steps and now.step >= now.max_steps
        else (f"all {counted(now.epochs, 'epoch')}" if now.epochs else "the end")
    )
    return [Answer(topic="stopped", what=f"it finished: {limit} done", urgency=Urgency.NOTE, since=now.step, now=False)]


def _asked_to_stop(view: View) -> list[Answer]:
    asked, now = view.course.last.get("stop_requested", {}), view.now
    stop = [asked for asked in view.now.commands if asked.what == "stop" and asked.outcome == "applied"]
    by = (
        f"by {stop[-1].who or 'an operator'}"
        if stop and asked.get("signal") == "order"
        else f"by {text(asked.get('signal'))}"
    )
    why = f": {stop[-1].why}" if stop and stop[-1].why else ""
    facts = (f"a last checkpoint was written at step {now.checkpoints[-1].step:,}",) if now.checkpoints else ()
    return [
        Answer(
            topic="stopped",
            what=f"it was asked to stop {by}{why}",
            urgency=Urgency.NOTE,
            now=False,
            since=step_of(asked) or now.step,
            facts=facts,
            do=f"Go on:\n{resume_command(view)}",
        )
    ]


def _failed(view: View) -> list[Answer]:
    now, failures = view.now, view.course.of_kind("run_failed", this_start=True)
    cause = root_cause(failures)
    if cause is None:
        return [
            Answer(
                topic="stopped",
                what=f"it ended as {now.state}" + (f": {now.reason}" if now.reason else ""),
                urgency=Urgency.BROKEN,
                since=now.step,
                do=f"Resume:\n{resume_command(view)}",
            )
        ]
    error = text(cause.get("error"))
    ranks = sorted({whole(event.get("rank")) for event in failures if event.get("error") == error})
    told = f"told by {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks[:8]))}"
    stuck = view.course.of_kind("rank_stuck", this_start=True)
    facts = [f"rank {whole(event.get('stuck_rank'))} {text(event.get('reason'))}" for event in stuck]
    back = len(view.course.of_kind("went_back", rank=0))
    facts += [f"the run went back {counted(back, 'time')} before"] if error == "TrainingUnstable" and back else []
    advice = ADVICE.get(error, "Resume:\n{resume}").format(path=path_of(view), resume=resume_command(view))
    return [
        Answer(
            topic="stopped",
            what=f"it failed with {error}: {text(cause.get('reason'))}",
            urgency=Urgency.BROKEN,
            since=step_of(cause) or now.step,
            facts=(told, *facts),
            do=advice,
        )
    ]


def _killed(view: View) -> list[Answer]:
    now, course = view.now, view.course
    facts = [f"its last word is {duration((now.wall_ns - now.told_ns) / 1e9)} old, at step {now.step:,}"]
    stuck = course.of_kind("rank_stuck", this_start=True)
    facts += [f"rank {whole(event.get('stuck_rank'))} {text(event.get('reason'))}" for event in stuck]
    memory = ", ".join(f"{name} {mb:,.0f} MB" for name, mb in now.memory_mb.items() if mb)
    facts += [f"its last known memory: {memory}"] if memory else []
    if now.checkpoints:
        facts.append(f"the newest checkpoint is {now.checkpoints[-1].name}")
    what = "it ended without a word: killed, or the machine went down"
    do = f"Look into the kernel's log (out of memory?), then resume:\n{resume_command(view)}"
    return [Answer(topic="stopped", what=what, urgency=Urgency.BROKEN, since=now.step, facts=tuple(facts), do=do)]


def restarted(view: View) -> list[Answer]:
    """Why there was more than one start, and what each lost."""
    starts = view.course.starts
    answers = []
    for place in range(1, len(starts)):
        before, this = whole(starts[place - 1].get("wall_ns")), whole(starts[place].get("wall_ns"))
        until = whole(starts[place + 1].get("wall_ns")) if place + 1 < len(starts) else 1 << 63
        former = [e for e in view.course.remembered if before <= whole(e.get("wall_ns")) < this]
        own = [e for e in view.course.remembered if this <= whole(e.get("wall_ns")) < until]
        answers.append(_restart(view, starts[place], former, own, last=place + 1 == len(starts)))
    return answers


def _restart(view: View, start: Event, former: list[Event], own: list[Event], *, last: bool) -> Answer:
    stuck = [e for e in former if e.get("kind") == "rank_stuck"]
    cause = root_cause([e for e in former if e.get("kind") == "run_failed"])
    ended = [e for e in former if e.get("kind") == "run_ended"]
    if stuck:
        why = f"rank {whole(stuck[-1].get('stuck_rank'))} {text(stuck[-1].get('reason'))}"
    elif ended:
        why = f"the start before had {text(ended[-1].get('outcome'))}"
    elif cause is not None:
        why = f"{text(cause.get('error'))}: {text(cause.get('reason'))}"
    else:
        why = "the start before ended without a word: killed"
    resumed = next((e for e in own if e.get("kind") == "resumed" and "saved_step" in e), None)
    reached = max((step_of(e) for e in former), default=0)
    if resumed is None:
        facts = [f"it began anew, {counted(reached, 'step')} were lost" if reached else "it began anew"]
    else:
        saved = whole(resumed["saved_step"])
        facts = [f"it went on from step {saved:,}, from a {text(resumed.get('source'))}"]
        facts += [f"{counted(reached - saved, 'step')} were done again"] if reached > saved else []
    by = "by torchrun" if start.get("restarted") else "by hand"
    since = whole(mapping(resumed).get("saved_step")) if resumed else 0
    recent = last and view.now.alive and bool(start.get("restarted")) and len(view.course.boundaries) < 3
    return Answer(
        topic="restarted",
        what=f"started again {by}: {why}",
        urgency=Urgency.NOTE,
        since=since,
        now=recent,
        facts=tuple(facts),
        do="" if ended else "The output of the rank that died says more.",
    )
