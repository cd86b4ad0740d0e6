"""Who writes the learning rates: no false alarm whatever the controller does, and what three foreign hands lead to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tests.rig import Rig
from tolaria.config_tuning import LRConfig, TuningConfig
from tolaria.leyline.types import OptimizerCommand
from tolaria.mode import Mode
from tolaria.optim.integrity import LRViolation
from tolaria.optim.lr import LRController
from tolaria.optim.tuning import Tuner
from tolaria.step import LR_TAMPERED
from tolaria.tamiyo import policy as do

STEPS = 10_000
FORMS = {"float": None, "float64 tensor": torch.float64, "float32 tensor": torch.float32}


def make_optimizer(dtype: torch.dtype | None, *names: str) -> Optimizer:
    optimizer = SGD([{"params": [nn.Parameter(torch.zeros(1))], "name": name, "lr": 9.0} for name in names])
    for group in optimizer.param_groups if dtype else ():
        group["lr"] = torch.tensor(9.0, dtype=dtype)
    return optimizer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed_policy", ["seed_warmup", "morpho_adaptive", "frozen"])
@pytest.mark.parametrize("policy", ["constant", "linear", "cosine", "step", "wsd"])
def test_ten_thousand_steps_of_every_policy_raise_no_alarm(policy: Any, seed_policy: Any, form: str) -> None:
    config = LRConfig(
        policy=policy, seed_policy=seed_policy, warmup_steps=100, final_ratio=0.0, seed_warmup_steps=300,
        step_every=400, conservative_factor=0.5,
    )  # fmt: skip
    controller, tuner = LRController(config, 0.3, STEPS), Tuner(TuningConfig(), config)
    optimizer = make_optimizer(FORMS[form], "host", "seed/a")
    controller.add_group("host")
    controller.add_group("seed/a", "seed", 50)
    commands = [
        {"lr_scale": 0.5},
        {"freeze": 1.0},
        {"lr_scale": 2.0},
        {"freeze": 0.0},
        {"lr_scale": 0.8},
        {"undo": 1.0},
    ]
    for step in range(STEPS):
        if step % 97 == 0:
            payload = OptimizerCommand(optimizer_id="*", hyperparameters=commands[step // 97 % len(commands)])
            tuning = tuner.plan(f"c{step}", payload, optimizer, controller, step=step, conservative=False)
            tuner.commit(tuning, optimizer, controller, step)
        if step % 501 == 0:
            controller.set_conservative(step % 1002 == 0)
            controller.rewarm(step, 40)
        if step % 997 == 0:
            controller.restart_warmup("seed/a", step)
            controller.load_state_dict(controller.state_dict())
        controller.set_progress("seed/a", step / STEPS)
        assert controller.apply(optimizer, step) == []
    assert controller.take_found() == 0
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(rate, Tensor) == (form != "float") for rate in rates)


def controller_of(*names: str) -> LRController:
    controller = LRController(LRConfig(policy="linear", seed_warmup_steps=0), 1.0, 100)
    for name in names:
        controller.add_group(name, "host" if name == "host" else "seed")
    return controller


def test_a_tensor_is_written_in_place_and_one_that_groups_share_is_parted() -> None:
    controller = controller_of("host", "seed/a")
    controller.set_scale("seed/a", 0.5, 0)
    shared = torch.tensor(1.0, dtype=torch.float64)
    optimizer = make_optimizer(None, "host", "seed/a")
    host, seed = optimizer.param_groups
    host["lr"] = seed["lr"] = shared
    for step in range(5):
        assert controller.apply(optimizer, step) == []
        assert host["lr"] is shared
        assert (float(host["lr"]), float(seed["lr"])) == (
            controller.lr_at("host", step),
            controller.lr_at("seed/a", step),
        )
    other = torch.tensor(0.25)
    seed["lr"] = other
    assert controller.apply(optimizer, 5) == [LRViolation(5, "seed/a", controller.lr_at("seed/a", 4), 0.25)]
    assert float(other) == pytest.approx(controller.lr_at("seed/a", 5))


def test_a_rate_on_a_device_is_checked_without_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, optimizer = controller_of("host"), make_optimizer(None, "host")
    (group,) = optimizer.param_groups
    group["lr"] = torch.zeros((), device="meta")  # reading one raises
    for step in range(3):
        assert controller.apply(optimizer, step) == []
    group["lr"].fill_(0.5)
    monkeypatch.setattr(Tensor, "__float__", lambda rate: 0.5)
    assert controller.apply(optimizer, 3) == [LRViolation(3, "host", controller.lr_at("host", 2), 0.5)]
    group["lr"] = torch.zeros((), device="meta")
    assert len(controller.apply(optimizer, 4)) == 1


# In a run


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig.build(tmp_path) as built:
        built.train(2)
        yield built


def disturb(rig: Rig, times: int = 1) -> None:
    """Somebody else writes the host's rate before each of so many steps; one more step, which tells of the last."""
    for _ in range(times):
        rig.state.optimizer.param_groups[0]["lr"] = 0.5
        rig.train(1)
    rig.train(1)


def test_a_foreign_change_is_corrected_before_it_is_used_and_told(rig: Rig) -> None:
    step = rig.state.step
    disturb(rig)
    (event,) = rig.told("lr_violation")
    assert (event["step"], event["group"], event["expected"], event["found"]) == (step, "host", 0.02, 0.5)
    assert event["level"] == "error"
    assert rig.state.optimizer.param_groups[0]["lr"] == 0.02
    assert rig.state.mode == Mode()


def test_three_foreign_changes_make_the_run_conservative_and_two_healthy_boundaries_end_that(rig: Rig) -> None:
    disturb(rig, times=2)
    assert rig.state.mode == Mode()
    disturb(rig)
    assert rig.state.mode == Mode(conservative=True, reason=LR_TAMPERED)
    assert [e["reason"] for e in rig.told("lr_breaker_opened")] == [LR_TAMPERED]
    assert [(e["mode"], e["reason"]) for e in rig.told("mode_changed")] == [("conservative", LR_TAMPERED)]
    (outcome,) = rig.boundary(do.scale_lr("host", 2.0)).outcomes
    assert outcome.code == "lr_increase_conservative"
    assert rig.state.mode.healthy == 1
    disturb(rig)  # once more: the count of healthy boundaries begins anew
    rig.boundary()
    assert rig.state.mode == Mode(conservative=True, reason=LR_TAMPERED, healthy=1)
    rig.boundary()
    assert rig.state.mode == Mode()
    assert not rig.state.lr.tampered
    disturb(rig, times=2)
    assert rig.state.mode == Mode()
    assert len(rig.told("lr_breaker_opened")) == 1


def test_a_command_closes_the_breaker_at_once(rig: Rig) -> None:
    disturb(rig, times=3)
    assert rig.state.lr.tampered
    (outcome,) = rig.boundary(do.conservative(False)).outcomes
    assert outcome.applied
    assert (rig.state.mode, rig.state.lr.tampered) == (Mode(), False)


def test_the_breaker_is_saved_and_taken_back(rig: Rig) -> None:
    disturb(rig, times=2)
    memento, meta = rig.state.memento(), rig.state.meta()
    tensors = {name: tensor.clone() for name, tensor in rig.state.tensors().items()}
    disturb(rig)
    assert rig.state.lr.tampered
    rig.state.restore(memento)
    assert (rig.state.lr.tampered, rig.state.mode) == (False, Mode())
    rig.state.load(tensors, meta)
    rig.train(1)
    disturb(rig)
    assert rig.state.lr.tampered


def test_a_reason_that_was_there_before_stays(rig: Rig) -> None:
    rig.state.mode = Mode(conservative=True, reason="command: by hand", held=True)
    disturb(rig, times=3)
    assert rig.state.mode == Mode(conservative=True, reason="command: by hand", held=True)
    assert len(rig.told("lr_breaker_opened")) == 1
    assert rig.told("mode_changed") == []
