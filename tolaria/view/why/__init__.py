"""Why a run is as it is: rules over what its files say, by topic, each an answer with numbers and what to do.

ends      stopped, paused, halted, restarted        returns   went back, skipped steps, a rate changed from outside
steering  conservative, no answer, refused          saving    no checkpoint, what could not be told
pace      slow                                      seeds     not growing
"""

from collections.abc import Mapping

from tolaria.view.lookout import View
from tolaria.view.why import ends, pace, returns, saving, seeds, steering
from tolaria.view.why.answer import STYLE_OF, Answer, Rule, Urgency

__all__ = ["Answer", "Urgency", "STYLE_OF", "TOPICS", "NOTHING", "explain", "unusual", "before"]

TOPICS: Mapping[str, tuple[Rule, ...]] = {
    "conservative": (steering.conservative,),
    "emergency": (steering.emergency, ends.halted),
    "halted": (ends.halted,),
    "no-answer": (steering.no_answer,),
    "no-checkpoint": (saving.no_checkpoint,),
    "not-growing": (seeds.unmeasured, seeds.not_growing),
    "paused": (ends.paused,),
    "rate": (returns.tampered_rate,),
    "refused": (steering.refused,),
    "restarted": (ends.restarted,),
    "skipped-step": (returns.skipped_steps,),
    "slow": (
        pace.standing,
        pace.straggler,
        pace.data_wait,
        pace.slower_than_before,
        pace.slow_boundary,
        pace.lost_time,
        pace.eager,
        pace.replaced_loader,
    ),
    "stopped": (ends.stopped,),
    "untold": (saving.untold,),
    "went-back": (returns.went_back,),
}

NOTHING: Mapping[str, str] = {
    "conservative": "it is not conservative",
    "emergency": "no emergency is in force",
    "halted": "it is not halted",
    "no-answer": "the policy answers",
    "no-checkpoint": "checkpoints are written as configured",
    "not-growing": "every seed is on its way",
    "paused": "it is not paused",
    "rate": "nobody else has changed a learning rate since the start",
    "refused": "no command was refused",
    "restarted": "it was started once",
    "skipped-step": "no step was skipped since the start",
    "slow": "no rank, no part of a step and no boundary takes more than its usual time",
    "stopped": "it is running",
    "untold": "nothing that it had to tell was lost",
    "went-back": "it never went back",
}


def explain(view: View, topic: str, *, command_id: str = "") -> list[Answer]:
    """The answers to one question, most urgent first; empty where there is nothing to answer. ``topic`` of `TOPICS`."""
    if topic == "refused" and command_id:
        return steering.refused(view, command_id)
    return _sorted([answer for rule in TOPICS[topic] for answer in rule(view)])


def unusual(view: View) -> list[Answer]:
    """All that is out of the ordinary at this moment, and how it ended if it did not end well."""
    found = [answer for rules in dict.fromkeys(TOPICS.values()) for rule in rules for answer in rule(view)]
    ended = not view.now.alive
    wanted = [a for a in dict.fromkeys(found) if a.now or (ended and a.urgency < Urgency.NOTE and a.topic == "stopped")]
    return _sorted(wanted)


def before(view: View) -> list[str]:
    """The topics about which something happened that is over."""
    return [
        topic
        for topic, rules in TOPICS.items()
        if topic not in ("stopped", "not-growing", "no-answer")
        and any(not answer.now for rule in rules for answer in rule(view))
    ]


def _sorted(answers: list[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda answer: (not answer.now, answer.urgency))
