"""What an operator ordered holds whatever happens to the run: killed at any point of an act, gone back, started again.

Runs of one process in this one. Orders lie ready for the steps that they are for; a death is an exception that nobody
catches, after which the next start has what a killed process leaves: the log, checkpoints, snapshots in memory.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests import rig
from tolaria import build
from tolaria.comeback import Comeback
from tolaria.config import Config
from tolaria.coordinator.coordinator import Coordinator
from tolaria.guard import Guard
from tolaria.leyline.codec import encode_command
from tolaria.leyline.types import Command, SeedOp
from tolaria.loop import Trainer
from tolaria.orders.desk import Waiting
from tolaria.orders.words import CHECKPOINT, COMMAND, EMERGENCY, PAUSE, RESUME, STOP, UNDO, Order, Outcome
from tolaria.recovery.fsops import FileOps
from tolaria.recovery.journal import Journal
from tolaria.recovery.leftovers import sweep
from tolaria.recovery.wal import WalKind, read_log
from tolaria.state import TrainState
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity
from tolaria.telemetry.events import read_events
from tolaria.telemetry.summary import RunSummary

STEPS = 36


expected: dict[str, str] = {}


class Killed(BaseException):
    """The process is gone."""


@dataclass
class Orders:
    """In place of rank 0's desk: orders for certain steps, and what became of them. One for all starts of a run."""

    due: list[tuple[int | Callable[[TrainState], bool], Order]]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    state: TrainState | None = None
    urgent: str = ""

    @property
    def waiting(self) -> bool:
        """As the lane asks before a step, for the step to come; as one who stands still asks, for this step."""
        assert self.state is not None
        return bool(self.due) and self._is_due(self.state.step + (self.state.hand.paused is None))

    def _is_due(self, step: int) -> bool:
        assert self.state is not None
        when = self.due[0][0]
        return when <= step if isinstance(when, int) else when(self.state)

    def take(self) -> Waiting | None:
        """The next order, at its step."""
        assert self.state is not None
        if not self.due or not self._is_due(self.state.step):
            return None
        return Waiting(self.due.pop(0)[1], b"frame")

    def answer(self, outcome: Outcome) -> None:
        """Keep it."""
        self.outcomes[outcome.order_id] = outcome

    def of(self, order: Order) -> Outcome:
        """What became of it."""
        return self.outcomes[order.order_id]


@dataclass
class Course:
    """A run with its orders, in a folder of its own."""

    folder: Path
    orders: Orders
    config: Config

    def start(self, *, resume: bool = False) -> RunSummary:
        """Train until the end, or until killed."""
        config = replace(self.config, run=replace(self.config.run, resume="auto" if resume else "no"))
        return build.train(
            config,
            task=rig.make_task,
        )

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Its events."""
        return list(read_events(self.folder / "run" / "events.jsonl", kind))

    def log(self, *kinds: WalKind) -> list[dict[str, Any]]:
        """Records of its log."""
        return [r.document for r in read_log(self.folder / "run" / "wal", FileOps()).records if r.kind in kinds]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Course]]:
    folders = []

    def made(*due: tuple[int, Order], **recovery: Any) -> Course:
        folder = Path(tempfile.mkdtemp(prefix="tl-"))
        folders.append(folder)
        base = rig.tiny_config()
        course = Course(folder, Orders(list(due)), replace(
            base,
            run=replace(base.run, dir=str(folder / "run")),
            train=replace(base.train, epochs=STEPS // 12),
            tamiyo=replace(base.tamiyo, policy="none"),
            log=replace(base.log, progress="off"),
            dist=replace(base.dist, device="cpu"),
            recovery=replace(base.recovery, **{"snapshot_steps": 5, "halt_wait_s": 1.0, **recovery}),
        ))  # fmt: skip

        def desk(state: TrainState, *_: Any) -> Orders:
            course.orders.state = state
            return course.orders

        monkeypatch.setattr(build, "make_desk", desk)
        return course

    yield made
    for folder in folders:
        with suppress(OSError):
            for run_id in {event["run_id"] for event in read_events(folder / "run" / "events.jsonl", "run_started")}:
                sweep(run_id, None, Path("/dev/shm"))


def command(what: Command, name: str = "op-1") -> Order:
    raw = encode_command(with_identity(what, name, issued_by="test", issued_at_ns=1))
    return Order(action=COMMAND, command=raw, operator="somebody", reason="why")


def order(action: str, **arguments: Any) -> Order:
    return Order(action=action, operator="somebody", reason="why", arguments=arguments)


def digest(summary: RunSummary) -> str:
    [found] = summary.state_digest.values()
    return found


def die(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, before: bool, when: Callable[..., bool]
) -> list[int]:
    """Be killed before or after the first call of a method for which ``when`` is true; what it has killed."""
    plain, fired = getattr(owner, name), list[int]()

    def dying(self: Any, *args: Any, **more: Any) -> Any:
        hit = not fired and when(*args, **more)
        if hit and before:
            fired.append(1)
            raise Killed
        found = plain(self, *args, **more)
        if hit:
            fired.append(1)
            raise Killed
        return found

    monkeypatch.setattr(owner, name, dying)
    return fired


def always(*_: Any, **__: Any) -> bool:
    return True


POINTS = {
    "in the log, not done": (Journal, "act", False, always),
    "kept apart": (Guard, "snapshot", False, lambda payload, apart=False: apart),
    "done, not compared": (Coordinator, "act", False, always),
    "compared, not in the log": (Journal, "acted", True, always),
    "in the log as done": (Journal, "acted", False, always),
    "answered": (Orders, "answer", False, always),
}
WISHES = {
    "rate": lambda: command(do.scale_lr("*", 0.5)),
    "seed": lambda: command(do.germinate("early", "low_rank")),
    "mode": lambda: command(do.conservative(True)),
    "checkpoint": lambda: order(CHECKPOINT),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("wish", WISHES)
def test_a_death_at_any_point_of_an_act_ends_in_its_effect(
    make: Callable[..., Course], monkeypatch: pytest.MonkeyPatch, wish: str, point: str
) -> None:
    if wish == "checkpoint" and point in ("kept apart", "done, not compared"):
        pytest.skip("an act that changes nothing has no such point")
    asked = WISHES[wish]()
    if wish not in expected:
        unharmed = make((17, asked), (23, order(PAUSE)), (23, order(RESUME)))
        expected[wish] = digest(unharmed.start())
        assert unharmed.orders.of(asked).state == "applied" and unharmed.orders.of(asked).step == 17
    course = make((17, asked), (23, order(PAUSE)), (23, order(RESUME)))
    owner, name, before, when = POINTS[point]
    with monkeypatch.context() as killing:
        fired = die(killing, owner, name, before=before, when=when)
        with pytest.raises(Killed):
            course.start()
    assert fired
    assert digest(course.start(resume=True)) == expected[wish]
    done = course.log(WalKind.ACTED)
    assert [(body["act"], body["refused"]) for body in done] == [(1, {}), (2, {}), (3, {})]
    if wish != "checkpoint":
        assert (course.told("act_applied")[-3]["again"], course.told("act_applied")[-3]["step"]) == (True, 17)
    else:
        assert any(body["step"] == 17 for body in course.log(WalKind.CHECKPOINT))


def test_acts_after_a_return_to_their_step_come_after_it_again(
    make: Callable[..., Course], monkeypatch: pytest.MonkeyPatch
) -> None:
    def orders() -> list[tuple[int, Order]]:
        return [
            (12, order(PAUSE)), (12, command(do.scale_lr("*", 0.5), "a")), (12, command(do.conservative(True), "b")),
            (12, order(UNDO, weights=True)), (12, command(do.scale_lr("*", 0.7), "c")), (12, order(RESUME)),
        ]  # fmt: skip

    wanted = digest(make(*orders()).start())
    course = make(*orders())
    with monkeypatch.context() as killing:
        die(killing, TrainState, "after_step", before=False, when=lambda taken: course.orders.state.step == 14)  # type: ignore[union-attr]
        with pytest.raises(Killed):
            course.start()
    summary = course.start(resume=True)
    assert digest(summary) == wanted and summary.mode == "normal"


@pytest.mark.parametrize("kill", [False, True])
def test_a_pause_holds_over_a_return(make: Callable[..., Course], monkeypatch: pytest.MonkeyPatch, kill: bool) -> None:
    """And what is ordered after it, at the step that the run went back to, is not done before it."""
    resume = order(RESUME)
    course = make(
        (13, order(PAUSE)),
        (13, order(EMERGENCY, level=3)),
        (lambda s: s.mode.conservative, command(do.conservative(False))),
        (lambda s: s.step == 10, resume),
    )
    if kill:
        with monkeypatch.context() as killing:
            die(killing, Journal, "act", before=False, when=lambda number, step, body: body["action"] == RESUME)
            with pytest.raises(Killed):
                course.start()
        summary = course.start(resume=True)
        assert [event["again"] for event in course.told("act_applied")][-1] is True
    else:
        summary = course.start()
    assert summary.steps == STEPS and summary.mode == "normal"
    assert {event["step"] for event in course.told("act_applied") if event["what"] == "resume"} == {10}
    assert [body["paused"] for body in course.log(WalKind.VOID)] == ["why"]


def test_a_return_after_a_pause_does_not_bring_it_back(make: Callable[..., Course]) -> None:
    course = make(
        (12, order(PAUSE)), (12, command(do.scale_lr("*", 0.5), "a")), (12, order(RESUME)),
        (14, order(UNDO, weights=True)), (20, order(STOP)),
    )  # fmt: skip
    summary = course.start()
    assert summary.outcome == "stopped" and summary.steps == 20


def test_a_return_that_cannot_be_made_is_refused_also_when_it_is_gone_through_again(
    make: Callable[..., Course], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = command(do.rollback(), "back")
    course = make((14, order(CHECKPOINT)), (18, asked))
    course.config = replace(course.config, checkpoint=replace(course.config.checkpoint, good_after=0))
    with monkeypatch.context() as broken:
        broken.setattr(Comeback, "_restore", lambda self, incident, attempt: None)
        die(broken, TrainState, "after_step", before=False, when=lambda taken: course.orders.state.step == 19)  # type: ignore[union-attr]
        with pytest.raises(Killed):
            course.start()
    outcome = course.orders.of(asked)
    assert (outcome.state, outcome.code, outcome.act) == ("refused", "return_failed", 2)
    assert course.start(resume=True).steps == STEPS
    assert course.log(WalKind.VOID) == []
    assert [body["refused"] for body in course.log(WalKind.ACTED)][-1] == {"back": "return_failed"}


def test_an_undo_with_the_weights_goes_to_before_the_act_or_is_refused(make: Callable[..., Course]) -> None:
    """Never to a checkpoint that has seen it, however good that is; to one from before it where no snapshot is left."""
    undo, again = order(UNDO, weights=True), order(UNDO, weights=True)
    course = make((14, command(do.scale_lr("*", 0.5))), (20, undo), snapshot_steps=0)
    course.start()
    assert course.orders.of(undo).code == "no_state"
    before, after = order(CHECKPOINT), order(CHECKPOINT)
    course = make((10, before), (14, command(do.scale_lr("*", 0.5))), (16, after), (20, again), snapshot_steps=0)
    course.config = replace(course.config, checkpoint=replace(course.config.checkpoint, good_after=0))
    course.start()
    outcome = course.orders.of(again)
    assert (outcome.state, outcome.details["to_step"]) == ("applied", 12)  # of the boundary


def test_a_checkpoint_that_has_seen_a_void_act_is_void(
    make: Callable[..., Course], monkeypatch: pytest.MonkeyPatch
) -> None:
    def orders() -> list[tuple[int, Order]]:
        return [
            (13, order(PAUSE)), (13, command(do.scale_lr("*", 0.5))), (13, order(CHECKPOINT)),
            (13, order(UNDO, weights=True)), (13, order(RESUME)),
        ]  # fmt: skip

    wanted = digest(make(*orders()).start())
    course = make(*orders())
    with monkeypatch.context() as killing:
        die(killing, Journal, "went_back", before=False, when=always)
        with pytest.raises(Killed):
            course.start()
    assert digest(course.start(resume=True)) == wanted
    assert {event.get("saved_step") for event in course.told("resumed")} != {13} or course.told("resumed")[-1][
        "source"
    ] == "snapshot"


def test_what_is_ordered_at_the_step_of_a_checkpoint_is_in_the_next_one(make: Callable[..., Course]) -> None:
    first, second, third = order(CHECKPOINT), order(CHECKPOINT), order(CHECKPOINT)
    course = make((13, order(PAUSE)), (13, first), (13, second), (13, command(do.scale_lr("*", 0.5))), (13, third),
                  (13, order(STOP)))  # fmt: skip
    summary = course.start()
    names = [Path(course.orders.of(one).details["checkpoint"]).name for one in (first, second, third)]
    assert [name.endswith("-s13") for name in names] == [True] * 3
    assert names[0] == names[1] != names[2] == Path(summary.checkpoint).name


@pytest.mark.parametrize("restarted", [True, False])
def test_a_stop_that_a_crash_cut_off_holds_for_who_starts_again_by_itself(
    make: Callable[..., Course], monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    course = make((13, order(STOP)))
    with monkeypatch.context() as killing:
        die(killing, Trainer, "_stop_asked", before=True, when=always)
        with pytest.raises(Killed):
            course.start()
    with monkeypatch.context() as again:
        plain = Journal.started

        def started(self: Journal, *args: Any) -> None:
            self.restarted = restarted
            plain(self, *args)

        again.setattr(Journal, "started", started)
        summary = course.start(resume=True)
    assert (summary.outcome, summary.steps) == (("stopped", 13) if restarted else ("finished", STEPS))
    if restarted:
        assert course.start(resume=True).outcome == "finished"


def test_undo_takes_back_one_after_the_other(make: Callable[..., Course]) -> None:
    undos = [order(UNDO) for _ in range(4)]
    course = make(
        (13, order(PAUSE)), (13, command(do.scale_lr("*", 0.5), "a")), (13, command(do.scale_lr("host", 0.8), "b")),
        (13, command(do.germinate("early", "low_rank"), "c")), *((13, undo) for undo in undos), (13, order(STOP)),
    )  # fmt: skip
    course.start()
    whats = [course.orders.of(undo).details.get("what") for undo in undos[:3]]
    assert whats == ["cancel early", "host: undo", "*: undo"]
    assert course.orders.of(undos[3]).code == "nothing_to_undo"


def test_an_undo_leaves_the_seed_of_somebody_else_alone(make: Callable[..., Course]) -> None:
    undo = order(UNDO)
    mine, other = (
        command(do.germinate("early", "low_rank"), "mine"),
        command(do.germinate("early", "low_rank"), "other"),
    )
    course = make((5, mine), (6, command(do.seed_command(SeedOp.CANCEL, "early"), "gone")), (30, other), (31, undo))
    course.start()
    if course.orders.of(other).state == "applied":
        assert course.orders.of(undo).details["what"] == "cancel early"


def test_a_policy_pauses_the_run_until_an_operator_lets_it_go_on(make: Callable[..., Course]) -> None:
    for may_pause in (True, False):
        polls = iter(range(1000))
        resume = order(RESUME)
        course = make((lambda state, polls=polls: state.hand.paused is not None and next(polls) > 8, resume))
        script = course.folder / "script.toml"
        script.write_text('command = [{ boundary = 1, op = "pause" }]\n')
        course.config = replace(
            course.config, tamiyo=replace(course.config.tamiyo, policy=f"script:{script}", may_pause=may_pause)
        )
        assert course.start().steps == STEPS
        assert [event["step"] for event in course.told("paused")] == ([12] if may_pause else [])
        assert (resume.order_id in course.orders.outcomes) == may_pause
        refused = [event["code"] for event in course.told("command_refused")]
        assert refused == ([] if may_pause else ["pause_not_allowed"])
