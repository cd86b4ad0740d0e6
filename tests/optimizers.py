"""Optimizers for tests: every class by name, parameters by name, gradients that depend on name and step alone."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rig import same_bits
from tolaria.config import OPTIMIZERS, OptimConfig
from tolaria.optim.persist import group_options, state_scalars, state_tensors
from tolaria.optim.rebuild import Groups, build_optimizer

CPU = torch.device("cpu")
OWN = "tests.optimizers:Counting"
EVERY = (*OPTIMIZERS, OWN, "torch.optim:Rprop", "torch.optim:Adamax", "torch.optim:RAdam", "torch.optim:Adafactor")
"""Names of optimizers: torch's that have a name of their own, one whose state is numbers too, torch's by path."""
Members: TypeAlias = dict[str, dict[str, nn.Parameter]]
"""Group name -> parameter name -> parameter, of one's own."""


class Counting(Optimizer):
    """A user's own: sign descent on a running mean. Its state is a tensor, a whole number, a fraction and a word."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(mean=torch.zeros_like(parameter), count=0, trust=1.0, phase="warm")
                state["count"] += 1
                state["trust"] = state["trust"] / 3 + 0.1
                state["phase"] = "warm" if state["count"] < 3 else "hot"
                state["mean"].mul_(group["momentum"]).add_(parameter.grad)
                rate = group["lr"] * state["trust"] * (2.0 if state["phase"] == "hot" else 1.0) / state["count"]
                parameter.sub_(rate * state["mean"].sign())


def make(shapes: Mapping[str, Mapping[str, tuple[int, ...]]], dtype: torch.dtype = torch.float32) -> Members:
    """Parameters of these shapes, group -> name -> parameter; the same values for the same name and shape."""
    return {
        group: {name: nn.Parameter(_drawn(name, 0, shape, dtype)) for name, shape in members.items()}
        for group, members in shapes.items()
    }


def build(name: str, groups: Groups, **settings: float) -> Optimizer:
    """The optimizer of a name over these groups."""
    return build_optimizer(OptimConfig(name=name, **{"lr": 0.01, **settings}), groups, CPU)  # type: ignore[arg-type]


def train(optimizer: Optimizer, groups: Groups, steps: Iterable[int], frozen: Iterable[str] = ()) -> None:
    """Take steps of these numbers; the groups that are ``frozen`` get no gradients."""
    for step in steps:
        for group, members in groups.items():
            for name, parameter in members.items():
                shape, dtype = tuple(parameter.shape), parameter.dtype
                parameter.grad = None if group in frozen else gradient(name, step, shape, dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def gradient(name: str, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `train` takes for the gradient of a parameter in a step."""
    return _drawn(name, step + 1, shape, dtype)


def _drawn(name: str, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(f"{name}/{number}").getrandbits(60))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def held(optimizer: Optimizer) -> dict[str, Any]:
    """Copies of all that an optimizer holds: parameters, state, options."""
    parameters = {
        f"parameter {name}": parameter.detach().clone()
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    state = {name: tensor.clone() for name, tensor in state_tensors(optimizer).items()}
    return {**parameters, **state, **state_scalars(optimizer), "options": group_options(optimizer)}


def of_group(everything: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The part of what is `held` that is of these parameters."""
    names = set(names)
    return {key: value for key, value in everything.items() if _owner(key) in names}


def _owner(key: str) -> str:
    return key.removeprefix("parameter ") if key.startswith("parameter ") else key.rpartition("/")[0]


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys that only one has, or whose values are not the same bit for bit, type for type."""
    shared = one.keys() & other.keys()
    return sorted({*(one.keys() ^ other.keys()), *(key for key in shared if _differ(one[key], other[key]))})


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not same_bits(one, other)
    return type(one) is not type(other) or one != other


class Injected(RuntimeError):
    """The fault that `failing_at` injects."""


class _Failing(TorchDispatchMode):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, unless it is the one to fail."""
        self.left -= 1
        if self.left < 0:
            raise Injected(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def failing_at(number: int) -> Iterator[None]:
    """Every operation on a tensor within the block fails from number ``number`` on, counted from 0."""
    with _Failing(number):
        yield
