"""Why there is no checkpoint, or none that is new or good; what of the run's own telling is lost. Pure rules."""

from tolaria.telemetry.words import counted, duration
from tolaria.view.lookout import View
from tolaria.view.values import real, text, whole
from tolaria.view.why.answer import Answer, Urgency, is_recent, path_of, setting, step_of


def no_checkpoint(view: View) -> list[Answer]:
    """Saves that failed, were left out, or are not wanted."""
    return [*_failed(view), *_skipped(view), *_damaged(view), *_none(view), *_not_good(view)]


def _failed(view: View) -> list[Answer]:
    failed = view.course.of_kind("checkpoint_failed", rank=0, this_start=True)
    if not failed:
        return []
    last, committed = failed[-1], view.course.last.get("checkpoint_committed")
    over = committed is not None and whole(committed.get("wall_ns")) > whole(last.get("wall_ns"))
    newest = view.now.checkpoints[-1] if view.now.checkpoints else None
    facts = (
        f"{counted(len(failed), 'save')} failed since the start",
        f"the newest checkpoint is {newest.name}" if newest else "there is no checkpoint at all",
    )
    if over:
        facts = (*facts[:1], f"saves work again since step {step_of(committed or {}):,}")
    return [
        Answer(
            topic="no-checkpoint",
            what=f"the save of step {whole(last.get('saved_step')):,} failed: {text(last.get('reason'))}",
            urgency=Urgency.NOTE if over else Urgency.WAITING,
            since=step_of(failed[0]),
            now=not over,
            facts=facts,
            do=""
            if over
            else "Make room or mend the disk; the run goes on and saves at its next boundary, or:\n"
            f"tolaria send {path_of(view)} checkpoint",
        )
    ]


def _skipped(view: View) -> list[Answer]:
    skipped = view.course.of_kind("checkpoint_skipped", rank=0, this_start=True)
    if not skipped:
        return []
    done = view.course.since_start["checkpoint_committed"]
    took = real(view.course.last.get("checkpoint_committed", {}).get("seconds"))
    facts = [f"{counted(len(skipped), 'save')} left out, {done:,} committed since the start"]
    facts += [f"the last one took {duration(took)}"] if took is not None else []
    return [
        Answer(
            topic="no-checkpoint",
            what="a checkpoint was due while the one before was still being written",
            urgency=Urgency.NOTE,
            since=step_of(skipped[-1]),
            now=view.now.alive and is_recent(view, skipped[-1]),
            facts=tuple(facts),
            do="A faster disk, or fewer saves: a larger checkpoint.every.",
        )
    ]


def _damaged(view: View) -> list[Answer]:
    damaged = view.course.of_kind("checkpoint_bad", "snapshot_bad")
    if not damaged:
        return []
    last = damaged[-1]
    name = text(last.get("path")).rsplit("/", 1)[-1]
    return [
        Answer(
            topic="no-checkpoint",
            what=f"{name} is damaged: {text(last.get('reason')) or 'it cannot be used'}",
            urgency=Urgency.NOTE,
            since=step_of(last) or None,
            now=False,
            facts=("the run went on from the one before",),
            do=f"See `tolaria verify {path_of(view)}`.",
        )
    ]


def _none(view: View) -> list[Answer]:
    now, every = view.now, int(setting(view, "checkpoint", "every", 1))
    if now.checkpoints or not now.alive:
        return []
    if every == 0:
        what, due = "only the last checkpoint is wanted: checkpoint.every=0", ""
    elif now.boundary < every:
        what = "the first one is not due yet"
        due = f"boundary {now.boundary:,} of {every:,} (checkpoint.every)"
    else:
        return []
    return [
        Answer(
            topic="no-checkpoint",
            what=what,
            urgency=Urgency.NOTE,
            since=now.step,
            now=False,
            facts=(due,) if due else (),
            do=f"Save one now:\ntolaria send {path_of(view)} checkpoint",
        )
    ]


def _not_good(view: View) -> list[Answer]:
    now, after = view.now, int(setting(view, "checkpoint", "good_after", 2))
    if not now.checkpoints or any(saved.good for saved in now.checkpoints):
        return []
    what = f"no checkpoint counts as good yet: it takes {after} healthy boundaries after it (checkpoint.good_after)"
    return [
        Answer(
            topic="no-checkpoint",
            what=what,
            urgency=Urgency.NOTE,
            since=now.checkpoints[-1].step,
            now=False,
            facts=(f"the newest, {now.checkpoints[-1].name}, would be used after a crash all the same",),
        )
    ]


def untold(view: View) -> list[Answer]:
    """What the run could not tell of itself."""
    answers = []
    lost = view.course.of_kind("events_lost", this_start=True)
    if lost:
        count = sum(whole(event.get("count")) for event in lost)
        answers.append(
            Answer(
                topic="untold",
                what=f"{counted(count, 'event')} could not be written to events.jsonl",
                urgency=Urgency.NOTE,
                since=step_of(lost[0]),
                now=view.now.alive and is_recent(view, lost[-1]),
                do="The disk is full or slow; training itself does not wait for it.",
            )
        )
    page = view.course.of_kind("page_unavailable", rank=0, this_start=True)
    if page:
        answers.append(
            Answer(
                topic="untold",
                what=f"the ranks share no page: {text(page[-1].get('reason'))}",
                urgency=Urgency.WORSE,
                now=view.now.alive,
                facts=("the watchdog does not see a stuck rank, and emergencies reach rank 0 only",),
                do="Make room in recovery.snapshot_dir (/dev/shm) before the next start.",
            )
        )
    if view.damage:
        answers.append(
            Answer(
                topic="untold",
                what=view.damage,
                urgency=Urgency.NOTE,
                now=view.now.alive,
                do="What is shown comes from events.jsonl instead.",
            )
        )
    return answers
