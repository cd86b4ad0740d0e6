"""Does growing pay? The digits run three ways, side by side for every run seed.

    host     the small host alone
    grown    the same host, grown by the heuristic policy while it trains
    large    a host of the grown size from the start: the seeds that "grown" kept, in place from step 0

All three train for the same number of epochs on the same data in the same order; sides are interleaved seed by seed.
One process and the batch of two ranks, eager, so that compile time is in nobody's figures.

    python benchmarks/growth.py            5 run seeds
    python benchmarks/growth.py --quick    2 run seeds
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from tolaria.build import train
from tolaria.config import Config
from tolaria.kasmina.blueprints import get_blueprint
from tolaria.kasmina.slot import Active, attach
from tolaria.options import resolve
from tolaria.task import Task
from tolaria.tasks import digits

CONFIG = Path(__file__).resolve().parent.parent / "launch" / "configs" / "digits.toml"
SIDES = ("host", "grown", "large")


@dataclass(frozen=True)
class Result:
    """One run: final validation, parameters at the end, wall time, and the slots that kept a seed."""

    side: str
    run_seed: int
    accuracy: float
    loss: float
    parameters: int
    seconds: float
    kept: dict[str, str]


class _Grown(nn.Module):
    """A host with seeds built into its slots from the start."""

    def __init__(self, host: nn.Module, seeds: dict[str, nn.Module]) -> None:
        super().__init__()
        self.host = host
        self.seeds = nn.ModuleDict(seeds)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.host(images)
        return logits


def make_large_task(width: int, kept: dict[str, str]) -> Task:
    """The digits task with the blueprints of ``kept`` (slot -> blueprint) active in the host from step 0."""
    task = digits.make_task(width=width)
    shapes: dict[str, tuple[int, ...]] = {}
    seeds: dict[str, nn.Module] = {}
    for name, blueprint in kept.items():
        module = task.model.get_submodule(task.slots[name])
        handle = module.register_forward_hook(
            lambda _m, _a, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:]))
        )
        task.model(torch.zeros(1, 1, 8, 8))
        handle.remove()
        seeds[name] = get_blueprint(blueprint).build(shapes[name])
        slot, _ = attach(task.model, name, task.slots[name])
        slot.form = Active(seeds[name], "residual")
    return replace(task, model=_Grown(task.model, seeds), slots={})


def run_side(side: str, run_seed: int, config: Config, kept: dict[str, str]) -> Result:
    """Train one side and return its figures."""
    policy = replace(config.tamiyo, policy="heuristic" if side == "grown" else "none",
                     args=config.tamiyo.args if side == "grown" else {})  # fmt: skip
    config = replace(config, tamiyo=policy, run=replace(config.run, seed=run_seed))
    width = int(config.task.args["width"])
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, root=folder), task=replace(config.task, args={}))
        start = time.perf_counter()
        summary = train(
            config, task=lambda: make_large_task(width, kept) if side == "large" else digits.make_task(width)
        )
        seconds = time.perf_counter() - start
    if summary.final is None:
        raise RuntimeError(f"{side}, run seed {run_seed}: the run ended without a validation")
    found = {s.slot: s.blueprint for s in summary.seeds if s.stage == "FOSSILIZED"}
    return Result(side, run_seed, summary.final.accuracy, summary.final.loss, summary.parameters_end, seconds, found)


def table(results: list[Result]) -> str:
    """Mean and standard deviation of each side."""
    lines = [f"{'side':<7}{'accuracy':>18}{'val loss':>18}{'parameters':>13}{'seconds':>16}"]
    for side in SIDES:
        mine = [r for r in results if r.side == side]
        accuracy, loss = [r.accuracy * 100 for r in mine], [r.loss for r in mine]
        seconds, parameters = [r.seconds for r in mine], statistics.mean(r.parameters for r in mine)
        lines.append(
            f"{side:<7}{_spread(accuracy, '.1f'):>16} %{_spread(loss, '.3f'):>18}{parameters:>13,.0f}"
            f"{_spread(seconds, '.1f'):>16}"
        )
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {deviation:{form}}"


def main() -> int:
    """Run all sides for every run seed and print the table."""
    parser = argparse.ArgumentParser(description="Digits: small host, grown host, host of the grown size.")
    parser.add_argument("--seeds", type=int, default=5, help="run seeds (default: 5)")
    parser.add_argument("--quick", action="store_true", help="2 run seeds")
    parser.add_argument("--json", type=Path, help="write every run's figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flags = ["--config", str(CONFIG), "--compile.enabled", "false", "--train.batch_size", "64",
             "--log.progress", "off", "--checkpoint.every", "0", "--dist.threads", "1"]  # fmt: skip
    config = resolve(flags, environment={})
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread")
    results: list[Result] = []
    for run_seed in range(2 if options.quick else options.seeds):
        kept: dict[str, str] = {}
        for side in SIDES:
            results.append(run_side(side, run_seed, config, kept))
            last = results[-1]
            kept = last.kept if side == "grown" else kept
            print(f"seed {run_seed}  {side:<6} {last.accuracy:6.1%}  {last.parameters:>6,} parameters  "
                  f"{last.seconds:5.1f} s", flush=True)  # fmt: skip
    print(f"\n{table(results)}")
    if options.json is not None:
        record = {
            "date": datetime.now(UTC).isoformat(),
            "torch": torch.__version__,
            "runs": [asdict(r) for r in results],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
