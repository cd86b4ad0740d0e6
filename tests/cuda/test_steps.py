"""Steps on a GPU: bfloat16, fused, compiled into CUDA graphs, fed by a stream of their own, channels last."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rig import Rig, same_bits, tiny_config
from tolaria.config import CompileConfig, Config, PrecisionConfig
from tolaria.dist import World
from tolaria.leyline.types import SeedStage
from tolaria.measure import TRAIN_METERS
from tolaria.tasks import digits
from tolaria.telemetry.meters import Meters


def config(amp: str = "off", **compile_settings: Any) -> Config:
    compiled = CompileConfig(**compile_settings) if compile_settings else CompileConfig(enabled=False)
    return replace(tiny_config(), precision=PrecisionConfig(amp=amp, tf32=False), compile=compiled)


def host(rig: Rig) -> dict[str, Tensor]:
    return {n: t.detach().cpu().clone() for n, t in rig.state.host_parameters.items()}


def in_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(("amp", "rtol", "atol"), [("off", 1e-4, 1e-5), ("bf16", 0.1, 0.05)])
def test_a_few_steps_come_out_as_on_the_cpu(gpu: World, tmp_path: Path, amp: str, rtol: float, atol: float) -> None:
    with Rig.build(in_folder(tmp_path / "gpu"), world=gpu, config=config(amp)) as rig:
        assert rig.state.optimizer.defaults["fused"]
        rig.train(5)
        assert {p.dtype for p in rig.state.host_parameters.values()} == {torch.float32}
        on_gpu = host(rig)
    with Rig.build(in_folder(tmp_path / "cpu"), config=config()) as rig:
        rig.train(5)
        on_cpu = host(rig)
    for name, tensor in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], tensor, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_the_same_run_twice_ends_with_the_same_bits_while_a_seed_grows(gpu: World, tmp_path: Path, amp: str) -> None:
    ends = []
    for name in ("one", "two"):
        with Rig.build(in_folder(tmp_path / name), world=gpu, config=config(amp), dropout=0.1) as rig:
            rig.grow("early", SeedStage.FOSSILIZED)
            rig.train(3)
            ends.append(rig.state.digest())
    assert ends[0] == ends[1]


def test_a_step_waits_for_the_device_at_most_once(gpu: World, tmp_path: Path) -> None:
    with Rig.build(tmp_path, world=gpu, config=config("bf16")) as rig:
        rig.train(3)
        group = rig.batches()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                rig.take_step(group)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) <= 1, waits


def test_batches_that_a_stream_of_their_own_brings_are_whole_however_busy_the_device_is(
    gpu: World, tmp_path: Path
) -> None:
    with Rig.build(tmp_path, world=gpu, config=config()) as rig:
        plan = rig.state.sampler.remaining() * 20
        inputs, targets = rig.task.train.tensors  # type: ignore[attr-defined]
        busy = torch.randn(2000, 2000, device=gpu.device)
        seen = []
        for batch in rig.loader.batches(rig.task.train, plan):
            busy = (busy @ busy).clamp_(-1, 1)
            # Read late, by the stream that computes: memory that came back too early would hold another batch by then.
            seen.append((batch.inputs.clone(), batch.targets.clone()))
            del batch
        assert len(seen) == len(plan)
        for (found, classes), (indices, _) in zip(seen, plan, strict=True):
            assert torch.equal(found.cpu(), inputs[indices])
            assert torch.equal(classes.cpu(), targets[indices])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_and_validation_follow_the_eager_ones(gpu: World, tmp_path: Path, mode: str) -> None:
    losses = []
    for name, settings in (("eager", {}), ("compiled", {"mode": mode, "validation": "on"})):
        with Rig.build(in_folder(tmp_path / name), world=gpu, config=config(**settings)) as rig:
            rig.replica.warm_up(rig.sample)
            rig.train(12)  # CUDA graphs are recorded in the second step of a structure
            report = rig.evaluator.measure(Meters(TRAIN_METERS))
            assert rig.evaluator.forward.compiled == (name == "compiled")
            assert rig.told("compile_fallback") == []
            losses.append((report.val_loss, report.val_accuracy))
            rig.grow("early", SeedStage.BLENDING)
            rig.train(5)
            assert all(bool(t.isfinite().all()) for t in rig.state.tensors().values() if t.is_floating_point())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_convolutional_network_is_channels_last_by_itself_and_its_state_goes_anywhere(
    gpu: World, tmp_path: Path
) -> None:
    settings = replace(config("bf16"), kasmina=tiny_config(gradient_window=1, output_ratio=1e6).kasmina)
    with Rig.build(in_folder(tmp_path / "gpu"), world=gpu, config=settings, make=digits.make_task) as rig:
        rig.grow("early", SeedStage.BLENDING, "conv_residual")
        (batch,) = rig.batches()
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
        four = {n: t for n, t in rig.state.tensors().items() if t.dim() == 4}
        assert four and all(t.is_contiguous(memory_format=torch.channels_last) for t in four.values())
        saved = {n: t.cpu().contiguous() for n, t in rig.state.tensors().items()}
        with Rig.build(in_folder(tmp_path / "cpu"), config=settings, make=digits.make_task) as other:
            other.state.load(saved, rig.state.meta())
            assert other.state.digest() == rig.state.digest()
            for name, tensor in other.state.tensors().items():
                assert same_bits(tensor.contiguous(), saved[name]), name
