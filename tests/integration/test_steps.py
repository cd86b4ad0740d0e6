"""One optimizer step: accumulation, clipping, the verdict on non-finite gradients, scaling, debug mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from tests.rig import Rig, TinyHost, make_task, same_bits, tiny_config
from tolaria import build
from tolaria.config import Config, LogConfig, OptimConfig, PrecisionConfig, RunConfig, TamiyoConfig
from tolaria.errors import TaskError
from tolaria.kasmina.blueprints import register_blueprint
from tolaria.leyline.types import SeedStage
from tolaria.objective import Batch
from tolaria.state import TrainState
from tolaria.step import StepResult
from tolaria.telemetry.events import read_events

SLOT = "early"


def copies(state: TrainState) -> dict[str, Tensor]:
    """Every replicated tensor, as it is now."""
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def take(rig: Rig, group: list[Batch] | None = None) -> StepResult:
    """One optimizer step as the loop takes it, on these microbatches."""
    result = rig.take_step(group)
    rig.state.after_step(taken=result.taken)
    return result


def gradients_at_update(rig: Rig) -> list[dict[str, list[Tensor]]]:
    """Fills with the gradients of every parameter group that the optimizer works with, one entry a step."""
    seen: list[dict[str, list[Tensor]]] = []

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        seen.append({g["name"]: [p.grad.clone() for p in g["params"] if p.grad is not None] for g in groups})

    rig.state.optimizer.register_step_pre_hook(note)
    return seen


# Accumulation


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    ends, losses = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        folder = tmp_path / str(accumulation)
        folder.mkdir()
        config = replace(
            tiny_config(batch_size=batch_size, accumulation=accumulation), optim=OptimConfig(name="sgd", lr=0.1)
        )
        with Rig.build(folder, config=config) as rig:
            # 45 samples: the sixth step, the last one of the epoch, has 5 of them and fills up the rest.
            losses.append([float(take(rig).loss) for _ in range(7)])
            assert rig.state.sampler.epoch == 1
            ends.append(copies(rig.state))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-6)


# Clipping


def test_host_and_seed_are_clipped_each_by_itself(tmp_path: Path) -> None:
    bound = 1e-4
    config = tiny_config(blend_steps=100)
    with Rig.build(tmp_path, config=replace(config, train=replace(config.train, clip_norm=bound))) as rig:
        rig.grow(SLOT, SeedStage.BLENDING, "residual_mlp")
        seen = gradients_at_update(rig)
        take(rig)
        norms = {name: float(get_total_norm(gradients)) for name, gradients in seen[0].items()}
        assert norms.keys() == {"host", f"seed/{SLOT}"}
        assert list(norms.values()) == pytest.approx([bound, bound], rel=2e-2)


def test_gradients_below_the_bound_are_left_alone(tmp_path: Path) -> None:
    seen = []
    for name, clip_norm in (("bounded", 1e3), ("free", 0.0)):
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_config()
        with Rig.build(folder, config=replace(config, train=replace(config.train, clip_norm=clip_norm))) as rig:
            gradients = gradients_at_update(rig)
            take(rig)
            seen.append(gradients[0]["host"])
    assert all(same_bits(a, b) for a, b in zip(*seen, strict=True))


# The verdict


def poisoned(batch: Batch) -> Batch:
    """The batch with one number that is none."""
    inputs = batch.inputs.clone()
    inputs[0, 0] = float("nan")
    return Batch(inputs, batch.targets, batch.weights)


def test_a_step_without_a_finite_gradient_changes_nothing_but_the_position(tmp_path: Path) -> None:
    config = tiny_config(blend_steps=50, accumulation=2)
    with Rig.build(tmp_path, config=config, dropout=0.2, batch_norm=True) as rig:
        rig.grow(SLOT, SeedStage.BLENDING)
        before, alpha = copies(rig.state), rig.state.kasmina.seeds[SLOT].alpha_value
        cursor, step = rig.state.sampler.cursor, rig.state.step
        first, second = rig.batches()
        assert not take(rig, [first, poisoned(second)]).taken
        after = copies(rig.state)
        assert [name for name in before if not same_bits(before[name], after[name])] == []
        assert rig.state.kasmina.seeds[SLOT].alpha_value == alpha
        assert (rig.state.step, rig.state.skipped_steps) == (step + 1, 1)
        assert rig.state.sampler.cursor == (cursor + rig.state.sampler.group_size) % 48
        assert take(rig).taken
        assert not same_bits(copies(rig.state)["model/head.weight"], before["model/head.weight"])
        assert len(list(read_events(rig.events_path, "step_skipped"))) == 1


# fp16


class _InfiniteGradient(torch.autograd.Function):
    """h, with a gradient for the scale that overflows."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, scale: Tensor) -> Tensor:
        ctx.scale_shape = scale.shape
        return h * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(grads[0]), torch.full(ctx.scale_shape, float("inf"))


class Explosive(nn.Module):
    """A seed whose output is finite and whose gradient never is, once it is armed."""

    armed = False

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(shape[-1])
        self.scale = nn.Parameter(torch.full((shape[-1],), 0.1))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        h = self.norm(h)
        if Explosive.armed:
            f: Tensor = _InfiniteGradient.apply(h, self.scale)  # type: ignore[no-untyped-call]
            return f
        return h * self.scale


@contextmanager
def armed() -> Iterator[None]:
    Explosive.armed = True
    try:
        yield
    finally:
        Explosive.armed = False


def fp16_rig(folder: Path) -> Rig:
    """Autocast to float16 with gradient scaling, on the CPU."""
    return Rig.build(folder, config=replace(tiny_config(blend_steps=50), precision=PrecisionConfig(amp="fp16")))


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING])
def test_an_overflow_in_the_seed_does_not_skip_the_step_of_the_host(stage: SeedStage, tmp_path: Path) -> None:
    register_blueprint("explosive", Explosive, ranks=[1])
    with fp16_rig(tmp_path) as rig:
        rig.grow(SLOT, stage, "explosive")
        assert rig.state.scaler.is_enabled()
        scale, skipped, before = rig.state.scaler.get_scale(), rig.state.skipped_steps, copies(rig.state)
        with armed():
            assert take(rig).taken
        after = copies(rig.state)
        assert not same_bits(before["model/head.weight"], after["model/head.weight"])
        of_seed = [name for name in before if name.startswith(f"seed/{SLOT}/")]
        assert f"seed/{SLOT}/norm.running_mean" in of_seed
        assert [name for name in of_seed if not same_bits(before[name], after[name])] == []
        assert (rig.state.scaler.get_scale(), rig.state.skipped_steps) == (scale, skipped)
        (dropped,) = read_events(rig.events_path, "seed_gradient_not_finite")
        assert dropped["seed"] == SLOT
        assert take(rig).taken
        assert not same_bits(after[f"seed/{SLOT}/scale"], rig.state.tensors()[f"seed/{SLOT}/scale"])


def test_an_overflow_in_the_host_skips_its_step_and_halves_the_scale(tmp_path: Path) -> None:
    with fp16_rig(tmp_path) as rig:
        rig.train(2)
        scale, before = rig.state.scaler.get_scale(), copies(rig.state)
        (batch,) = rig.batches()
        assert not take(rig, [poisoned(batch)]).taken
        assert rig.state.scaler.get_scale() == scale / 2
        after = copies(rig.state)
        assert [name for name in before if not same_bits(before[name], after[name])] == []
        assert take(rig).taken


def test_the_scale_does_not_show_in_the_update(tmp_path: Path) -> None:
    ends = []
    for name, scale in (("large", 1024.0), ("small", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        with fp16_rig(folder) as rig:
            rig.grow(SLOT, SeedStage.TRAINING, "low_rank")
            rig.state.scaler.update(scale)
            seen = gradients_at_update(rig)
            take(rig)
            ends.append(seen[0])
    for group in ends[0]:
        for a, b in zip(ends[0][group], ends[1][group], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


# What is wrong with a model


class Root(TinyHost):
    """Takes the root of a number that is always zero: finite forward, NaN backward."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features) -> logits."""
        logits = super().forward(x)
        return logits + torch.sqrt(logits * 0)


class Idle(TinyHost):
    """Two layers that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def run_config(folder: Path, *, debug: bool = False) -> Config:
    config = tiny_config()
    return replace(
        config, run=RunConfig(dir=str(folder / "run")), train=replace(config.train, debug=debug, max_steps=2),
        tamiyo=TamiyoConfig(policy="none"), log=LogConfig(progress="off"),
    )  # fmt: skip


def test_debug_mode_names_the_operation_and_its_place(tmp_path: Path) -> None:
    place = r"(?s)Error detected in MulBackward0.*test_steps\.py.*torch\.sqrt\(logits \* 0"
    with (
        pytest.raises(RuntimeError, match="MulBackward0' returned nan values"),
        pytest.warns(UserWarning, match=place),
    ):
        build.train(run_config(tmp_path, debug=True), task=lambda: replace(make_task(), model=Root()))


def test_without_debug_mode_such_steps_are_skipped(tmp_path: Path) -> None:
    summary = build.train(run_config(tmp_path), task=lambda: replace(make_task(), model=Root()))
    assert (summary.outcome, summary.steps, summary.counters["skipped_steps"]) == ("finished", 2, 2)


def test_parameters_without_a_gradient_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"without a gradient: model\.spare\.weight, model\.spare\.bias"):
        build.train(run_config(tmp_path), task=lambda: replace(make_task(), model=Idle()))


def test_frozen_parameters_need_no_gradient(tmp_path: Path) -> None:
    model = Idle()
    model.spare.requires_grad_(False)
    assert build.train(run_config(tmp_path), task=lambda: replace(make_task(), model=model)).steps == 2
