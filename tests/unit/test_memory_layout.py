"""Channels last: where it is in force, and that nothing but the order in memory differs for it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.rig import Rig, same_bits, tiny_config
from tolaria.config import AggregateConfig, OptimConfig, PrecisionConfig
from tolaria.leyline.types import SeedStage
from tolaria.memory_layout import chosen_format, lay_out
from tolaria.tasks.digits import make_task

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAST = torch.channels_last


def build(folder: Path, choice: str, *, mode: str = "sum", optimizer: str = "adamw") -> Rig:
    folder.mkdir(exist_ok=True)
    config = replace(
        tiny_config(batch_size=8, gradient_window=1, output_ratio=1e6),
        precision=PrecisionConfig(amp="off", channels_last=choice),
        aggregate=AggregateConfig(mode=mode, attribution="kasmina"), optim=OptimConfig(name=optimizer, lr=0.01),
    )  # fmt: skip
    return Rig.build(folder, config=config, make=make_task)


def four_d(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of which the order in memory says something."""
    return {n: t for n, t in tensors.items() if t.dim() == 4 and t.shape[1] > 1 and t[0, 0].numel() > 1}


@pytest.mark.parametrize(
    ("choice", "device", "last"), [("auto", CUDA, True), ("auto", CPU, False), ("on", CPU, True), ("off", CUDA, False)]
)
def test_by_itself_it_is_for_convolutions_on_cuda(choice: Any, device: torch.device, last: bool) -> None:
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    assert (chosen_format(choice, convolution, device) == LAST) == last
    assert (chosen_format(choice, nn.Linear(2, 2), device) == LAST) == (choice == "on")


def test_only_tensors_of_four_dimensions_are_laid_out_anew_and_the_objects_stay() -> None:
    module = nn.Sequential(nn.Conv3d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = {n: (p, p.detach().clone()) for n, p in module.named_parameters()}
    lay_out(module, LAST)
    for name, parameter in module.named_parameters():
        same, values = before[name]
        assert parameter is same
        assert torch.equal(parameter, values)
        assert parameter.is_contiguous() != (name == "1.weight")


def test_weights_gradients_optimizer_state_inputs_and_seeds_are_channels_last(tmp_path: Path) -> None:
    with build(tmp_path, "on") as rig:
        rig.grow("early", SeedStage.BLENDING, "conv_residual")
        (batch,) = rig.batches()
        assert batch.inputs.is_contiguous(memory_format=LAST)
        grads: dict[str, Tensor] = {}

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            held = (pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True))
            grads.update({n: p.grad for n, p in held if p.grad is not None})

        rig.state.optimizer.register_step_pre_hook(note)
        rig.train()
        tensors = {**rig.state.tensors(), **{f"grad/{n}": g for n, g in grads.items()}}
        found = four_d(tensors)
        assert [n for n, t in found.items() if not t.is_contiguous(memory_format=LAST)] == []
        assert {n.split("/")[0] for n in found} == {"model", "seed", "optim", "grad"}


def test_a_run_that_is_saved_and_taken_up_again_is_bit_equal_also_into_another_layout(tmp_path: Path) -> None:
    with build(tmp_path / "whole", "on") as whole, build(tmp_path / "again", "on") as again:
        whole.grow("early", SeedStage.BLENDING, "conv_residual")
        whole.train(2)
        saved = {n: t.clone(memory_format=torch.contiguous_format) for n, t in whole.state.tensors().items()}
        meta, stream = whole.state.meta(), torch.get_rng_state()
        with build(tmp_path / "other", "off") as other:
            other.state.load(saved, meta)
            assert other.state.digest() == whole.state.digest()
        again.state.load(saved, meta)
        again.replica.rebuild()
        assert [n for n, t in four_d(again.state.tensors()).items() if not t.is_contiguous(memory_format=LAST)] == []
        whole.train(5)
        torch.set_rng_state(stream)
        again.train(5)
        assert again.state.digest() == whole.state.digest()
        for name, tensor in whole.state.tensors().items():
            assert same_bits(tensor.contiguous(), again.state.tensors()[name].contiguous()), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("mode", ["sum", "weighted", "pcgrad"])
def test_every_way_to_a_gradient_gives_the_optimizer_one_that_lies_as_the_weights_do(
    tmp_path: Path, mode: str, optimizer: str
) -> None:
    # A fused optimizer goes through weights and gradients by their addresses, and takes one element for another.
    ends = []
    for choice in ("on", "off"):
        with build(tmp_path / choice, choice, mode=mode, optimizer=optimizer) as rig:
            assert rig.state.optimizer.defaults["fused"]
            rig.train(3)
            ends.append({n: t.clone() for n, t in rig.state.tensors().items() if n.startswith("model/")})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["weighted", "pcgrad"])
def test_a_users_transposed_weight_is_trained_as_one_that_is_not(tmp_path: Path, mode: str) -> None:
    ends = []
    for transposed in (True, False):
        with build(tmp_path / str(transposed), "off", mode=mode) as rig:
            weights = [p for p in rig.state.host_parameters.values() if p.dim() == 2]
            assert weights
            if transposed:
                for weight in weights:
                    weight.data = weight.data.t().contiguous().t()
                rig.replica.rebuild(afresh=True)
            rig.train(3)
            ends.append([w.detach().contiguous() for w in weights])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)
