"""Why the model does not grow: for every slot the gate, the move or the want of a command that it waits for. Pure."""

from collections.abc import Callable
from typing import TypeAlias

from tolaria.telemetry.words import counted
from tolaria.view.course import Asked
from tolaria.view.lookout import View
from tolaria.view.now import SeedNow
from tolaria.view.values import mapping, text
from tolaria.view.why.answer import Answer, Urgency, boundaries, path_of, setting
from tolaria.view.why.steering import NO_POLICY

Waiting: TypeAlias = Callable[[View, SeedNow], str]


def not_growing(view: View) -> list[Answer]:
    """One answer for every slot whose seed is not on its way."""
    if not view.now.seeds:
        return [
            Answer(
                topic="not-growing",
                what="the model has no slot to grow in, or has not told of one yet",
                urgency=Urgency.NOTE,
                now=False,
                do="Name slots in the task: Task(slots={...}).",
            )
        ]
    return [answer for seed in view.now.seeds if (answer := _slot(view, seed)) is not None]


def _slot(view: View, seed: SeedNow) -> Answer | None:
    waits = WAITS.get(seed.stage)
    if waits is None:
        return None
    count, since = _in_stage(view, seed)
    refused = _last_refused(view, seed.slot, since)
    facts = [f"{seed.stage.lower()} for {boundaries(count)}"] if count else []
    if refused is not None:
        facts.append(f"step {refused.step:,}: {refused.what} was refused: {refused.reason}")
    if view.now.conservative:
        facts.append(f"conservative mode allows no structural change ({view.now.mode_reason})")
    if view.now.policy == NO_POLICY:
        facts.append("there is no policy that would ask for the next move (tamiyo.policy is none)")
    if seed.breaker not in ("", "CLOSED"):
        facts.append(f"its breaker is {seed.breaker.lower()}")
    do = waits(view, seed)
    return Answer(
        topic="not-growing",
        what=f"{seed.slot}: {_what(seed, refused)}",
        urgency=Urgency.NOTE,
        since=since,
        now=False,
        facts=tuple(facts),
        do=do,
    )


def _what(seed: SeedNow, refused: Asked | None) -> str:
    if refused is not None:
        return f"the next move was refused ({refused.code or 'no code'})"
    return {
        "DORMANT": "nothing was asked to grow here",
        "EMBARGOED": "closed for a while after its seed was culled",
        "RESETTING": "being cleaned after its seed went",
        "TERMINATED": "the run is over",
        "BLENDING": "its seed is blended in" if seed.alpha == 1 else "its seed is being blended in",
    }.get(seed.stage, f"its seed waits in stage {seed.stage.lower()} for the next move")


def _in_stage(view: View, seed: SeedNow) -> tuple[int, int | None]:
    """For how many boundaries the slot has been told in this stage, and the step of the first of them."""
    count, since = 0, None
    for point in reversed(view.course.boundaries):
        if point.seeds.get(seed.slot) != seed.stage:
            break
        count, since = count + 1, point.step
    return count, since


def _last_refused(view: View, slot: str, since: int | None) -> Asked | None:
    """The last command for this slot, if it was refused and the seed has been in its stage since."""
    mine = [asked for asked in view.now.commands if slot in asked.what.split()]
    last = mine[-1] if mine else None
    return last if last is not None and last.outcome == "refused" and last.step >= (since or 0) else None


def _germinate(view: View, seed: SeedNow) -> str:
    return f"Grow something:\ntolaria send {path_of(view)} seed germinate --slot {seed.slot} --blueprint NAME --dry-run"


def _next(operation: str, gate: str) -> Waiting:
    def advice(view: View, seed: SeedNow) -> str:
        return (
            f"The next move needs {gate}; ask for it:\n"
            f"tolaria send {path_of(view)} seed {operation} --slot {seed.slot} --dry-run"
        )

    return advice


def _blending(view: View, seed: SeedNow) -> str:
    steps = setting(view, "kasmina", "blend_steps", 100)
    if seed.alpha is not None and seed.alpha >= 1:
        return _next("stabilize", "gate G2: a validation loss within bounds, and alpha at 1")(view, seed)
    alpha = f"{seed.alpha:.2f}" if seed.alpha is not None else "unknown"
    held = " It is held in conservative mode." if view.now.conservative else ""
    return f"Alpha is {alpha} and reaches 1 after kasmina.blend_steps={steps:g} steps by itself.{held}"


def _wait(text: str) -> Waiting:
    return lambda view, seed: text


def _embargo(view: View, seed: SeedNow) -> str:
    return f"It opens by itself: kasmina.embargo_boundaries={setting(view, 'kasmina', 'embargo_boundaries', 2):g}."


def _impact(view: View, seed: SeedNow) -> str:
    need = setting(view, "kasmina", "min_contribution", 0.0)
    gain = f"{seed.contribution:+.4g}" if seed.contribution is not None else "not measured yet"
    return (
        f"Gate G4 wants a contribution of {need:g} or more (kasmina.min_contribution); it is {gain}. "
        f"Ask for it, or cull it:\ntolaria send {path_of(view)} seed fossilize --slot {seed.slot} --dry-run"
    )


WAITS: dict[str, Waiting] = {
    "DORMANT": _germinate,
    "GERMINATED": _next("train", "gate G1: healthy gradients of the host"),
    "TRAINING": _next("graft", "gate G1: finite, non-zero gradients of the seed"),
    "BLENDING": _blending,
    "SHADOWING": _next("evaluate", "gate G3: its output probed, finite and in scale"),
    "PROBATIONARY": _impact,
    "CULLED": _wait("Its slot opens again by itself."),
    "EMBARGOED": _embargo,
    "RESETTING": _wait("Its slot opens again at the next boundary."),
    "TERMINATED": _wait(""),
}


def unmeasured(view: View) -> list[Answer]:
    """The signal that a policy grows by cannot be measured."""
    last = view.course.last.get("signal_failed")
    failed = view.course.since_start["signal_failed"]
    if last is None or not failed:
        return []
    return [
        Answer(
            topic="not-growing",
            what=f"what seeds would get cannot be measured: {text(last.get('reason'))}",
            urgency=Urgency.WORSE,
            since=int(mapping(last).get("step", 0)),
            now=view.now.alive,
            facts=(
                f"{counted(failed, 'time')} since the start, on all ranks together",
                "a policy that grows by this signal grows nothing",
            ),
            do="Mend what it says of the task, or set kasmina.measure_signal to false.",
        )
    ]
