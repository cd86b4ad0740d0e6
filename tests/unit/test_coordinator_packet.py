"""What rank 0 asks and remembers: every state of a run can be told to the policy, and a restart forgets nothing."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from tests.rig import Rig
from tolaria.config import TamiyoConfig
from tolaria.coordinator.coordinator import LOSS_HISTORY, Coordinator
from tolaria.coordinator.packet import RunFacts
from tolaria.errors import PolicyUnavailable
from tolaria.kasmina import blueprints
from tolaria.kasmina.blueprints import Blueprint
from tolaria.kasmina.candidates import MAX_CANDIDATES
from tolaria.leyline.codec import ReceivedReply, decode_request, encode_request
from tolaria.leyline.limits import MAX_MEASUREMENT
from tolaria.leyline.types import HardwareContext, PolicyRequest, SeedStage, SystemState
from tolaria.measure import TRAIN_METERS, Report
from tolaria.recovery.journal import Journal
from tolaria.recovery.timeline import Timeline
from tolaria.tamiyo.client import PolicyClient
from tolaria.telemetry.meters import Meters
from tolaria.telemetry.split import Split

HEALTHY = Report(0.75, 0.5, 0.25, {"top2": 0.875})


class Recorder(PolicyClient):
    """Keeps the questions as the policy would read them; answers with nothing, or fails as told."""

    def __init__(self) -> None:
        self.asked: list[PolicyRequest] = []
        self.deadlines_ms: list[int] = []
        self.failure = ""
        self.rejected = Counter()

    def ask(
        self, request: PolicyRequest, *, boundary: int, deadline_ms: int, split: Split | None = None
    ) -> ReceivedReply:
        self.asked.append(decode_request(encode_request(request)))
        self.deadlines_ms.append(deadline_ms)
        if self.failure:
            raise PolicyUnavailable(self.failure, "as told")
        return ReceivedReply()


def coordinator(rig: Rig, client: Recorder | None) -> Coordinator:
    facts = RunFacts(
        run_id="run", experiment="test", hardware=lambda: HardwareContext(device_type="cpu"), boundaries_left=lambda: 4
    )
    return Coordinator(
        rig.state, rig.replica, rig.world, TamiyoConfig(), rig.events, facts=facts, client=client, revive=None,
        journal=Journal(Timeline(), wal=None, good_after=2), rest_boundaries=3, sample=rig.sample,
        wall_ns=lambda: 5,
    )  # fmt: skip


def told(rig: Rig, report: Report) -> SystemState:
    """The state as the policy reads it."""
    client = Recorder()
    rig.state.boundary += 1
    coordinator(rig, client).exchange(report)
    (asked,) = client.asked
    return asked.state


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig.build(tmp_path) as built:
        yield built


def test_the_packet_tells_how_the_run_does(rig: Rig) -> None:
    rig.train(3)
    state = told(rig, HEALTHY)
    assert (state.packet_id, state.training_run_id, state.experiment_name) == ("run:1", "run", "test")
    assert (state.global_step, state.current_epoch, state.timestamp_ns) == (3, 0, 5)
    assert (state.training_loss, state.validation_loss, state.validation_accuracy) == (0.75, 0.5, 0.25)
    assert [(s.seed_id, s.stage) for s in state.seeds] == [("early", SeedStage.DORMANT), ("late", SeedStage.DORMANT)]
    metrics = dict(state.training_metrics)
    assert metrics["learning_rate"] == pytest.approx(rig.config.optim.lr)
    assert (metrics["metric/top2"], metrics["boundaries_left"], metrics["conservative"]) == (0.875, 4, 0)
    assert (metrics["slot_rank/early"], metrics["slot_rank/late"]) == (1, 1)
    assert metrics["parameters"] == rig.state.parameter_count


def test_the_packet_tells_what_a_policy_chooses_by(rig: Rig) -> None:
    rig.grow("late", SeedStage.GERMINATED)
    report = rig.evaluator.measure(Meters(TRAIN_METERS))
    state = told(rig, report)
    early, late = state.seeds
    signals = {n: pytest.approx(v) for n, v in report.signals["early"].items()}
    assert dict(early.metrics) == {
        **signals,
        "boundaries_in_stage": rig.state.kasmina.seeds["early"].boundaries_in_stage,
    }
    assert {"signal/low_rank", "cost/low_rank", "flops/low_rank"} <= set(early.metrics)
    assert not any("/" in name for name in late.metrics)
    metrics = state.training_metrics
    grown = rig.state.kasmina.grown_parameters
    assert metrics["budget_parameters"] == rig.config.kasmina.max_grown_parameters - grown > 0
    assert metrics["validation_noise"] == pytest.approx(report.val_noise)
    assert metrics["flops_per_sample"] == report.flops
    # What was not measured is left out, not told as a number.
    assert not {"validation_noise", "flops_per_sample"} & set(told(rig, HEALTHY).training_metrics)


def test_as_many_candidates_as_a_slot_can_have_fit_the_message(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        name = f"own-{number:02d}-{'x' * 50}"
        monkeypatch.setitem(
            blueprints._BLUEPRINTS, name, Blueprint(name, frozenset({1}), lambda shape: nn.Linear(8, 8), "")
        )
    state = told(rig, rig.evaluator.measure(Meters(TRAIN_METERS)))
    assert [len(seed.metrics) for seed in state.seeds] == [3 * MAX_CANDIDATES + 1] * 2


def test_the_packet_tells_how_the_samples_of_each_seed_counted(rig: Rig) -> None:
    rig.grow("early", SeedStage.TRAINING)
    owners = {"early": {"weight": 0.1, "share": 0.25, "shared_norm": math.inf, "conflicts": 3.0}}
    early, late = told(rig, replace(HEALTHY, owners=owners)).seeds
    assert early.metrics.items() >= {"share": 0.25, "shared_norm": MAX_MEASUREMENT, "conflicts": 3.0}.items()
    assert early.metrics["weight"] == pytest.approx(0.1)
    assert "alpha" in early.metrics and not {"weight", "share", "shared_norm", "conflicts"} & late.metrics.keys()


@pytest.mark.parametrize(
    ("value", "as_told"),
    [(math.nan, MAX_MEASUREMENT), (math.inf, MAX_MEASUREMENT), (-math.inf, -MAX_MEASUREMENT), (1e38, MAX_MEASUREMENT)],
)
def test_a_run_that_diverged_can_be_told(rig: Rig, value: float, as_told: float) -> None:
    state = told(rig, Report(value, value, 0.0, {"top2": value}))
    assert (state.training_loss, state.validation_loss) == (as_told, as_told)
    # A further metric that is no number is left out, one that is too large is cut.
    assert dict(state.training_metrics).get("metric/top2") == (as_told if math.isfinite(value) else None)


def test_a_seed_that_diverged_can_be_told(rig: Rig) -> None:
    rig.grow("early", SeedStage.SHADOWING)
    evidence = rig.state.kasmina.seeds["early"].evidence
    evidence.gradient_norms = [1e38]
    evidence.loss_without, evidence.loss_with = 0.0, 1e38
    seed = told(rig, HEALTHY).seeds[0]
    assert seed.gradient_norm == MAX_MEASUREMENT
    assert seed.metrics["contribution"] == -MAX_MEASUREMENT


def test_the_losses_of_the_last_boundaries_travel_newest_first(rig: Rig) -> None:
    client = Recorder()
    asking = coordinator(rig, client)
    for number in range(LOSS_HISTORY + 3):
        rig.state.boundary += 1
        asking.exchange(Report(0.0, float(number), 0.0))
    metrics = client.asked[-1].state.training_metrics
    history = [metrics[f"loss_history/{back}"] for back in range(1, LOSS_HISTORY + 1)]
    assert history == [float(LOSS_HISTORY + 1 - back) for back in range(LOSS_HISTORY)]
    assert f"loss_history/{LOSS_HISTORY + 1}" not in metrics


def test_a_restart_does_not_forget_a_dead_policy_nor_what_it_must_still_be_told(rig: Rig) -> None:
    client = Recorder()
    before = coordinator(rig, client)
    rig.state.boundary += 1
    before.exchange(HEALTHY)
    client.failure = "timeout"
    for _ in range(TamiyoConfig().breaker_failures):
        rig.state.boundary += 1
        before.exchange(HEALTHY)
    assert client.deadlines_ms == [TamiyoConfig().deadline_ms] * 4

    again = Recorder()
    after = coordinator(rig, again)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for _ in range(TamiyoConfig().breaker_rest):
        rig.state.boundary += 1
        after.exchange(HEALTHY)
    assert again.asked == []
    rig.state.boundary += 1
    after.exchange(HEALTHY)
    assert again.deadlines_ms == [TamiyoConfig().probe_deadline_ms]
    assert again.asked[0].state.training_metrics["loss_history/4"] == 0.5


def test_without_a_policy_every_boundary_decides_no_change(rig: Rig) -> None:
    applied = coordinator(rig, None).exchange(HEALTHY)
    assert (applied.decision.source, applied.decision.reason, applied.outcomes) == ("policy", "no_policy", [])
    assert rig.state.mode.name == "normal"
