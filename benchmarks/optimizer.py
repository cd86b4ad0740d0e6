"""What do learning rates and optimizer surgery cost at a boundary, and every step?

    rates           LRController.apply: the rates of all groups, each checked against what was left there
    add             regroup with one group of 33,000 parameters more, and with it gone again ("remove")
    rebuild         regroup of all groups in another order: nothing is copied
    grow            every matrix gets one more row: all state is copied to new memory; "copy" is that alone
    to sgd, nadam   another optimizer class: state begins anew, or is carried

Optimizers hold state of steps that were taken. One process, one thread, times in milliseconds; p99 is the largest of
fewer than 100 repeats.

    python benchmarks/optimizer.py            3.4 and 25 million parameters, 10 and 100 groups
    python benchmarks/optimizer.py --quick    0.3 million, 10 groups, few repeats
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import nn
from torch.optim import Optimizer

from tolaria.config import LRConfig, OptimConfig
from tolaria.optim.lr import LRController
from tolaria.optim.persist import state_tensors
from tolaria.optim.rebuild import build_optimizer, regroup
from tolaria.optim.surgery import change_class

CPU = torch.device("cpu")
PER_GROUP = 4  # parameters in a group: matrices, as in a layer
BUDGET_MS = {"rates": 2.0, "add": 20.0, "remove": 20.0, "rebuild": 100.0, "to sgd": 100.0, "to nadam": 100.0}


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    parameters: tuple[float, ...]
    groups: tuple[int, ...]
    repeats: int


def main() -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.3 million parameters, 10 groups, few repeats")
    quick = parser.parse_args().quick
    extent = Extent((0.3e6,), (10,), 5) if quick else Extent((3.4e6, 25e6), (10, 100), 50)
    torch.set_num_threads(1)
    _say(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, one thread, {extent.repeats} repeats, ms\n"
    )
    _say(f"{'what':<34}{'budget':>12}{'median':>10}{'p99':>10}")
    for groups in extent.groups:
        _say_row(f"rates, {groups} groups", *_rates(groups, 100 * extent.repeats), budget=_budget("rates", groups))
    for name in ("adamw", "adagrad"):
        for parameters in extent.parameters:
            for groups in extent.groups:
                _surgery(name, parameters, groups, extent.repeats)
    return 0


def _rates(groups: int, repeats: int) -> tuple[float, float]:
    names = ["host", *(f"seed/{n}" for n in range(groups - 1))]
    controller = LRController(LRConfig(warmup_steps=10), 0.1, 2 * repeats)
    entries = []
    for name in names:
        controller.add_group(name, "host" if name == "host" else "seed", 5)
        entries.append({"params": [nn.Parameter(torch.zeros(1))], "name": name})
    optimizer = torch.optim.SGD(entries, lr=0.1)
    times = [_timed(lambda step=step: controller.apply(optimizer, step)) for step in range(repeats)]
    if controller.tampered:
        raise SystemExit("the controller took its own rates for somebody else's")
    return _summary(times)


def _surgery(name: str, parameters: float, count: int, repeats: int) -> None:
    optimizer, groups = _trained(name, parameters, count)
    more = {**groups, "seed/more": _members("seed/more", 91)}
    _step(enlarged := regroup(optimizer, more), [more["seed/more"]])
    rows = {
        g: {n: nn.Parameter(torch.zeros(p.shape[0] + 1, p.shape[1])) for n, p in m.items()} for g, m in groups.items()
    }
    state = list(state_tensors(optimizer).values())
    sides: dict[str, Callable[[], object]] = {
        "add": lambda: regroup(optimizer, more),
        "remove": lambda: regroup(enlarged, groups, dropped=more["seed/more"]),
        "rebuild": lambda: regroup(optimizer, dict(reversed(groups.items()))),
        "copy": lambda: [tensor.clone() for tensor in state],
        "grow": lambda: regroup(optimizer, rows),
        "to sgd": lambda: change_class(optimizer, OptimConfig(name="sgd")),
        "to nadam": lambda: change_class(optimizer, OptimConfig(name="nadam")),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, work in sides.items():
            times[side].append(_timed(work))
    medians = {side: statistics.median(values) for side, values in times.items()}
    size = sum(tensor.nbytes for tensor in state) / 1e6
    _say(f"\n{name}, {parameters / 1e6:g} M parameters in {count} groups, {size:.0f} MB of state")
    for side, values in times.items():
        budget = f"100+{medians['copy']:.0f}" if side == "grow" else _budget(side, count)
        _say_row(f"  {side}", *_summary(values), budget=budget)


def _trained(name: str, parameters: float, count: int) -> tuple[Optimizer, dict[str, dict[str, nn.Parameter]]]:
    width = round((parameters / count / PER_GROUP) ** 0.5)
    names = ["host", *(f"seed/{n}" for n in range(count - 1))]
    groups = {group: _members(group, width) for group in names}
    optimizer = build_optimizer(OptimConfig(name=name), groups, CPU)
    _step(optimizer, list(groups.values()))
    return optimizer, groups


def _members(group: str, width: int) -> dict[str, nn.Parameter]:
    return {f"{group}/{n}": nn.Parameter(torch.randn(width, width)) for n in range(PER_GROUP)}


def _with_a_row_more(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.zeros(parameter.shape[0] + 1, parameter.shape[1]))


def _step(optimizer: Optimizer, members: list[dict[str, nn.Parameter]]) -> None:
    for each in members:
        for parameter in each.values():
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _summary(times: list[float]) -> tuple[float, float]:
    return statistics.median(times), sorted(times)[min(len(times) - 1, round(0.99 * len(times)))]


def _budget(side: str, groups: int) -> str:
    if side == "rates" and groups == 10:
        return "2, goal 0.05"
    return f"{BUDGET_MS[side]:g}" if side in BUDGET_MS else ""


def _say_row(what: str, median: float, p99: float, *, budget: str) -> None:
    _say(f"{what:<34}{budget:>12}{median:>10.3f}{p99:>10.3f}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
