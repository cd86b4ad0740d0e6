"""What could grow in a slot: blueprints with what they cost, and the gradient that a new seed of each would get.

At birth a seed's output is zero, so the loss moves with its parameters as ``J_f(h)^T v``: h is what flows through the
slot, v the gradient of the loss there. One forward and backward pass of the host serves every candidate of every slot.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from tolaria.config import KasminaConfig
from tolaria.errors import CommandRefused, ConfigError, TaskError
from tolaria.kasmina.blueprints import BUILT_IN, Blueprint, blueprint_names, get_blueprint
from tolaria.kasmina.flops import count_flops
from tolaria.kasmina.gates import GateResult
from tolaria.kasmina.growth import build_seed, size_of
from tolaria.task import users_code

MAX_CANDIDATES = 8
"""Candidates of one slot that a policy is told of: with three numbers each, and room for others of the slot."""

Passed = Sequence[tuple[Tensor, Tensor]]
"""What went through a slot in a pass, call by call: (h, v), the value and the gradient of the loss there."""


@dataclass(frozen=True)
class Candidate:
    """A blueprint at one shape. ``flops``: of one sample's forward pass, None where they cannot be counted."""

    blueprint: str
    parameters: int
    flops: int | None


@dataclass(frozen=True)
class Description:
    """What a blueprint is and costs in a slot of one shape. ``flops``: see `Candidate`; the texts: see `Blueprint`."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    flops: int | None
    summary: str
    init: str
    use: str


def describe_blueprint(name: str, shape: Sequence[int]) -> Description:
    """A blueprint in a slot of per-sample ``shape``: it is built once, and thrown away.

    Local. Raises CommandRefused, as GERMINATE would, for an unknown name, or a shape that it does not take.
    """
    blueprint, shape = get_blueprint(name), tuple(shape)
    module = newborn(name, shape, run_seed=0, device=torch.device("cpu"))
    parameters = sum(p.numel() for p in module.parameters())
    return Description(
        name, shape, parameters, forward_flops(module, shape), blueprint.summary, blueprint.init, blueprint.use
    )


def flops_of(name: str, shape: Sequence[int]) -> int | None:
    """Operations of a seed's forward pass over one sample; None where they cannot be counted. Local."""
    return _flops(get_blueprint(name), tuple(shape))


@lru_cache(maxsize=256)
def _flops(blueprint: Blueprint, shape: tuple[int, ...]) -> int | None:
    try:
        return describe_blueprint(blueprint.name, shape).flops
    except CommandRefused:  # a blueprint may refuse to be built a second time
        return None


def chosen_names(config: KasminaConfig) -> tuple[str, ...]:
    """The blueprints to be measured: those of ``kasmina.candidates``, else all, built-in ones first, then by name.

    Raises ConfigError for unknown ones, and for more than can be told.
    """
    chosen = tuple(name.strip() for name in config.candidates.split(",") if name.strip())
    known = blueprint_names()
    unknown = sorted(set(chosen) - set(known))
    if unknown or len(chosen) > MAX_CANDIDATES:
        wrong = f"unknown {', '.join(unknown)}; known are {', '.join(known)}" if unknown else f"{len(chosen)} names"
        raise ConfigError(f"kasmina.candidates={config.candidates!r}: {wrong}; expected at most {MAX_CANDIDATES} known")
    return chosen or tuple(sorted(known, key=lambda name: (name not in BUILT_IN, name)))


def candidates_for(
    shape: tuple[int, ...], config: KasminaConfig, room: Callable[[int], GateResult]
) -> list[Candidate]:  # fmt: skip
    """The blueprints that GERMINATE would accept at a slot of this per-sample shape, as `chosen_names` orders them; the
    first `MAX_CANDIDATES`. ``room``: the word of gate G0 on so many parameters. What cannot be built is left out."""
    found = []
    for name in chosen_names(config):
        blueprint = get_blueprint(name)
        if len(shape) not in blueprint.ranks:
            continue
        known = _known(blueprint, shape, config.max_seed_parameters, config.signal == "straight_through")
        if known is not None and room(known.parameters).ok:
            found.append(known)
    return found[:MAX_CANDIDATES]


@lru_cache(maxsize=256)
def _known(blueprint: Blueprint, shape: tuple[int, ...], most: int, silent: bool) -> Candidate | None:
    parameters = size_of(blueprint.name, shape)
    if parameters is not None and parameters > most:
        return None  # not built to be thrown away: it may be larger than the host
    try:
        module = newborn(blueprint.name, shape, run_seed=0, device=torch.device("cpu"), silent=silent)
    except CommandRefused:
        return None
    return Candidate(blueprint.name, sum(p.numel() for p in module.parameters()), forward_flops(module, shape))


def forward_flops(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Operations of a seed's forward pass over one sample; the module is on the CPU. None where torch cannot tell."""
    try:
        with torch.random.fork_rng(devices=[]), users_code("counting FLOPs"):
            return count_flops(lambda: module(torch.zeros(2, *shape))) // 2
    except TaskError:
        return None


def newborn(
    blueprint: str, shape: tuple[int, ...], *, run_seed: int, device: torch.device, silent: bool = False
) -> nn.Module:
    """A seed to be measured and thrown away; the same weights at every boundary, so that boundaries compare."""
    return build_seed(
        blueprint, "the slot", shape, run_seed=run_seed, command_id=f"signal/{blueprint}", device=device, silent=silent
    )


def birth_gradient(
    seed: nn.Module, passed: Passed, autocast: Callable[[], AbstractContextManager[object]]
) -> Tensor:  # fmt: skip
    """The gradient of a newborn seed's parameters, flat, float32; zero where the loss does not depend on one."""
    parameters = list(seed.requires_grad_().parameters())
    total = torch.cat([torch.zeros_like(p, dtype=torch.float32).flatten() for p in parameters])
    for h, v in passed:
        with autocast():
            f: Tensor = seed(h).to(h.dtype)
        gradients = torch.autograd.grad(f, parameters, grad_outputs=v, materialize_grads=True)
        total += torch.cat([g.flatten().float() for g in gradients])
    return total
