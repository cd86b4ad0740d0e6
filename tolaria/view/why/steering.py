"""Why a run is careful, why its policy does not answer, why a command was refused. Pure rules."""

import re

from tolaria.telemetry.words import counted
from tolaria.view.course import Asked
from tolaria.view.lookout import View
from tolaria.view.values import mapping, numbers, text, whole
from tolaria.view.why.answer import Answer, Urgency, boundaries, path_of, setting, step_of

NO_POLICY = "none"

POLICY_ADVICE = {
    "timeout": "Look whether the policy's process works; tamiyo.deadline_ms={deadline:g} is the time it has.",
    "auth": "Give both sides the same key file (tamiyo.key_file), then let it be asked again:\n"
    "tolaria send {path} conservative off",
    "closed": "Start the policy's process again, and see its output ({path}/tamiyo.log where it is embedded).",
}

REFUSAL_ADVICE = {
    "conservative": "Wait for the end of conservative mode (`tolaria why {path} conservative`), or end it:\n"
    "tolaria send {path} conservative off",
    "illegal_transition": "Only the moves it names are legal; `tolaria status {path}` shows every seed's stage.",
    "lr_out_of_bounds": "The bound is a key of the configuration; choose a smaller change.",
    "out_of_bounds": "The bound is a key of the configuration's [tuning]; choose a smaller change.",
    "unknown_seed": "`tolaria status {path}` names the slots.",
    "unknown_group": "`tolaria status {path}` names the groups, with their rates.",
    "unknown_blueprint": "Its name must be one that the run knows (docs/blueprints.md).",
    "already_applied": "An id is used once: send it again as a new command.",
    "paused": "It stands still already; go on with:\ntolaria send {path} resume",
    "not_paused": "Nothing to do: it trains.",
    "nothing_to_undo": "Only an operator's commands can be taken back.",
    "needs_weights": "Take it back with the weights:\ntolaria undo {path} --weights",
}


GATE = re.compile(r"g[0-5]_")
GATE_ADVICE = (
    "The gate opens when what it names holds; `tolaria why {path} not-growing` tells what every slot waits for."
)


def conservative(view: View) -> list[Answer]:
    """No structural change, no larger rate: since when, why, until when."""
    now = view.now
    changes = view.course.of_kind("mode_changed", rank=0)
    if not now.conservative or not now.alive:
        return [] if now.alive or not now.conservative else [_as_it_was(view)]
    entered = [event for event in changes if event.get("mode") == "conservative"]
    back = [event for event in view.course.of_kind("went_back", rank=0) if event.get("conservative")]
    entries = [step_of(event) for event in entered[-1:]] + [whole(event.get("to_step")) for event in back[-1:]]
    since = max(entries, default=None)
    reason = now.mode_reason or "no reason told"
    facts = ["no structural change, no larger learning rate, alpha held, while it lasts"]
    facts += [f"{text(event.get('reason'))} (at step {step_of(event):,})" for event in _policy_failures(view)[-1:]]
    healthy = int(setting(view, "tamiyo", "healthy_boundaries", 2))
    if reason.startswith("command"):
        until = f"Held by a command: it ends by one:\ntolaria send {path_of(view)} conservative off"
    else:
        until = f"It ends by itself after {boundaries(healthy)} in a row with an answer."
        if now.policy == NO_POLICY:
            until += f" Or at once:\ntolaria send {path_of(view)} conservative off"
    return [
        Answer(
            topic="conservative",
            what=f"conservative: {reason}",
            urgency=Urgency.WORSE,
            since=since,
            facts=tuple(facts),
            do=until,
        )
    ]


def _as_it_was(view: View) -> Answer:
    now = view.now
    return Answer(
        topic="conservative",
        what=f"it was conservative at its end: {now.mode_reason or 'no reason told'}",
        urgency=Urgency.NOTE,
        since=None,
        now=False,
    )


def _policy_failures(view: View) -> list[dict[str, object]]:
    return [dict(event) for event in view.course.of_kind("policy_failed", rank=0, this_start=True)]


def no_answer(view: View) -> list[Answer]:
    """The policy is asked and does not answer, or is not asked any more."""
    course, now = view.course, view.now
    failures = _policy_failures(view)
    unanswered = course.unanswered
    if not now.alive or not unanswered:
        return _answered_again(view, failures)
    first, last = unanswered[0], unanswered[-1]
    failure = failures[-1] if failures else {}
    code = text(failure.get("code")) or text(last.get("reason"))
    facts = [text(failure.get("reason"))] if failure else []
    rejected = numbers(failure.get("rejected"))
    if rejected:
        facts.append("of what came, refused: " + ", ".join(f"{count:.0f} x {why}" for why, count in rejected.items()))
    facts.append(f"{boundaries(len(unanswered))} decided without it, from boundary {whole(first.get('boundary')):,} on")
    breaker = now.policy_breaker or text(failure.get("breaker"))
    if breaker == "OPEN":
        rest = int(setting(view, "tamiyo", "breaker_rest", 5))
        facts.append(f"the breaker is open: it is asked again after {rest} boundaries (tamiyo.breaker_rest)")
    deadline = setting(view, "tamiyo", "deadline_ms", 2000)
    advice = POLICY_ADVICE.get(code, POLICY_ADVICE["closed"]).format(path=path_of(view), deadline=deadline)
    return [
        Answer(
            topic="no-answer",
            what=f"the policy ({now.policy or 'unknown'}) does not answer: {code}",
            urgency=Urgency.WORSE,
            since=step_of(first),
            facts=tuple(facts),
            do=advice,
        )
    ]


def _answered_again(view: View, failures: list[dict[str, object]]) -> list[Answer]:
    if view.now.policy == NO_POLICY:
        return [
            Answer(
                topic="no-answer",
                what="there is no policy: tamiyo.policy is none",
                urgency=Urgency.NOTE,
                now=False,
                do="Steer it by hand (`tolaria send`), or start with another tamiyo.policy.",
            )
        ]
    if not failures:
        return []
    last = failures[-1]
    return [
        Answer(
            topic="no-answer",
            urgency=Urgency.NOTE,
            now=False,
            since=step_of(last),
            what=f"the policy failed {counted(len(failures), 'time')} since the start, last: {text(last.get('code'))}",
            facts=(text(last.get("reason")),),
        )
    ]


def refused(view: View, command_id: str = "") -> list[Answer]:
    """Why commands were refused: those of this start, or the one that is named."""
    chosen = [asked for asked in view.now.commands if asked.outcome == "refused"]
    if command_id:
        chosen = [asked for asked in view.now.commands if command_id in (asked.command_id, asked.command_id[-8:])]
    last = chosen[-1:] and chosen[-1].step
    recent = view.course.boundaries[-2:]
    fresh = bool(chosen) and view.now.alive and (not recent or (last or 0) >= recent[0].step)
    return [_refusal(view, asked, now=fresh and asked is chosen[-1]) for asked in chosen[-5:]]


def _refusal(view: View, asked: Asked, *, now: bool) -> Answer:
    who = asked.who or "the policy"
    if asked.outcome != "refused":
        facts = tuple(part for part in (asked.effect, asked.why and f"reason given: {asked.why}") if part)
        what = f"{asked.what} ({asked.command_id}) was not refused: {asked.outcome}"
        return Answer(topic="refused", what=what, urgency=Urgency.NOTE, since=asked.step, now=False, facts=facts)
    facts = (f"asked by {who}, id {asked.command_id}", f"code {asked.code or 'none'}; nothing changed on any rank")
    advice = GATE_ADVICE if GATE.match(asked.code) else REFUSAL_ADVICE.get(asked.code, "")
    advice = advice.format(path=path_of(view))
    return Answer(
        topic="refused",
        what=f"{asked.what or 'command'} was refused: {asked.reason or 'no reason told'}",
        urgency=Urgency.NOTE,
        since=asked.step,
        now=now,
        facts=facts,
        do=advice,
    )


def emergency(view: View) -> list[Answer]:
    """A level is in force at this moment."""
    now = view.now
    if not now.alive or not now.emergency_level or now.state == "halted":
        return []
    event = mapping(view.course.last.get("emergency"))
    return [
        Answer(
            topic="emergency",
            urgency=Urgency.BROKEN,
            since=step_of(event) or None,
            what=f"emergency level {now.emergency_level} is in force: {now.emergency_reason or 'no reason told'}",
            facts=("all ranks answer it together at their next step",),
            do=f"Take it back:\npython -m tolaria.emergency {path_of(view)} clear",
        )
    ]
