"""Why a run went back, skipped steps, gave up on a rank's state. Pure rules."""

from tolaria.telemetry.words import counted, duration
from tolaria.view.course import Event
from tolaria.view.lookout import View
from tolaria.view.values import numbers, text, whole
from tolaria.view.why.answer import Answer, Urgency, is_recent, path_of, setting, step_of

CAUSES = {
    "loss_spike": "the loss jumped",
    "non_finite": "loss or gradient were not finite",
    "collapse": "the validation collapsed",
    "drift": "the ranks' states were no longer equal",
    "command": "a command asked for it",
    "emergency": "an emergency asked for it",
    "undo": "an operator took a command back",
}

LEFT_OUT = (
    "Look at the samples that were left out (`tolaria logs {path} --kind incident --json`); "
    "if it comes again, lower the rate:\ntolaria send {path} lr --scale 0.5"
)

CAUSE_ADVICE = {
    "loss_spike": LEFT_OUT,
    "non_finite": LEFT_OUT,
    "collapse": "If it comes again, lower the rate:\ntolaria send {path} lr --scale 0.5",
    "drift": "A rank that drifts again has failing hardware: take its machine out.",
}


def went_back(view: View) -> list[Answer]:
    """Every return to an earlier state, the newest last."""
    course = view.course
    returns = course.of_kind("went_back", rank=0)
    answers = []
    for event in returns[-5:]:
        incident = _before(event, course.of_kind("incident", rank=0))
        answers.append(_return(view, event, incident, len(_together(view, returns, event))))
    gave_up = course.last.get("gave_up")
    if gave_up is not None and view.now.state == "unstable":
        answers.append(
            Answer(
                topic="went-back",
                what=f"then it gave up: {text(gave_up.get('reason'))}",
                urgency=Urgency.BROKEN,
                since=step_of(gave_up),
                now=False,
            )
        )
    return answers


def _return(view: View, event: Event, incident: Event, together: int) -> Answer:
    cause = text(event.get("cause"))
    from_step, to_step = whole(event.get("from_step")), whole(event.get("to_step"))
    took = sum(numbers(event.get("milliseconds")).values())
    facts = [f"from step {from_step:,} to {to_step:,}, to {text(event.get('source'))}, in {duration(took / 1e3)}"]
    samples = incident.get("samples")
    if isinstance(samples, list) and samples:
        facts.append(f"{counted(len(samples), 'sample')} of the steps to blame are left out from here on")
    if event.get("conservative"):
        facts.append("conservative from there")
    if cause not in ("command", "undo"):
        attempts, steps = setting(view, "recovery", "attempts", 3), setting(view, "recovery", "attempt_steps", 1000)
        facts.append(f"return {together} of {attempts:.0f} that may come within {steps:,.0f} steps before it gives up")
    traced = [e for e in view.course.of_kind("drift_traced") if step_of(e) == from_step]
    if traced and cause == "drift":
        facts.append(f"rank {whole(traced[-1].get('astray'))} is the one that went astray")
    reason = text(event.get("reason")) or CAUSES.get(cause, cause)
    what = f"went back because {CAUSES.get(cause, cause.replace('_', ' '))}: {reason}"
    urgency = Urgency.WORSE if together > 1 else Urgency.NOTE
    return Answer(
        topic="went-back",
        what=what,
        urgency=urgency,
        since=from_step,
        now=view.now.alive and is_recent(view, event),
        facts=tuple(facts),
        do=CAUSE_ADVICE.get(cause, "").format(path=path_of(view)),
    )


def _before(event: Event, incidents: list[Event]) -> Event:
    """The incident that a return answers."""
    told = whole(event.get("wall_ns"))
    return next((e for e in reversed(incidents) if whole(e.get("wall_ns")) <= told), {})


def _together(view: View, returns: list[Event], event: Event) -> list[Event]:
    """The returns up to this one that count with it."""
    reach, at = setting(view, "recovery", "attempt_steps", 1000), whole(event.get("from_step"))
    told = whole(event.get("wall_ns"))
    return [
        e
        for e in returns
        if abs(whole(e.get("from_step")) - at) < reach
        and e.get("cause") not in ("command", "undo")
        and whole(e.get("wall_ns")) <= told
    ]


def skipped_steps(view: View) -> list[Answer]:
    """Steps without an update, because the reduced gradient was not finite."""
    skipped = view.course.of_kind("step_skipped", rank=0, this_start=True)
    answers = []
    if skipped:
        steps = [step_of(event) for event in skipped]
        row = int(setting(view, "recovery", "non_finite_steps", 3))
        shown = ", ".join(f"{step:,}" for step in steps[-5:])
        facts = (
            f"at steps {shown}" + (" and before" if len(steps) > 5 else ""),
            f"{row} in a row would make it go back (recovery.non_finite_steps)",
        )
        what = f"{counted(len(steps), 'step')} made no update: the gradient over all ranks was not finite"
        answers.append(
            Answer(
                topic="skipped-step",
                what=what,
                urgency=Urgency.NOTE,
                since=steps[0],
                facts=facts,
                now=view.now.alive and is_recent(view, skipped[-1]),
                do="One now and then is harmless (float16: the scaler looks for its scale). Many: look at the "
                f"data, or lower the rate:\ntolaria send {path_of(view)} lr --scale 0.5",
            )
        )
    dropped = view.course.since_start["seed_gradient_not_finite"]
    if dropped:
        last = view.course.last["seed_gradient_not_finite"]
        slot = text(last.get("seed"))
        answers.append(
            Answer(
                topic="skipped-step",
                urgency=Urgency.NOTE,
                since=step_of(last),
                now=view.now.alive and is_recent(view, last),
                what=f"gradients of seed {slot} were not finite and were dropped; the host stepped on",
                facts=(f"{counted(dropped, 'time')} since the start, on all ranks together",),
                do=f"If it goes on:\ntolaria send {path_of(view)} seed cull --slot {slot}",
            )
        )
    return answers


def tampered_rate(view: View) -> list[Answer]:
    """Somebody else than the controller has written a learning rate."""
    found = view.course.of_kind("lr_violation", this_start=True)
    if not found:
        return []
    last, opened = found[-1], view.course.last.get("lr_breaker_opened")
    facts = [
        f"{text(last.get('group'))}: found {last.get('found')}, set back to {last.get('expected')}",
        f"{counted(len(found), 'time')} since the start",
    ]
    if opened is not None and whole(opened.get("wall_ns")) >= view.course.started_ns:
        facts.append(f"the breaker opened at step {step_of(opened):,}: conservative from there")
    return [
        Answer(
            topic="rate",
            what="the learning rate was changed from outside, and corrected",
            urgency=Urgency.WORSE,
            since=step_of(found[0]),
            now=view.now.alive and is_recent(view, last),
            facts=tuple(facts),
            do="Take the scheduler or callback out of the task; rates are changed by `tolaria send RUN lr`.",
        )
    ]
