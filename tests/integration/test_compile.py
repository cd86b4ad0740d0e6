"""What is compiled when: once for each structure, never for a new alpha, and beyond the limit no more.

Inductor is replaced by a backend that counts; what calls it, dynamo with its guards and limits, is the real one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from tests.rig import Rig, tiny_config, way
from tolaria.config import CompileConfig
from tolaria.kasmina.blueprints import register_blueprint
from tolaria.leyline.types import SeedStage
from tolaria.tamiyo import policy as do
from tolaria.telemetry.events import read_events

SLOT = "early"


@dataclass
class Compiler:
    """Graphs compiled, and calls of compiled graphs."""

    graphs: int = 0
    calls: int = 0

    def __call__(self, graph: Any, inputs: Any, **_: Any) -> Callable[..., Any]:
        """What stands in for inductor."""
        self.graphs += 1
        run = aot_eager(graph, inputs)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return run(*args)

        return counted


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    torch._dynamo.reset()
    counters.clear()
    counting = Compiler()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", counting)
    yield counting
    torch._dynamo.reset()


def build(folder: Path, *, structure_limit: int = 64, blend_steps: int = 2) -> Rig:
    """A compiled rig whose first structure is warm."""
    config = tiny_config(compiled=True, embargo_boundaries=0, blend_steps=blend_steps)
    rig = Rig.build(folder, config=replace(config, compile=CompileConfig(structure_limit=structure_limit)))
    rig.replica.warm_up(rig.sample)
    return rig


class Perceptron(nn.Module):
    """A seed of some width."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, width)
        self.down = nn.Linear(width, features)

    def forward(self, h: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        down: Tensor = self.down(torch.relu(self.up(h)))
        return down


WIDTHS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    f"perceptron-{width}": lambda shape, width=width: Perceptron(shape[0], width)  # type: ignore[misc]
    for width in range(1, 5)
}


def command(rig: Rig, *commands: Any) -> None:
    """A boundary at which these commands are applied, and two steps after it."""
    outcomes = rig.boundary(*commands).outcomes
    assert all(outcome.applied for outcome in outcomes), outcomes
    rig.train(2)


def grow(rig: Rig, blueprint: str, to: SeedStage = SeedStage.BLENDING) -> None:
    """A seed in the DORMANT slot, up to a stage."""
    for stage, step in way(SLOT, blueprint):
        command(rig, step)
        if stage == to:
            return


def clear(rig: Rig) -> None:
    """Cull the seed, and wait until the slot is DORMANT."""
    command(rig, do.cull(SLOT))
    while rig.state.kasmina.seeds[SLOT].stage != SeedStage.DORMANT:
        command(rig)


def fallbacks(rig: Rig) -> list[str]:
    return [event["reason"] for event in read_events(rig.events_path, "compile_fallback")]


def test_alpha_moves_without_a_recompile(compiler: Compiler, tmp_path: Path) -> None:
    with build(tmp_path, blend_steps=6) as rig:
        rig.train(2)
        grow(rig, "low_rank")
        seed = rig.state.kasmina.seeds[SLOT]
        graphs, calls, alphas = compiler.graphs, compiler.calls, [seed.alpha_value]
        for _ in range(6):
            rig.train()
            alphas.append(seed.alpha_value)
        assert len(set(alphas)) == 5 and alphas[-1] == 1.0
        assert (compiler.graphs, compiler.calls) == (graphs, calls + 6)
        assert fallbacks(rig) == []


def test_each_structure_is_compiled_once_and_coming_back_to_it_costs_nothing(
    compiler: Compiler, tmp_path: Path
) -> None:
    with build(tmp_path) as rig:
        rig.train(2)
        graphs = {"host": compiler.graphs}

        def note(what: str, action: Callable[..., None], *arguments: Any) -> None:
            before = compiler.graphs
            action(rig, *arguments)
            graphs[what] = compiler.graphs - before

        steps = {stage.name: step for stage, step in way(SLOT, "low_rank")}
        for stage in ("GERMINATED", "TRAINING", "BLENDING"):
            note(stage, command, steps[stage])
        note("CULLED", clear)
        note("again", grow, "low_rank")
        note("SHADOWING", command, steps["SHADOWING"])
        note("PROBATIONARY", command, steps["PROBATIONARY"])
        note("fine-tuned", command, do.fine_tune(SLOT))
        note("FOSSILIZED", command, steps["FOSSILIZED"])
        assert graphs == {
            "host": 1, "GERMINATED": 0, "TRAINING": 1, "BLENDING": 1, "CULLED": 0, "again": 0,
            "SHADOWING": 0, "PROBATIONARY": 1, "fine-tuned": 1, "FOSSILIZED": 0,
        }  # fmt: skip
        assert counters["stats"]["unique_graphs"] == compiler.graphs
        assert fallbacks(rig) == []


def test_what_runs_already_is_not_tried_again(compiler: Compiler, tmp_path: Path) -> None:
    with build(tmp_path) as rig:
        rig.train(2)
        command(rig, do.germinate(SLOT, "low_rank"))
        calls = compiler.calls
        assert rig.boundary(do.start_training(SLOT)).outcomes[0].applied
        assert compiler.calls == calls + 1  # the shadow branch alone
        rig.train(2)
        calls = compiler.calls
        assert rig.boundary(do.start_grafting(SLOT)).outcomes[0].applied
        assert compiler.calls == calls + 1  # the host with the seed in it


def test_more_than_eight_structures_in_one_slot_run_compiled(compiler: Compiler, tmp_path: Path) -> None:
    with build(tmp_path) as rig:
        rig.train(2)
        for name, make in WIDTHS.items():
            register_blueprint(name, make, ranks=[1])
            grow(rig, name)
            calls = compiler.calls
            rig.train(3)
            assert compiler.calls == calls + 3, f"{name} ran eager"
            clear(rig)
        assert compiler.graphs == 1 + 2 * len(WIDTHS) > 8
        assert rig.replica.compiled
        assert fallbacks(rig) == []


def test_training_goes_on_eager_beyond_the_limit_of_structures(compiler: Compiler, tmp_path: Path) -> None:
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    with build(tmp_path, structure_limit=8) as rig:
        rig.train(2)
        for name, make in WIDTHS.items():
            register_blueprint(name, make, ranks=[1])
            grow(rig, name)
            clear(rig)
        grow(rig, "low_rank", SeedStage.FOSSILIZED)
        calls, step = compiler.calls, rig.state.step
        before = [p.clone() for p in rig.state.host_parameters.values()]
        rig.train(3)
        assert rig.state.step == step + 3 and rig.state.skipped_steps == 0
        assert all(not torch.equal(p, b) for p, b in zip(rig.state.host_parameters.values(), before, strict=True))
        assert (compiler.graphs, compiler.calls) == (8, calls)
        assert fallbacks(rig) == ["more structures than compile.structure_limit=8"]
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit) == limits
    again = torch.compile(lambda x: x + 1, backend=compiler)
    again(torch.zeros(2))
    assert compiler.graphs == 9  # the eager stance ended with the run


def test_a_backend_that_fails_leaves_the_run_as_an_eager_one(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no compiler on this machine")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    digests = []
    for name in ("compiled", "eager"):
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_config(compiled=name == "compiled")
        with Rig.build(folder, config=config) as rig:
            rig.replica.warm_up(rig.sample)
            rig.train(3)
            digests.append(rig.state.digest())
            if name == "compiled":
                (reason,) = fallbacks(rig)
                assert "no compiler on this machine" in reason
    assert digests[0] == digests[1]


def test_measuring_what_could_grow_compiles_nothing(tmp_path: Path, compiler: Compiler) -> None:
    with build(tmp_path) as rig:
        rig.train(2)
        before = compiler.graphs, compiler.calls
        measured = rig.evaluator.signal.measure()
        assert measured["early"]["signal/low_rank"] > 0
        assert rig.evaluator.cost.flops()
        assert (compiler.graphs, compiler.calls) == before
        rig.train(2)
        assert compiler.graphs == before[0] and compiler.calls > before[1]
