"""Validation compiled: when, apart from training, with the same numbers, and eager when that fails.

Inductor is replaced by a backend that counts; what calls it, dynamo with its guards and limits, is the real one.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from tests.rig import Rig, tiny_config, way
from tolaria import validation
from tolaria.config import DataConfig
from tolaria.leyline.types import SeedStage
from tolaria.measure import TRAIN_METERS, Report
from tolaria.telemetry.meters import Meters


class Compiler:
    """What stands in for inductor: counts its graphs, and fails when told to."""

    def __init__(self) -> None:
        self.graphs = 0
        self.fails = False

    def __call__(self, graph: Any, inputs: Any, **_: Any) -> Any:
        if self.fails:
            raise RuntimeError("no toolchain on this machine")
        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    torch._dynamo.reset()
    counting = Compiler()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", counting)
    yield counting
    torch._dynamo.reset()


def build(folder: Path, choice: str = "on", *, compiled: bool = True, **task: Any) -> Rig:
    """A rig whose validation has 6 batches of two, the last one filled up."""
    config = tiny_config(compiled=compiled, embargo_boundaries=0, blend_steps=2)
    chosen = replace(config.compile, validation=choice)
    config = replace(config, compile=chosen, data=DataConfig(validation_batch_size=2))
    folder.mkdir(exist_ok=True)
    rig = Rig.build(folder, config=config, **task)
    rig.replica.warm_up(rig.sample)
    return rig


def measure(rig: Rig) -> Report:
    return rig.evaluator.measure(Meters(TRAIN_METERS))


def test_it_is_compiled_once_and_training_is_not_compiled_again(tmp_path: Path, compiler: Compiler) -> None:
    with build(tmp_path) as rig:
        rig.evaluator.rehearse()
        warm = compiler.graphs
        assert rig.evaluator.forward.compiled
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                rig.train(2)
                measure(rig)
                assert rig.evaluator.forward.compiled
        assert compiler.graphs == warm


def test_its_numbers_are_those_of_eager_and_nothing_else_changes(tmp_path: Path, compiler: Compiler) -> None:
    reports, digests = [], []
    for choice in ("on", "off"):
        with build(tmp_path / choice, choice, dropout=0.2, batch_norm=True) as rig:
            rig.train(3)
            reports.append(measure(rig))
            rig.train(3)  # random streams and running statistics are where they were
            digests.append(rig.state.digest())
            assert rig.evaluator.forward.compiled == (choice == "on")
    compiled, eager = reports
    assert (compiled.val_loss, compiled.val_accuracy) == pytest.approx((eager.val_loss, eager.val_accuracy), rel=1e-6)
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("choice", "batches", "compiled"), [("auto", 6, True), ("auto", 7, False), ("off", 1, False), ("on", 100, True)]
)
def test_by_itself_only_a_long_validation_is_compiled(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, choice: str, batches: int, compiled: bool
) -> None:
    monkeypatch.setattr(validation, "MIN_BATCHES", batches)
    with build(tmp_path, choice) as rig:
        measure(rig)
        assert rig.evaluator.forward.compiled == compiled


def test_without_compilation_there_is_none_in_validation(tmp_path: Path, compiler: Compiler) -> None:
    with build(tmp_path, compiled=False) as rig:
        measure(rig)
        assert (compiler.graphs, rig.evaluator.forward.compiled) == (0, False)


def test_a_seed_on_its_way_is_validated_eager_and_one_that_stays_compiled_again(
    tmp_path: Path, compiler: Compiler
) -> None:
    with build(tmp_path) as rig:
        measure(rig)
        rig.train(2)
        seen = []
        for stage, command in way("early", "low_rank"):
            assert rig.boundary(command).outcomes[0].applied
            rig.train(4)
            graphs = compiler.graphs
            measure(rig)
            seen.append((stage, rig.evaluator.forward.compiled, compiler.graphs - graphs))
        assert seen[:-1] == [(stage, False, 0) for stage, _ in way("early", "low_rank")[:-1]]
        assert seen[-1] == (SeedStage.FOSSILIZED, True, 1)


def test_a_failure_to_compile_is_an_event_and_training_stays_compiled(tmp_path: Path, compiler: Compiler) -> None:
    with build(tmp_path) as rig:
        compiler.fails = True
        report = measure(rig)
        assert report.val_loss > 0
        (told,) = rig.told("compile_fallback")
        assert told["part"] == "validation" and "no toolchain" in told["reason"]
        measure(rig)
        assert (rig.replica.compiled, rig.evaluator.forward.compiled) == (True, False)
        assert len(rig.told("compile_fallback")) == 1
