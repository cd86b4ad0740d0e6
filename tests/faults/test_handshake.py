"""Training goes on whatever the policy does: whole runs against services that are silent, late, wrong or hostile."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.handshake_run import DEADLINE_MS, EPOCHS, PROBE_DEADLINE_MS, Ran, run, run_config, trained_alike
from tests.faults.own_policies import DIES_AT
from tests.faults.peers import EXIT_OF_THE_DYING, Misbehaving, misbehaving
from tests.ranks import RankPool
from tolaria.leyline.types import SeedStage
from tolaria.telemetry.lines import read_lines

pytestmark = pytest.mark.processes

STEPS = 6 * EPOCHS
# A wait ends soon after its deadline, also on a machine whose cores are busy.
SLACK_MS = 1000
RUN_S = 30.0
PATIENT_MS = 5000


@dataclass(frozen=True)
class Fault:
    """What a peer's misbehaviour must come to.

    ``failures``: boundary -> code; ``refused``: codes of each boundary's commands; ``rejected``: why frames were not
    accepted, at least.
    """

    failures: dict[int, str]
    refused: tuple[str, ...] = ()
    rejected: frozenset[str] = frozenset()


NEVER = {1: "timeout", 2: "timeout", 3: "timeout", 9: "timeout"}
AT_ONCE = frozenset({1, 7})

FAULTS = {
    "silent": Fault(NEVER),
    "late": Fault(NEVER),
    "dying": Fault(NEVER),
    "replay": Fault({2: "timeout", 3: "timeout", 4: "timeout"}, rejected=frozenset({"boundary"})),
    "garbage": Fault(dict.fromkeys(AT_ONCE, "auth"), rejected=frozenset({"size", "magic", "mac", "multipart"})),
    "forged": Fault(dict.fromkeys(AT_ONCE, "auth"), rejected=frozenset({"unknown_key", "mac"})),
    "crowd": Fault(dict.fromkeys(AT_ONCE, "schema"), rejected=frozenset({"count"})),
    "malformed": Fault(dict.fromkeys(AT_ONCE, "schema"), rejected=frozenset({"parse"})),
    "unknownenum": Fault({}, refused=("enum", "enum", "enum")),
    "illegal": Fault(
        {}, refused=("illegal_transition", "illegal_transition", "unknown_seed", "unknown_blueprint", "no_checkpoint")
    ),
    "wild": Fault({}, refused=("not_finite", "not_finite", "not_finite", "not_finite", "range", "range")),
}


@pytest.fixture(scope="module")
def noop(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The run that no policy disturbs."""
    folder = tmp_path_factory.mktemp("noop") / "run"
    ran = run(run_config(folder, policy="noop", deadline_ms=PATIENT_MS))
    assert (ran.summary["outcome"], ran.summary["steps"], ran.summary["mode"]) == ("finished", STEPS, "normal")
    assert ran.failures() == {}
    return ran


def run_against(behaviour: str, folder: Path) -> tuple[Ran, Misbehaving]:
    with misbehaving(behaviour) as peer:
        ran = run(run_config(folder, endpoint=peer.place.endpoint, key_file=peer.place.key_file))
    return ran, peer


@pytest.mark.parametrize("behaviour", FAULTS)
def test_training_goes_on_as_if_the_policy_wanted_nothing(behaviour: str, tmp_path: Path, noop: Ran) -> None:
    fault = FAULTS[behaviour]
    ran, peer = run_against(behaviour, tmp_path / "run")
    assert_the_fault_fired(behaviour, fault, ran, peer)
    assert (ran.summary["outcome"], ran.summary["steps"]) == ("finished", STEPS)
    assert trained_alike(ran, noop)
    assert_waits_are_bounded(ran)
    if not fault.failures:
        assert ran.summary["mode"] == "normal"
        assert ran.summary["state_digest"] == noop.summary["state_digest"]


def assert_the_fault_fired(behaviour: str, fault: Fault, ran: Ran, peer: Misbehaving) -> None:
    """The peer was asked and did its worst, and the events of the run say what came of it."""
    assert peer.exit_code == (EXIT_OF_THE_DYING if behaviour == "dying" else None)
    assert bool(peer.sent) == (behaviour not in ("silent", "dying"))
    assert ran.failures() == fault.failures
    asked = [e["boundary"] for e in ran.events("decision") if e["reason"] != "breaker_open"]
    assert list(peer.reports) == (asked[:1] if behaviour == "dying" else asked)
    events = ran.events("policy_failed")
    assert [event["code"] for event in events] == list(fault.failures.values())
    assert all(event["reason"] for event in events)
    if fault.failures:
        assert fault.rejected <= set(events[-1]["rejected"])
        assert [event["mode"] for event in ran.events("mode_changed")] == ["conservative"]
    assert ran.refused() == list(fault.refused) * EPOCHS


def assert_waits_are_bounded(ran: Ran) -> None:
    waits = ran.tamiyo_ms()
    assert len(waits) == EPOCHS
    assert max(waits) < DEADLINE_MS + SLACK_MS
    assert sum(waits) < 3 * DEADLINE_MS + PROBE_DEADLINE_MS + 4 * SLACK_MS
    assert ran.seconds < RUN_S


def test_a_policy_that_never_answers_costs_three_deadlines_then_a_probe_now_and_then(tmp_path: Path) -> None:
    ran, peer = run_against("silent", tmp_path / "run")
    # What the policy's process saw is what the run spent waiting; the boundaries between cost nothing.
    assert list(peer.reports) == [1, 2, 3, 9]
    waits = dict(enumerate(ran.tamiyo_ms(), start=1))
    assert all(waits[boundary] >= DEADLINE_MS for boundary in (1, 2, 3))
    assert waits[9] >= PROBE_DEADLINE_MS
    assert [event["breaker"] for event in ran.events("policy_failed")] == ["CLOSED", "CLOSED", "OPEN", "OPEN"]
    assert [e["reason"] for e in ran.events("decision")] == ["timeout"] * 3 + ["breaker_open"] * 5 + ["timeout"]
    # Each unanswered question was sent once more, the same bytes.
    repeated = [entry["boundary"] for entry in peer.questions if entry["repeated"]]
    assert repeated == sorted(set(repeated))
    assert {1, 2, 3}.intersection(repeated)


def test_the_policy_is_told_of_each_refusal_until_it_has_answered(tmp_path: Path) -> None:
    ran, peer = run_against("forgetful", tmp_path / "run")
    assert ran.failures() == {2: "timeout"}
    told = {"peer-0:0": "ABORTED"}
    # The second question carried the report and was not answered, so the third carries it again.
    assert peer.reports == {1: {}, 2: told, 3: told, **{boundary: {} for boundary in range(4, EPOCHS + 1)}}


def test_an_embedded_policy_that_dies_is_started_again(tmp_path: Path, noop: Ran) -> None:
    policy = "tests.faults.own_policies:Falling"
    ran = run(run_config(tmp_path / "run", policy=policy, deadline_ms=1500, breaker_failures=9))
    assert ran.failures()[DIES_AT] == "timeout"
    assert [event["level"] for event in ran.events("policy_restarted")] == ["warning"]
    assert ran.summary["outcome"] == "finished"
    assert trained_alike(ran, noop)
    assert not [p for p in psutil.Process().children(recursive=True) if "tolaria" in " ".join(p.cmdline())]


# Conservative mode


def test_conservative_mode_is_entered_by_a_failure_and_left_after_healthy_boundaries(tmp_path: Path) -> None:
    ran, _ = run_against("recovering", tmp_path / "run")
    assert ran.failures() == {1: "timeout"}
    modes = [(e["step"], e["mode"], e["reason"]) for e in ran.events("mode_changed")]
    assert modes == [(6, "conservative", "policy: timeout"), (18, "normal", "healthy again")]
    assert [d["conservative"] for d in ran.events("decision")] == [True, True, True, *[False] * (EPOCHS - 3)]
    # The same wish at every boundary: not while the mode is conservative, then once.
    applied = [(e["step"], e["what"]) for e in ran.events("command_applied")]
    assert ran.refused() == ["conservative"] * 2 + ["already_applied"] * (EPOCHS - 4)
    assert applied == [(24, "germinate early with low_rank")]
    assert ran.summary["seeds"][0]["stage"] == SeedStage.GERMINATED.name


SCRIPT = """
command = [
    { boundary = 1, op = "germinate", slot = "early", blueprint = "low_rank" },
    { boundary = 2, op = "start_training", slot = "early" },
    { boundary = 3, op = "start_grafting", slot = "early" },
    { boundary = 4, op = "conservative", on = true, reason = "somebody looks" },
    { boundary = 5, op = "cull", slot = "early" },
    { boundary = 5, op = "scale_lr", group = "host", factor = 2.0 },
    { boundary = 5, op = "scale_lr", group = "host", factor = 0.5 },
    { boundary = 7, op = "conservative", on = false },
    { boundary = 8, op = "scale_lr", group = "host", factor = 2.0 },
]
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A graft of 30 steps, 6 of them before conservative mode is asked for at boundary 4, for three boundaries."""
    folder = tmp_path_factory.mktemp("held")
    script = folder / "script.toml"
    script.write_text(SCRIPT)
    policy = f"script:{script}"
    return run(run_config(folder / "run", policy=policy, deadline_ms=PATIENT_MS, kasmina={"blend_steps": 30}))


def test_a_command_holds_conservative_mode_until_a_command_ends_it(held: Ran) -> None:
    modes = [(e["step"], e["mode"], e["reason"]) for e in held.events("mode_changed")]
    assert modes == [(24, "conservative", "command: somebody looks"), (42, "normal", "healthy again")]
    assert held.failures() == {}
    assert held.summary["mode"] == "normal"


def test_conservative_mode_refuses_structure_and_faster_learning(held: Ran) -> None:
    assert held.refused() == ["conservative", "lr_increase_conservative"]
    rates = {line["step"]: line["lr"] for line in read_lines(held.folder / "metrics.jsonl")}
    assert [rates[step] / rates[1] for step in (30, 36, 48, 54)] == pytest.approx([1.0, 0.5, 0.5, 1.0])


def test_conservative_mode_holds_alpha_where_it_is(held: Ran) -> None:
    alphas = {line["step"]: line["alpha/early"] for line in read_lines(held.folder / "metrics.jsonl")
              if "alpha/early" in line}  # fmt: skip
    before, during, after = ([alphas[s] for s in steps] for steps in (range(19, 25), range(25, 43), range(43, 55)))
    assert before == sorted(set(before))
    assert 0 < before[-1] < 1
    assert set(during) == {before[-1]}
    assert after == sorted(set(after))
    assert after[0] > during[-1]


# Two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def run_on_two_ranks(pool: RankPool, folder: Path, **tamiyo: Any) -> Ran:
    ran = Ran(folder, max(pool.run("tests.faults.handshake_run:job", folder=str(folder), **tamiyo)))
    assert (ran.summary["outcome"], ran.summary["world_size"]) == ("finished", 2)
    assert len(ran.summary["state_digest"]) == 2
    assert len(set(ran.summary["state_digest"].values())) == 1
    return ran


def test_two_ranks_go_on_as_one_when_the_policy_is_an_impostor(two_ranks: RankPool, tmp_path: Path) -> None:
    quiet = run_on_two_ranks(two_ranks, tmp_path / "noop", policy="noop", deadline_ms=PATIENT_MS)
    with misbehaving("forged") as peer:
        place = peer.place
        ran = run_on_two_ranks(two_ranks, tmp_path / "forged", endpoint=place.endpoint, key_file=place.key_file)
    assert peer.sent
    assert ran.failures() == {1: "auth", 7: "auth"}
    assert trained_alike(ran, quiet)
    assert_waits_are_bounded(ran)


def test_conservative_mode_is_that_of_both_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    with misbehaving("recovering") as peer:
        place = peer.place
        ran = run_on_two_ranks(two_ranks, tmp_path / "run", endpoint=place.endpoint, key_file=place.key_file)
    assert ran.refused() == ["conservative"] * 2 + ["already_applied"] * (EPOCHS - 4)
    assert len(ran.events("command_applied")) == 1
