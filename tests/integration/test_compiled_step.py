"""The optimizer step through torch.compile: the same parameters, and no learning rate ever compiles it again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.optim import Optimizer

from tests.rig import Rig, tiny_config
from tolaria.config import Config, LRConfig, OptimConfig
from tolaria.leyline.types import SeedStage
from tolaria.mode import Mode
from tolaria.optim import compiled as compiled_module
from tolaria.tamiyo import policy as do


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that is as new before and afterwards, without processes of its own."""
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # inductor's own; taken away again afterwards
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    counters.clear()


def config_of(name: str, *, compiled: bool) -> Config:
    """Warm-up, a falling rate, a factor in conservative mode: the rate is another one at every step."""
    lr = LRConfig(policy="cosine", warmup_steps=3, seed_warmup_steps=3, conservative_factor=0.5)
    optim = OptimConfig(name=name, lr=0.02, compile_step=compiled)
    return replace(tiny_config(), optim=optim, lr=lr)


def course(rig: Rig) -> list[dict[str, Tensor]]:
    """Growth, then every kind of change that a learning rate can see; copies of all tensors on the way."""
    seen = []

    def train(steps: int = 2) -> None:
        rig.train(steps)
        seen.append({name: tensor.clone() for name, tensor in rig.state.tensors().items()})

    rig.grow("early", SeedStage.TRAINING)
    train()
    with torch.compiler.set_stance("fail_on_recompile"):
        commands = (do.set_lr("host", 0.01), do.scale_lr("seed/*", 0.5), do.freeze("seed/*"), do.thaw("*"),
                    do.freeze("host"), do.freeze("*"), do.undo(), do.undo(), do.undo())  # fmt: skip
        for command in commands:
            (outcome,) = rig.boundary(command).outcomes
            assert outcome.applied, outcome
            train()
        rig.state.mode = Mode(conservative=True, reason="test")
        train()
        rig.state.lr.rewarm(rig.state.step, 3)
        train(4)
        memento = rig.state.memento()
        train()
        rig.state.restore(memento)
        train()
    return seen


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_no_change_of_a_rate_compiles_again_and_parameters_equal_those_of_the_plain_step(
    name: str, tmp_path: Path
) -> None:
    courses = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        with Rig.build(folder, config=config_of(name, compiled=compiled)) as rig:
            courses.append(course(rig))
            rates = [group["lr"] for group in rig.state.optimizer.param_groups]
            assert all(isinstance(rate, Tensor) == compiled for rate in rates)
            assert rig.told("lr_violation") == []
    assert graphs() >= 2
    for plain, compiled_ in zip(*courses, strict=True):
        assert plain.keys() == compiled_.keys()
        for key, tensor in plain.items():
            torch.testing.assert_close(compiled_[key], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_growth_and_cull_compile_the_steps_of_new_groups_and_of_no_other(tmp_path: Path) -> None:
    with Rig.build(tmp_path, config=config_of("adamw", compiled=True)) as rig:
        rig.replica.warm_up(rig.sample)  # with a stand-in
        before = graphs()
        rig.train(2)
        assert graphs() == before + 1
        for slot in ("early", "late"):
            before = graphs()
            rig.grow(slot, SeedStage.TRAINING)
            rig.boundary(do.set_optimizer("*", clip_norm=0.5 if slot == "early" else 0.7))
            rig.train(2)
            assert graphs() == before + 1
        with torch.compiler.set_stance("fail_on_recompile"):
            rig.boundary(do.cull("early"))
            rig.train(2)
        assert {name.split("/")[1] for name in rig.state.tensors() if name.startswith("seed/")} == {"late"}


def test_another_hyperparameter_compiles_its_group_again_and_takes_effect(tmp_path: Path) -> None:
    ends = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        with Rig.build(folder, config=config_of("sgd", compiled=compiled)) as rig:
            rig.replica.warm_up(rig.sample)
            rig.train(2)
            before = graphs()
            assert rig.boundary(do.set_optimizer("host", weight_decay=0.1)).outcomes[0].applied
            rig.train(2)
            assert graphs() - before == compiled
            ends.append({name: tensor.clone() for name, tensor in rig.state.tensors().items()})
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=1e-4, atol=1e-6)


def test_a_compiled_run_saves_and_loads_what_a_plain_one_does(tmp_path: Path) -> None:
    with Rig.build(tmp_path, config=config_of("sgd", compiled=True)) as rig:
        rig.train(3)
        meta = rig.state.meta()
        assert json.loads(json.dumps(meta)) == meta  # no rate in it that is a tensor
        tensors = {name: tensor.clone() for name, tensor in rig.state.tensors().items()}
        rig.train(2)
        ends = rig.state.digest()
        rig.state.load(tensors, meta)
        with torch.compiler.set_stance("fail_on_recompile"):
            rig.train(2)
        assert rig.state.digest() == ends
    (tmp_path / "resumed").mkdir()
    with Rig.build(tmp_path / "resumed", config=config_of("sgd", compiled=True)) as resumed:
        resumed.state.load(tensors, meta)
        resumed.replica.rebuild(first=True)
        resumed.train(2)
        assert resumed.state.digest() == ends


def test_a_step_that_can_not_be_compiled_is_taken_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(optimizer: Optimizer) -> None:
        raise RuntimeError("no compiler here")

    ends = []
    for name in ("compiled", "plain"):
        (tmp_path / name).mkdir()
        with Rig.build(tmp_path / name, config=config_of("sgd", compiled=name == "compiled")) as rig:
            if name == "compiled":
                monkeypatch.setattr(compiled_module, "_step", fail)
            rig.replica.warm_up(rig.sample)
            assert rig.replica.compiled_step is None
            told = [event["reason"] for event in rig.told("compile_fallback")]
            assert told == (["RuntimeError: no compiler here"] if name == "compiled" else [])
            rig.train(3)
            ends.append({n: tensor.clone() for n, tensor in rig.state.tensors().items()})
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=1e-5, atol=1e-7)
