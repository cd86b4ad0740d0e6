"""The course of every policy is its formula, written out here, whatever happened to the run meanwhile."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.rig import Rig, tiny_config
from tolaria.config_tuning import LRConfig
from tolaria.leyline.types import SeedStage
from tolaria.mode import Mode
from tolaria.tamiyo import policy as do

BASE, TOTAL, WARMUP = 0.02, 60, 5
Curve: TypeAlias = Callable[[int], float]


def warmed(after: Curve) -> Curve:
    return lambda n: (n + 1) / 6 if n < 5 else after(n)


HOST: dict[str, Curve] = {
    "constant": warmed(lambda n: 1.0),
    "linear": warmed(lambda n: 1 - 0.9 * min(1, (n - 5) / 54)),
    "cosine": warmed(lambda n: 0.1 + 0.9 * (1 + math.cos(math.pi * min(1, (n - 5) / 54))) / 2),
    "step": warmed(lambda n: 0.5 ** ((n - 5) // 7)),
    "wsd": warmed(lambda n: 1.0 if n <= 41 else 1 - 0.9 * min(1, (n - 41) / 18)),  # 0.3 of 60 steps decay
}
"""Share of the peak rate at step n of 60, after 5 steps of warm-up and with 0.1 left at the end."""
SEED: dict[str, Callable[[int, float], float]] = {
    "seed_warmup": lambda age, alpha: 0.8 if age >= 10 else 0.8 * (0.01 + 0.99 * age / 10),
    "morpho_adaptive": lambda age, alpha: 0.1 + 0.7 * alpha,
    "frozen": lambda age, alpha: 0.0,
}
"""Share of the host's rate so many steps after the seed began to train, blended in by alpha."""


def config_of(host: str, seed: str, **further: Any) -> LRConfig:
    return LRConfig(
        policy=host, seed_policy=seed, warmup_steps=WARMUP, final_ratio=0.1, step_every=7, step_factor=0.5,
        wsd_decay_share=0.3, seed_ratio=0.8, seed_warmup_steps=10, **further,
    )  # type: ignore[arg-type]  # fmt: skip


def build(folder: Path, host: str = "cosine", seed: str = "seed_warmup", **further: Any) -> Rig:
    config = tiny_config(blend_steps=4)
    train = replace(config.train, max_steps=TOTAL)
    return Rig.build(folder, config=replace(config, train=train, lr=config_of(host, seed, **further)))


def walk(rig: Rig, expected: dict[str, Callable[[int], float]], steps: int) -> None:
    """Take steps; the rate that each was taken with is what the formula says of its number."""
    for _ in range(steps):
        rig.train(1)
        used = {group["name"]: float(group["lr"]) for group in rig.state.optimizer.param_groups}
        assert used == pytest.approx({n: f(rig.state.step - 1) for n, f in expected.items()}, rel=1e-12, abs=1e-18)


def applied(rig: Rig, *commands: Any) -> None:
    assert all(outcome.applied for outcome in rig.boundary(*commands).outcomes)


@pytest.mark.parametrize("seed", SEED)
@pytest.mark.parametrize("host", HOST)
def test_the_course_holds_through_growth_return_and_resume(host: str, seed: str, tmp_path: Path) -> None:
    curve: Curve = lambda n: BASE * HOST[host](n)  # noqa: E731
    with build(tmp_path, host, seed) as rig:
        walk(rig, {"host": curve}, 8)

        # growth
        rig.grow("early", SeedStage.TRAINING)  # 2 steps, GERMINATE, 4 steps, START_TRAINING, 4 steps
        born = 14
        assert rig.state.step == born + 4

        def of_seed(n: int) -> float:
            alpha = rig.state.kasmina.seeds["early"].alpha_value if n > 18 else 0.0
            return BASE * HOST[host](n) * SEED[seed](n - born, alpha)

        walk(rig, {"host": curve, "seed/early": of_seed}, 3)

        # a return by memento, from a set rate, a freeze and another seed
        memento = rig.state.memento()
        applied(rig, do.set_lr("host", 0.011), do.freeze("seed/*"), do.germinate("late", "low_rank"))
        rig.state.restore(memento)
        rig.replica.rebuild(afresh=True)
        walk(rig, {"host": curve, "seed/early": of_seed}, 2)

        # a return to a saved state, and a resume of it in a run that was made anew
        tensors = {name: tensor.clone() for name, tensor in rig.state.tensors().items()}
        meta = json.loads(json.dumps(rig.state.meta()))
        walk(rig, {"host": curve, "seed/early": of_seed}, 4)
        end = rig.state.meta()["lr"]
        rig.state.load(tensors, meta)
        walk(rig, {"host": curve, "seed/early": of_seed}, 4)
        assert rig.state.meta()["lr"] == end
        (tmp_path / "resumed").mkdir()
        with build(tmp_path / "resumed", host, seed) as resumed:
            resumed.state.load(tensors, meta)
            resumed.replica.rebuild(first=True)
            walk(resumed, {"host": curve, "seed/early": of_seed}, 4)
            assert resumed.state.meta()["lr"] == end
            walk(resumed, {"host": curve, "seed/early": of_seed}, 40)  # beyond the planned end


def test_commands_conservative_mode_and_a_re_warm_multiply(tmp_path: Path) -> None:
    with build(tmp_path, "linear", conservative_factor=0.25) as rig:
        rig.train(6)
        applied(rig, do.scale_lr("host", 0.5))
        walk(rig, {"host": lambda n: BASE * HOST["linear"](n) * 0.5}, 2)
        rig.state.mode = Mode(conservative=True, reason="test")
        walk(rig, {"host": lambda n: BASE * HOST["linear"](n) * 0.5 * 0.25}, 2)
        rig.state.lr.rewarm(10, 5)
        share: Curve = lambda n: min(1, 0.1 + 0.9 * (n - 10) / 5)  # noqa: E731
        walk(rig, {"host": lambda n: BASE * HOST["linear"](n) * 0.5 * 0.25 * share(n)}, 7)
        rig.state.mode = Mode()
        walk(rig, {"host": lambda n: BASE * HOST["linear"](n) * 0.5}, 2)
        # 0.004 at this step, and in proportion from there
        applied(rig, do.set_lr("host", 0.004))
        at = rig.state.step
        walk(rig, {"host": lambda n: 0.004 * HOST["linear"](n) / HOST["linear"](at)}, 5)
        assert [c.cause for c in rig.state.lr.history] == ["added", "command", "mode", "rewarm", "mode", "command"]
        assert rig.told("lr_violation") == []


@pytest.mark.parametrize("policy", HOST)
def test_a_group_may_have_a_policy_of_its_own(policy: str, tmp_path: Path) -> None:
    with build(tmp_path, "constant", group_policies={"seed/early": policy, "seed/*": "frozen"}) as rig:
        rig.grow("early", SeedStage.TRAINING)
        rig.grow("late", SeedStage.TRAINING)
        expected = {
            "host": lambda n: BASE * HOST["constant"](n),
            "seed/early": lambda n: BASE * HOST[policy](n) * 0.8,
            "seed/late": lambda n: 0.0,
        }
        walk(rig, expected, 12)


def test_commands_on_a_seed_outlive_the_start_of_its_training(tmp_path: Path) -> None:
    with build(tmp_path, "constant") as rig:
        rig.grow("early", SeedStage.GERMINATED)
        applied(rig, do.scale_lr("seed/early", 0.5))
        applied(rig, do.start_training("early"))
        born = rig.state.step
        warm = lambda n: BASE * HOST["constant"](n) * SEED["seed_warmup"](n - born, 0.0) * 0.5  # noqa: E731
        walk(rig, {"host": lambda n: BASE * HOST["constant"](n), "seed/early": warm}, 12)


def test_a_policy_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"lr\.group_policies\.seed/\*='cubic': expected one of constant, linear"):
        LRConfig(group_policies={"seed/*": "cubic"})
    with pytest.raises(ValueError, match=r"lr\.conservative_factor=0"):
        LRConfig(conservative_factor=0)
