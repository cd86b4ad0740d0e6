"""What is typed to be tried, what two arms say of it, and a state that is not what it was."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

from tests.rig import Rig
from tolaria.errors import CheckpointError, ConfigError
from tolaria.leyline.types import OptimizerCommand
from tolaria.rehearsal.change import parse_change
from tolaria.rehearsal.effect import BLOCKS, CURVE_POINTS, Arm, Effect, compared, curve, with_error
from tolaria.rehearsal.kept import Kept


def groups_of(text: str) -> dict[str, dict[str, float]]:
    payloads = [command.payload for command in parse_change(text)]
    assert all(isinstance(payload, OptimizerCommand) for payload in payloads)
    return {p.optimizer_id: dict(p.hyperparameters) for p in payloads}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("lr*=0.5", {"*": {"lr_scale": 0.5}}),
        ("lr = 1e-3", {"*": {"lr": 1e-3}}),
        ("host.lr*=0.5", {"host": {"lr_scale": 0.5}}),
        ("seed/blocks.3.lr*=2", {"seed/blocks.3": {"lr_scale": 2.0}}),
        ("seed/*.freeze=1,host.momentum=0.9", {"seed/*": {"freeze": 1.0}, "host": {"momentum": 0.9}}),
        ("lr*=0.5, weight_decay=0.05", {"*": {"lr_scale": 0.5, "weight_decay": 0.05}}),
    ],
)
def test_a_change_is_read(text: str, groups: dict[str, dict[str, float]]) -> None:
    assert groups_of(text) == groups


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be read"),
        ("lr", "cannot be read"),
        ("lr=1=2", "cannot be read"),
        ("lr*=0.5,", "cannot be read"),
        ("lr/=2", "cannot be read"),
        ("lr=fast", "'fast' is no number"),
        ("speed=3", "no setting 'speed'; there are lr, freeze, weight_decay"),
        ("undo=1", "no setting 'undo'"),
        ("weight_decay*=2", "only lr takes *=; give weight_decay its new value"),
        ("lr*=0.5,lr*=2", "lr_scale of '*' is changed twice"),
        ("lr*=0.5\x1b[2J", "printable"),
        ("lr*=0.5" + " " * 200, "207 characters"),
    ],
)
def test_what_is_no_change_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        parse_change(text)


def test_the_training_loss_is_compared_over_the_last_half_of_the_common_steps() -> None:
    control = [9.0] * 10 + [1.0] * 10
    changed = [5.0] * 10 + [0.9] * 8
    steps, difference, error = compared(control, changed)
    assert steps == 9
    assert difference == pytest.approx((-4.0 + 8 * -0.1) / 9)
    assert error is not None and error > 0
    assert compared(control, control) == (10, 0.0, 0.0)
    assert compared([1.0], [2.0]) == (1, 1.0, None)
    assert compared([], []) == (0, None, None)
    assert compared([1.0, math.nan], [1.0, 2.0]) == (1, None, None)


def test_the_error_of_the_training_loss_holds_where_neighbouring_steps_resemble_each_other() -> None:
    """An average that wanders slowly: an error from single steps would be several times too small."""
    generator = random.Random(5)
    means, errors = [], []
    for _ in range(200):
        level, walk = 0.0, []
        for _ in range(800):
            level = 0.9 * level + generator.gauss(0, 1)
            walk.append(level)
        _, difference, error = compared([0.0] * 800, walk)
        assert difference is not None and error is not None
        means.append(difference)
        errors.append(error)
    true = math.sqrt(sum(m * m for m in means) / len(means))
    told = sum(errors) / len(errors)
    assert 0.7 < told / true < 1.3


def test_a_curve_is_means_of_steps_in_a_row() -> None:
    assert curve([]) == [] and curve([1.0, 2.0]) == [1.0, 2.0]
    thinned = curve([float(at) for at in range(1000)])
    assert len(thinned) == CURVE_POINTS and thinned[0] == 12.0 and thinned == sorted(thinned)
    assert BLOCKS <= CURVE_POINTS


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(-0.01141, 0.00093, "-0.01141 +- 0.00093"), (0.5, 0.25, "+0.50 +- 0.25"), (123.0, 45.0, "+123 +- 45"),
     (0.25, 0.0, "+0.25 +- 0"), (1.0, math.nan, "+1 +- nan")],
)  # fmt: skip
def test_a_difference_is_told_to_the_second_digit_of_its_error(value: float, error: float, text: str) -> None:
    assert with_error(value, error) == text


def effect(**known: object) -> Effect:
    whole = Arm(losses=[1.0] * 8, val_loss=1.0, val_noise=0.1, accuracy=0.5)
    plain = {"what": "*: lr x0.5", "at_step": 3, "steps": 8, "control": whole, "changed": whole, "train_steps": 4}
    return Effect(**{**plain, "val_difference": -0.2, "val_error": 0.05, **known})  # type: ignore[arg-type]


def test_the_verdict_says_what_the_numbers_allow() -> None:
    failed = Arm(losses=[1.0] * 5 + [math.nan], ended="loss not finite")
    assert effect().verdict == "lowers the validation loss by 0.200 +- 0.050 after 8 steps"
    assert effect(val_difference=0.2).verdict.startswith("raises the validation loss by 0.200")
    assert effect(val_difference=-0.09).verdict == (
        "no effect on the validation loss beyond its noise (-0.090 +- 0.050) after 8 steps"
    )
    assert effect(val_difference=0.0, val_error=0.0).verdict.startswith("no effect")
    assert effect(val_error=None).verdict == "too little validation data to tell after 8 steps"
    assert effect(changed=failed).verdict == (
        "training failed after 6 steps with the change, and not otherwise: loss not finite"
    )
    assert effect(control=failed).verdict.startswith("training failed after 6 steps without the change, and not")
    assert "otherwise" not in effect(control=failed, changed=failed).verdict
    told = effect(changed=failed).to_json()
    assert json.loads(json.dumps(told, allow_nan=False))["changed"]["losses"][-1] is None
    assert (told["control"]["train_loss"], told["control"]["steps"]) == (1.0, 8)


def test_a_state_that_does_not_come_back_as_it_was_stops_the_run(tmp_path: Path) -> None:
    with Rig.build(tmp_path) as rig:
        rig.train(2)
        kept = Kept(rig.state, rig.replica, rig.world)
        rig.train(3)
        kept.put_back()
        assert rig.state.step == 2
        kept._tensors["model/head.weight"][0, 0] += 1  # the memory it lay in is bad
        with pytest.raises(CheckpointError, match="not what it was before"):
            kept.put_back()


def test_what_is_kept_does_not_follow_what_happens_later(tmp_path: Path) -> None:
    with Rig.build(tmp_path, dropout=0.3) as rig:
        rig.train(2)
        kept, digest, stream = Kept(rig.state, rig.replica, rig.world), rig.state.digest(), torch.get_rng_state()
        rig.train(3)
        assert rig.state.digest() != digest and not torch.equal(torch.get_rng_state(), stream)
        kept.put_back()
        assert rig.state.digest() == digest and torch.equal(torch.get_rng_state(), stream)
