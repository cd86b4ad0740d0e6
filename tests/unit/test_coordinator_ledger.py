"""The ledger of commands: what was asked, what became of it, and that the policy is told at least once."""

import json
import math

import pytest

from tolaria.coordinator.ledger import MAX_PENDING, NOTICEABLE, Ledger, describe
from tolaria.coordinator.plan import Outcome
from tolaria.leyline.codec import decode_request, encode_request
from tolaria.leyline.limits import MAX_MEASUREMENT, MAX_STRING_CHARS
from tolaria.leyline.types import (
    Command,
    CommandType,
    FieldOutcome,
    FieldReport,
    HardwareContext,
    OptimizerCommand,
    PolicyRequest,
    SystemState,
)
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import with_identity

WINDOW = 2


def ledger() -> Ledger:
    return Ledger("run", WINDOW, wall_ns=lambda: 5)


def germination(command_id: str = "c1") -> Command:
    command = do.germinate("mid", "low_rank", reason="a plateau")
    return with_identity(command, command_id, issued_by="test", issued_at_ns=1)


def applied(command_id: str = "c1") -> Outcome:
    command = germination(command_id)
    return Outcome(command_id, command, True, "applied", command.reason)


def refused(command_id: str = "c1", code: str = "conservative", reason: str = "not now") -> Outcome:
    return Outcome(command_id, germination(command_id), False, code, reason)


def enter(
    book: Ledger, outcome: Outcome, *, boundary: int = 4, step: int = 40, loss: float = 1.0, accuracy: float = 0.5
) -> None:
    book.enter(outcome, boundary=boundary, step=step, loss=loss, accuracy=accuracy)


def acceptable(reports: tuple[FieldReport, ...]) -> tuple[FieldReport, ...]:
    """The reports as the policy gets them; raises if they could not be sent."""
    state = SystemState(
        packet_id="p", current_epoch=1, global_step=1, validation_accuracy=0, validation_loss=0, training_loss=0,
        timestamp_ns=1, training_run_id="run", experiment_name="e", hardware=HardwareContext(device_type="cpu"),
    )  # fmt: skip
    return decode_request(encode_request(PolicyRequest(state=state, field_reports=reports))).field_reports


def test_an_applied_command_is_recorded_and_reported_at_once() -> None:
    book = ledger()
    enter(book, applied())
    record = book.records["c1"]
    assert (record.step, record.boundary, record.what) == (40, 4, "germinate mid with low_rank")
    assert (record.reason, record.outcome, record.effect) == ("a plateau", "applied", "")
    (report,) = book.pending
    assert report == FieldReport(
        report_id="c1:0", command_id="c1", training_run_id="run", outcome=FieldOutcome.NEUTRAL, seed_id="mid",
        blueprint_id="low_rank", issued_at_ns=5, notes="applied",
    )  # fmt: skip
    assert acceptable(book.pending) == book.pending


def test_a_refused_command_is_reported_as_aborted_with_code_and_reason_and_never_judged() -> None:
    book = ledger()
    enter(book, refused(reason="the breaker is open"))
    assert book.records["c1"].outcome == "refused"
    assert book.records["c1"].effect == "the breaker is open"
    (report,) = book.pending
    assert report.outcome == FieldOutcome.ABORTED
    assert report.notes == "conservative: the breaker is open"
    assert book.observe(100, 0.1, 0.9) == []


def test_an_unreadable_command_is_recorded_under_its_place() -> None:
    book = ledger()
    enter(book, Outcome("boundary-4-0", None, False, "enum", "command_type 99 is not known"))
    assert book.records["boundary-4-0"].what == "unreadable command"
    (report,) = acceptable(book.pending)
    assert (report.command_id, report.seed_id, report.outcome) == ("boundary-4-0", "", FieldOutcome.ABORTED)


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (1.0, 1.0 - 2 * NOTICEABLE, FieldOutcome.SUCCESS),
        (1.0, 1.0 - NOTICEABLE / 2, FieldOutcome.NEUTRAL),
        (1.0, 1.0, FieldOutcome.NEUTRAL),
        (1.0, 1.0 + NOTICEABLE / 2, FieldOutcome.NEUTRAL),
        (1.0, 1.0 + 2 * NOTICEABLE, FieldOutcome.REGRESSION),
        (1.0, math.nan, FieldOutcome.REGRESSION),
        (1.0, math.inf, FieldOutcome.REGRESSION),
        (math.nan, 1.0, FieldOutcome.SUCCESS),
        (math.inf, 1.0, FieldOutcome.SUCCESS),
        (math.nan, math.nan, FieldOutcome.REGRESSION),
        (0.0, 0.0, FieldOutcome.NEUTRAL),
    ],
)
def test_the_effect_is_judged_by_the_validation_loss(before: float, after: float, outcome: FieldOutcome) -> None:
    book = ledger()
    enter(book, applied(), loss=before)
    book.delivered(book.pending)
    (record,) = book.observe(6, after, 0.75)
    assert record.outcome == outcome.name.lower()
    assert record == book.records["c1"]
    assert "in 2 boundaries" in record.effect
    (report,) = acceptable(book.pending)
    assert (report.report_id, report.command_id, report.outcome) == ("c1:1", "c1", outcome)
    assert (report.seed_id, report.blueprint_id, report.observation_window_epochs) == ("mid", "low_rank", 2)
    sent = {"loss_before": before, "loss_after": after, "accuracy_after": 0.75}
    assert dict(report.metrics) == pytest.approx({k: v for k, v in sent.items() if math.isfinite(v)})


def test_a_command_is_judged_once_when_its_window_is_over() -> None:
    book = ledger()
    enter(book, applied("c1"), boundary=4)
    enter(book, applied("c2"), boundary=5)
    assert book.observe(5, 1.0, 0.5) == []
    assert [r.command_id for r in book.observe(6, 1.0, 0.5)] == ["c1"]
    # A boundary may be missed when a run is stopped between two; the next one makes up for it.
    assert [r.command_id for r in book.observe(9, 1.0, 0.5)] == ["c2"]
    assert book.observe(10, 1.0, 0.5) == []


def test_a_report_is_repeated_until_a_question_with_it_was_answered() -> None:
    book = ledger()
    enter(book, applied("c1"))
    asked = book.pending
    assert book.pending == asked
    enter(book, refused("c2"))
    book.delivered(asked)
    assert [r.report_id for r in book.pending] == ["c2:0"]
    book.delivered(asked)
    book.delivered(book.pending)
    assert book.pending == ()


def test_unsent_reports_are_bounded_and_the_newest_stay() -> None:
    book = ledger()
    for number in range(3 * MAX_PENDING):
        enter(book, refused(f"c{number}"))
    assert len(book.pending) == MAX_PENDING
    assert book.pending[0].report_id == f"c{2 * MAX_PENDING}:0"
    assert book.pending[-1].report_id == f"c{3 * MAX_PENDING - 1}:0"
    assert len(acceptable(book.pending)) == MAX_PENDING


@pytest.mark.parametrize("outcome", [applied("x" * MAX_STRING_CHARS), refused("x" * MAX_STRING_CHARS)])
def test_a_report_about_the_longest_command_id_can_be_sent(outcome: Outcome) -> None:
    book = ledger()
    enter(book, outcome)
    book.observe(6, 1.0, 0.5)
    reports = acceptable(book.pending)
    assert {r.command_id for r in reports} == {"x" * MAX_STRING_CHARS}
    assert len({r.report_id for r in reports}) == len(reports) == 1 + outcome.applied


def test_reports_of_commands_whose_long_ids_differ_at_the_end_are_told_apart() -> None:
    book = ledger()
    enter(book, refused("x" * (MAX_STRING_CHARS - 1) + "a"))
    enter(book, refused("x" * (MAX_STRING_CHARS - 1) + "b"))
    assert len({r.report_id for r in acceptable(book.pending)}) == 2


def test_a_reason_of_any_length_and_kind_can_be_reported() -> None:
    book = ledger()
    enter(book, refused(reason="two\nlines \x1b[31m" + "y" * 500))
    (report,) = acceptable(book.pending)
    assert len(report.notes) == MAX_STRING_CHARS
    assert report.notes.isprintable()


def test_a_loss_beyond_what_can_be_sent_does_not_stop_the_reports() -> None:
    book = ledger()
    enter(book, applied(), loss=1.0)
    book.observe(6, 10 * MAX_MEASUREMENT, 0.5)
    report = acceptable(book.pending)[-1]
    assert report.outcome == FieldOutcome.REGRESSION
    assert report.metrics["loss_after"] == pytest.approx(MAX_MEASUREMENT)


def test_what_is_saved_goes_on_where_it_was() -> None:
    book, loaded = ledger(), ledger()
    enter(book, applied("c1"), loss=math.nan)
    enter(book, refused("c2"))
    enter(book, Outcome("boundary-4-2", None, False, "enum", "unknown"))
    loaded.load_state_dict(json.loads(json.dumps(book.state_dict())))
    assert loaded.records == book.records
    assert loaded.pending == book.pending
    assert loaded.observe(6, 0.5, 0.9) == book.observe(6, 0.5, 0.9) != []
    assert loaded.pending == book.pending


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (do.germinate("mid", "low_rank"), "germinate mid with low_rank"),
        (do.start_training("mid"), "start training mid"),
        (do.scale_lr("host*", 0.5), "host*: lr x0.5"),
        (do.set_optimizer("host", weight_decay=0.1, lr=0.01), "host: lr 0.01, weight_decay 0.1"),
        (do.freeze("seed/*"), "seed/*: freeze"),
        (do.thaw("seed/*"), "seed/*: thaw"),
        (do.undo(), "*: undo"),
        (do.change_optimizer("sgd", lr=0.05, momentum=0.9), "optimizer sgd: lr 0.05, momentum 0.9"),
        (do.conservative(True), "breaker open"),
        (do.rollback(), "rollback"),
        (do.pause(), "pause"),
        (Command(command_id="c", command_type=CommandType.STRUCTURAL_PRUNING), "structural pruning"),
        (
            Command(
                command_id="c", command_type=CommandType.OPTIMIZER,
                payload=OptimizerCommand(optimizer_id="", hyperparameters={"lr_scale": 2.0}),
            ),
            "*: lr x2",
        ),
    ],
)  # fmt: skip
def test_a_command_in_words(command: Command, words: str) -> None:
    assert describe(command) == words
