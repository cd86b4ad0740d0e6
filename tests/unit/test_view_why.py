"""Why a run is as it is: what short real runs told, looked at when it had just happened, and afterwards."""

import pytest

from tests.seen import moment, recorded, status_document
from tolaria.view.lookout import View, look
from tolaria.view.ranks import Doing, Seen
from tolaria.view.why import NOTHING, TOPICS, Answer, Urgency, before, explain, unusual


def only(view: View, topic: str) -> Answer:
    """The one answer to a question."""
    (answer,) = explain(view, topic)
    assert answer.topic == topic
    return answer


def test_a_spike_is_why_it_went_back_and_is_conservative() -> None:
    view = moment("spike", "went_back")
    answer = only(view, "went-back")
    assert answer.now and answer.what.startswith("went back because the loss jumped: loss 1")
    assert "times the running median" in answer.what
    assert answer.since == 149 and answer.facts[0].startswith("from step 149 to 140, to snapshot of step 140")
    assert "64 samples of the steps to blame are left out from here on" in answer.facts
    assert "return 1 of 3 that may come within 1,000 steps before it gives up" in answer.facts
    status = careful_status("loss_spike at step 149")
    careful = only(moment("spike", "went_back", further=1, status=status), "conservative")
    assert careful.what == "conservative: loss_spike at step 149" and careful.since == 140
    assert "tolaria send" in careful.do and "conservative off" in careful.do  # no policy will end it sooner
    assert unusual(view)[0].topic == "went-back"


def careful_status(reason: str) -> dict[str, object]:
    return status_document(mode={"conservative": True, "reason": reason}, goodput={}, step=149)


def test_a_second_return_is_told_as_the_second_and_is_more_urgent() -> None:
    newest = explain(moment("spike", "went_back", 2), "went-back")
    now = [answer for answer in newest if answer.now]
    assert now[0].facts[-1].startswith("return 2 of 3") and now[0].urgency == Urgency.WORSE
    assert "not finite" in now[0].what


def test_skipped_steps_are_counted_and_named() -> None:
    answer = only(moment("spike", "step_skipped", 2), "skipped-step")
    assert answer.what == "2 steps made no update: the gradient over all ranks was not finite"
    assert answer.since == 288 and answer.facts[0] == "at steps 288, 289" and answer.now
    assert "3 in a row" in answer.facts[1]


def test_a_policy_that_does_not_answer_is_told_with_its_deadline() -> None:
    view = moment("silent_policy", "mode_changed", further=1)
    answer = only(view, "no-answer")
    assert answer.now and answer.what.endswith("does not answer: timeout")
    assert any("no acceptable answer within 0.25 s" in fact for fact in answer.facts)
    assert "tamiyo.deadline_ms=250" in answer.do
    careful = only(view, "conservative")
    assert careful.what == "conservative: policy: timeout" and careful.since == 20
    assert "ends by itself after 2 boundaries in a row" in careful.do


def test_a_policy_that_is_not_asked_any_more_is_told_with_the_breaker() -> None:
    answer = only(moment("silent_policy", "policy_failed", 2, further=4), "no-answer")
    assert any("the breaker is open: it is asked again after 5 boundaries" in fact for fact in answer.facts)
    assert any(fact.startswith("2 boundaries decided without it, from boundary 2 on") for fact in answer.facts)


def test_a_killed_rank_is_why_it_started_again() -> None:
    answer = only(look(recorded("restarted")), "restarted")
    assert answer.what.startswith("started again by torchrun: PeerLost")
    assert answer.facts == ("it went on from step 30, from a snapshot", "3 steps were done again")
    assert unusual(look(recorded("restarted"))) == []
    assert before(look(recorded("restarted"))) == ["restarted"]


def test_a_stuck_rank_is_named_as_the_reason_of_the_restart() -> None:
    answer = only(look(recorded("stuck")), "restarted")
    assert "rank 1 no heartbeat for" in answer.what


def test_a_killed_run_is_told_with_its_last_word_and_how_to_go_on() -> None:
    view = look(recorded("killed"))
    assert view.now.state == "killed"
    (answer,) = unusual(view)
    assert answer.urgency == Urgency.BROKEN and "killed, or the machine went down" in answer.what
    assert any(fact.endswith("at step 33") for fact in answer.facts)
    assert "the newest checkpoint is c1-s20" in answer.facts
    assert answer.do.endswith(f"--resume {view.now.path}") or "--resume" in answer.do


def test_a_failure_is_told_by_its_cause_and_not_by_those_who_lost_the_rank() -> None:
    view = look(recorded("failed"))
    assert {event["error"] for event in view.course.of_kind("run_failed")} == {"PeerLost", "TaskError"}
    (answer,) = unusual(view)
    assert answer.what.startswith("it failed with TaskError: loading the task's data raised OSError: sample store gone")
    assert answer.facts[0] == "told by rank 1"
    assert view.now.reason.startswith("TaskError: ")


def test_a_run_that_gave_up_says_after_how_many_returns() -> None:
    view = look(recorded("unstable"))
    assert view.now.state == "unstable"
    (answer,) = unusual(view)
    assert answer.what.startswith("it failed with TrainingUnstable: loss or gradient not finite in 3 steps in a row")
    assert any(fact.startswith("the run went back ") for fact in answer.facts)
    assert "gave up" in explain(view, "went-back")[-1].what or "gave up" in explain(view, "went-back")[0].what


def test_the_slow_rank_is_named_and_whether_it_is_its_data() -> None:
    view = moment("slow_rank", "straggler", 2, further=3)
    answer = explain(view, "slow")[0]
    assert answer.now and answer.what.startswith("rank 1 takes 4") and "ms a step of its own" in answer.what
    assert answer.since == 10 and answer.facts[0].startswith("every rank waits for it")
    ranks = [{"rank": 0, "own_ms": 6.0, "wait_ms": 40.0, "data_ms": 5.0}, {"rank": 1, "own_ms": 46.0, "data_ms": 45.0}]
    data = explain(moment("slow_rank", "straggler", 2, status=status_document(ranks=ranks)), "slow")[0]
    assert "45 ms of it is waiting for data" in data.facts and "waits for its data" in data.do
    ranks[1]["data_ms"] = 5.0
    work = explain(moment("slow_rank", "straggler", 2, status=status_document(ranks=ranks)), "slow")[0]
    assert any(fact.endswith("the rest is its own work") for fact in work.facts) and "computes slower" in work.do


def test_ranks_that_all_wait_for_data_and_time_that_went_elsewhere_are_slow() -> None:
    ranks = [{"rank": rank, "own_ms": 9.0, "wait_ms": 0.1, "data_ms": 6.0} for rank in range(2)]
    status = status_document(ranks=ranks, step_ms=10.0, goodput={"compute": 50.0, "compile": 50.0})
    found = {answer.what: answer for answer in explain(moment("restarted", "boundary", 2, status=status), "slow")}
    assert found["the ranks wait for data 60% of a step"].urgency == Urgency.WORSE
    assert found["50% of the run's time went to compile"].facts == ("50 s of 1 min 40 s, over all its starts",)


def test_a_rank_that_stands_is_told_before_the_watchdog_ends_it() -> None:
    stands = Doing(local_rank=1, pid=77, phase="step", seconds=31.0, step=30, silent_s=30.5)
    fine = Doing(local_rank=0, pid=76, phase="step", seconds=31.0, step=30, silent_s=0.2)
    view = moment("restarted", "boundary", 2, seen=Seen(ranks=(fine, stands), level=0, reason=""))
    standing = [a for a in unusual(view) if a.urgency == Urgency.BROKEN]
    assert [answer.what for answer in standing] == [f"rank {rank} of this machine does not get on" for rank in (0, 1)]
    assert standing[1].facts[0].startswith("no heartbeat for 30 s") and "kill -USR1 77" in standing[1].do


def test_a_save_that_fails_is_urgent_until_one_succeeds() -> None:
    answer = explain(moment("unsaved", "checkpoint_failed"), "no-checkpoint")[0]
    assert answer.now and answer.urgency == Urgency.WAITING
    assert answer.what.startswith("the save of step ") and "failed: " in answer.what
    over = explain(look(recorded("unsaved")), "no-checkpoint")[0]
    assert not over.now and any("saves work again since step" in fact for fact in over.facts)


def test_every_slot_says_what_it_waits_for() -> None:
    learning = only(moment("killed", "boundary", 2), "not-growing")
    assert learning.what == "mid: its seed waits in stage training for the next move"
    assert "gate G1" in learning.do and "seed graft --slot mid" in learning.do
    dormant = explain(moment("spike", "boundary", 3), "not-growing")
    assert [answer.what for answer in dormant] == [
        f"{slot}: nothing was asked to grow here" for slot in ("early", "late")
    ]
    assert "dormant for 3 boundaries" in dormant[0].facts and any("no policy" in fact for fact in dormant[0].facts)


def test_an_emergency_in_force_is_first() -> None:
    page = Seen(ranks=(), level=3, reason="operator: smoke")
    first = unusual(moment("restarted", "boundary", 2, seen=page))[0]
    assert first.what == "emergency level 3 is in force: operator: smoke" and first.do.endswith("clear")


def test_nothing_unusual_is_an_answer_and_every_question_has_one() -> None:
    assert unusual(moment("restarted", "boundary", 2)) == []
    assert set(NOTHING) == set(TOPICS)


@pytest.mark.parametrize("name", ["spike", "silent_policy", "killed", "failed", "unstable", "unsaved", "slow_rank"])
def test_at_no_moment_of_a_run_does_a_rule_fail(name: str) -> None:
    for number in (1, 2):
        for view in (moment(name, "decision", number), moment(name, "boundary", number, alive=False)):
            for topic in TOPICS:
                for answer in explain(view, topic):
                    assert answer.what and answer.topic
            assert unusual(view) == sorted(unusual(view), key=lambda a: (not a.now, a.urgency))
