"""Events in words: one sentence for each, for whoever reads along. Pure.

A kind that is not known here is told by its name and fields, so that nothing is hidden.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TypeAlias

from tolaria.telemetry.words import counted, duration, number, percent
from tolaria.view.course import Event
from tolaria.view.values import items, mapping, numbers, real, text, whole

HIDDEN = frozenset({"kind", "level", "run_id", "rank", "step", "mono_ns", "wall_ns", "trace", "versions", "digest"})
MAX_TEXT = 300

Teller: TypeAlias = Callable[[Event], str]


def tell(event: Event) -> str:
    """What happened, in one sentence."""
    kind = text(event.get("kind")) or "event"
    teller = TELLERS.get(kind)
    told = teller(event) if teller is not None else _plainly(kind, event)
    return f"in a rehearsal: {told}" if "rehearsal" in event else told


def clock(event: Event) -> str:
    """When it happened, in the time of this machine's place."""
    return f"{datetime.fromtimestamp(whole(event.get('wall_ns')) / 1e9).astimezone():%H:%M:%S}"


def style_of(event: Event) -> str:
    """How bad it is, as `sections` names styles."""
    return {"warning": "warn", "error": "bad", "critical": "bad"}.get(text(event.get("level")), "")


def _plainly(kind: str, event: Event) -> str:
    shown = {name: value for name, value in event.items() if name not in HIDDEN and value not in ("", None)}
    fields = ", ".join(f"{name} {_short(value)}" for name, value in shown.items())
    return kind.replace("_", " ") + (f": {fields}" if fields else "")


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_short(entry)}" for name, entry in value.items())[:MAX_TEXT]
    if isinstance(value, (list, tuple)):
        return " ".join(map(_short, value))[:MAX_TEXT]
    return str(value)[:MAX_TEXT]


def _and(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _because(event: Event, key: str = "reason") -> str:
    return f": {text(event.get(key))}" if text(event.get(key)) else ""


def _boundary(event: Event) -> str:
    seeds = mapping(event.get("seeds"))
    acting = [f"{slot} {text(stage).lower()}" for slot, stage in seeds.items() if stage != "DORMANT"]
    conservative = "conservative" if event.get("mode") == "conservative" else ""
    return f"boundary {whole(event.get('boundary')):,}: " + _and(
        f"loss {number(real(event.get('train_loss')))}", f"val {number(real(event.get('val_loss')))}",
        f"accuracy {percent(real(event.get('val_accuracy')))}", conservative, *acting,
    )  # fmt: skip


def _decision(event: Event) -> str:
    count = len(items(event.get("commands")))
    what = counted(count, "command") if count else "no change"
    source = f"{text(event.get('source'))}, {text(event.get('reason'))}"
    return f"boundary {whole(event.get('boundary')):,}: {what} ({source})"


def _started(event: Event) -> str:
    again = "again after a failure" if event.get("restarted") else ""
    ranks = counted(whole(event.get("world_size")), f"{text(event.get('device'))} rank")
    parameters = counted(whole(event.get("parameters")), "parameter")
    return "started " + _and(again, ranks, parameters, text(event.get("optimizer")))


def _resumed(event: Event) -> str:
    if "saved_step" not in event:
        return "goes on again" + _because(event)
    name = text(event.get("path")).rsplit("/", 1)[-1]
    return f"goes on from step {whole(event['saved_step']):,}, from the {text(event.get('source'))} {name}"


def _command(event: Event) -> str:
    done = "applied" if text(event.get("kind")).endswith("applied") else "refused"
    who = text(event.get("who"))
    why = text(event.get("why")) if done == "applied" and who else text(event.get("reason"))
    code = text(event.get("code"))
    shown = f" [{code}]" if done == "refused" and code else ""
    by = f" for {who}" if who else ""
    return f"{done}{by}: {text(event.get('what')) or 'command'}" + (f": {why}" if why else "") + shown


def _incident(event: Event) -> str:
    left_out = len(items(event.get("samples")))
    more = f"; leaves {counted(left_out, 'sample')} out" if left_out else ""
    return f"incident ({text(event.get('cause')).replace('_', ' ')}){_because(event)}{more}"


def _went_back(event: Event) -> str:
    took = sum(numbers(event.get("milliseconds")).values())
    return _and(
        f"went back from step {whole(event.get('from_step')):,} to {whole(event.get('to_step')):,}",
        f"to {text(event.get('source'))}" if event.get("source") else "", f"{took:.0f} ms" if took else "",
        "conservative from here on" if event.get("conservative") else "",
    ) + _because(event)  # fmt: skip


def _committed(event: Event) -> str:
    name = text(event.get("path")).rsplit("/", 1)[-1]
    seconds = real(event.get("seconds"))
    return f"checkpoint {name} committed" + (f" in {duration(seconds)}" if seconds is not None else "")


def _judged(event: Event) -> str:
    judged = f"judged a {text(event.get('outcome')).lower()}{_because(event, 'effect')}"
    return f"command {text(event.get('command_id'))[-12:]} {judged}"


def _seed_judged(event: Event) -> str:
    gain = real(event.get("contribution"))
    told = f": contribution {gain:+.4g}" if gain is not None else ""
    return _and(
        f"seed {text(event.get('slot'))} ({text(event.get('blueprint'))})", text(event.get("stage")).lower(),
        text(event.get("verdict")),
    ) + told  # fmt: skip


def _failed_policy(event: Event) -> str:
    breaker = f"; breaker {text(event.get('breaker')).lower()}" if event.get("breaker") else ""
    return f"the policy did not answer [{text(event.get('code'))}]{_because(event)}{breaker}"


def _straggler(event: Event) -> str:
    own, others = number(real(event.get("own_ms"))), number(real(event.get("others_ms")))
    return f"rank {whole(event.get('straggler'))} takes {own} ms a step of its own, the others {others} ms"


def _stuck(event: Event) -> str:
    stacks = text(event.get("stacks"))
    return f"rank {whole(event.get('stuck_rank'))} is stuck{_because(event)}; ended, stacks: {stacks}"


def _rehearsed(event: Event) -> str:
    steps = counted(whole(event.get("steps")), "step")
    return f"tried {text(event.get('what'))} for {steps} and took it back: {text(event.get('verdict'))}"


def _mode(event: Event) -> str:
    return f"{text(event.get('mode'))} from here on{_because(event)}"


def _violation(event: Event) -> str:
    expected, found = real(event.get("expected")), real(event.get("found"))
    group = text(event.get("group"))
    return f"learning rate of {group} was changed from outside: {found}, expected {expected}; corrected"


def _accepted(event: Event) -> str:
    return "goes on although this differs from what was saved: " + "; ".join(map(str, items(event.get("changed"))))


def _repeated(event: Event) -> str:
    return f"boundary {whole(event.get('boundary')):,} goes as it went before ({text(event.get('reason'))})"


def _moved(event: Event) -> str:
    return f"seed {text(event.get('slot'))}: {text(event.get('before')).lower()} -> {text(event.get('after')).lower()}"


def _shadow(event: Event) -> str:
    would = "; ".join(map(str, event.get("would_command") or ())) or "no change"
    compared = {True: ", as the policy did", False: ", other than the policy"}
    agrees = event.get("agrees")
    told = compared[agrees] if isinstance(agrees, bool) else ""
    return f"boundary {whole(event.get('boundary')):,}: the shadow would have decided {would}{told}"


def _simple(words: str, key: str = "reason") -> Teller:
    return lambda event: words + _because(event, key)


TELLERS: Mapping[str, Teller] = {
    "act_applied": _command,
    "act_refused": _command,
    "boundary": _boundary,
    "changes_accepted": _accepted,
    "checkpoint_bad": lambda e: f"checkpoint {text(e.get('path'))} is damaged{_because(e)}",
    "checkpoint_cleanup_failed": _simple("old checkpoints could not be deleted"),
    "checkpoint_committed": _committed,
    "checkpoint_failed": lambda e: f"checkpoint of step {whole(e.get('saved_step')):,} was not written{_because(e)}",
    "checkpoint_good": lambda e: f"checkpoint c{whole(e.get('seq'))} of step {whole(e.get('saved_step')):,} is good",
    "checkpoint_skipped": _simple("a checkpoint was left out"),
    "command_applied": _command,
    "command_judged": _judged,
    "command_refused": _command,
    "compile_cache_not_kept": _simple("compiled code could not be kept"),
    "compile_cache_refused": _simple("kept compiled code was not used"),
    "compile_fallback": _simple("goes on without torch.compile"),
    "decision": _decision,
    "decision_repeated": _repeated,
    "drift_traced": lambda e: f"rank {whole(e.get('astray'))} went astray{_because(e)}",
    "emergency": lambda e: f"emergency level {whole(e.get('emergency_level'))}{_because(e)}",
    "events_lost": lambda e: f"{counted(whole(e.get('count')), 'event')} could not be written",
    "fast_return_failed": lambda e: f"the fast return failed ({text(e.get('phase'))}){_because(e)}",
    "gave_up": _simple("gave up"),
    "halt_cleared": _simple("the halt was cleared, goes on"),
    "halted": lambda e: f"halted, waits {duration(real(e.get('wait_s')) or 0.0)} for a clear{_because(e)}",
    "incident": _incident,
    "loader_restarted": lambda e: f"a loader process was replaced at batch {whole(e.get('batch'))}{_because(e)}",
    "lr_breaker_opened": _simple("the learning rate's breaker is open"),
    "lr_violation": _violation,
    "mode_changed": _mode,
    "page_unavailable": _simple("no page in shared memory: the watchdog and `emergency` cannot see this rank"),
    "paused": _simple("paused"),
    "policy_failed": _failed_policy,
    "policy_restarted": _simple("the policy was started again"),
    "profile_failed": _simple("the profile could not be made"),
    "profile_written": lambda e: f"profile written to {text(e.get('path'))}",
    "rank_stuck": _stuck,
    "rehearsed": _rehearsed,
    "resumed": _resumed,
    "return_failed": _simple("could not go back"),
    "run_ended": lambda e: f"{text(e.get('outcome'))} after {counted(whole(e.get('steps')), 'step')}",
    "run_failed": lambda e: f"failed with {text(e.get('error'))}{_because(e)}",
    "run_started": _started,
    "seed_gradient_not_finite": lambda e: f"gradient of seed {text(e.get('seed'))} not finite: dropped in this step",
    "seed_judged": _seed_judged,
    "seed_moved": _moved,
    "shadow_answered": _shadow,
    "shadow_silent": _simple("the shadow policy does not answer"),
    "signal_failed": _simple("what seeds would get was not measured"),
    "snapshot_bad": lambda e: f"snapshot {text(e.get('path'))} cannot be used",
    "step_skipped": _simple("step without an update"),
    "stop_requested": lambda e: f"asked to stop by {text(e.get('signal'))}: saves a last checkpoint",
    "straggler": _straggler,
    "went_back": _went_back,
}  # fmt: skip
