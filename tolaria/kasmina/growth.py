"""How a seed is made, judged, and which form a stage gives it: functions of blueprint, slot and configuration."""

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from tolaria.config import KasminaConfig
from tolaria.errors import CommandRefused, TaskError
from tolaria.kasmina import gates
from tolaria.kasmina.blueprints import get_blueprint
from tolaria.kasmina.gates import GateResult
from tolaria.kasmina.lifecycle import HOLDS_SEED, Move
from tolaria.kasmina.seed import Seed
from tolaria.kasmina.slot import Active, Blend, Frozen, StraightThrough
from tolaria.leyline.types import SeedCommand, SeedGate, SeedOp, SeedStage
from tolaria.memory_layout import lay_out
from tolaria.task import users_code

GRAFT_PARAMETERS = ("blend_steps",)


def build_seed(
    blueprint_id: str,
    slot: str,
    shape: tuple[int, ...],
    *,
    run_seed: int,
    command_id: str,
    device: torch.device,
    memory_format: torch.memory_format = torch.preserve_format,
    silent: bool = False,
) -> nn.Module:
    """The blueprint's module for a slot of per-sample ``shape``, made on the CPU, then on ``device``.

    Its weights depend only on run seed and command id, so they are the same on every rank; no global generator moves.
    Raises CommandRefused for an unknown blueprint, a shape it does not take or keep, one that fails, and with
    ``silent`` for a module that draws random numbers when it runs.
    """
    blueprint = get_blueprint(blueprint_id)
    if len(shape) not in blueprint.ranks:
        fits = ", ".join(str(r) for r in sorted(blueprint.ranks))
        raise CommandRefused("shape", f"blueprint {blueprint_id!r} takes samples of rank {fits}; {slot} has {shape}")
    digest = hashlib.sha256(f"{run_seed}/{command_id}".encode()).digest()
    # The CPU generator alone: torch.manual_seed would reseed the GPUs, and with them the host's dropout.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        try:
            module = blueprint.build(shape)
            stream = torch.get_rng_state()
            with torch.no_grad():
                out_shape = tuple(module(torch.zeros(2, *shape)).shape[1:])
            drew = not torch.equal(torch.get_rng_state(), stream)
            module = module.to(device)
            lay_out(module, memory_format)
        except Exception as error:  # the user's code, or a device without room: the run must outlive it
            raise CommandRefused("blueprint_failed", f"blueprint {blueprint_id!r}: {error}") from error
    if out_shape != shape:
        raise CommandRefused("shape", f"blueprint {blueprint_id!r} maps {shape} to {out_shape}")
    if silent and drew:
        raise CommandRefused(
            "random_stream",
            f"blueprint {blueprint_id!r} draws random numbers (dropout?), which the host's would follow with "
            "kasmina.signal=straight_through; choose shadow",
        )
    return module


def size_of(blueprint_id: str, shape: tuple[int, ...]) -> int | None:
    """Parameters of a blueprint's seed, found without memory for any; None if it needs real tensors to be built, or
    cannot be. Raises CommandRefused for an unknown name."""
    build = get_blueprint(blueprint_id).build
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), users_code("a blueprint without storage"):
            return sum(p.numel() for p in build(shape).parameters())
    except TaskError:
        return None


def form_for(seed: Seed, config: KasminaConfig) -> nn.Module | None:
    """The form that a seed's stage gives its slot; None where the host is alone."""
    if seed.module is None or seed.stage not in HOLDS_SEED:
        return None
    if seed.stage == SeedStage.TRAINING and config.signal == "straight_through":
        return StraightThrough(seed.module, config.output_ratio, seed.seam)
    if seed.stage == SeedStage.BLENDING:
        return Blend(seed.module, seed.alpha, config.blend, seed.seam)
    if seed.stage in (SeedStage.PROBATIONARY, SeedStage.FOSSILIZED):
        if not learns(seed, config):
            return Frozen(seed.module, config.blend)  # without a seam: what it would take off and put on is the same
        return Active(seed.module, config.blend, seed.seam)
    return None


def learns(seed: Seed, config: KasminaConfig) -> bool:
    """Whether the seed's parameters get gradients in its stage."""
    if seed.stage == SeedStage.PROBATIONARY:
        return seed.fine_tuning
    if seed.stage == SeedStage.FOSSILIZED:
        return not config.freeze_fossilized
    return seed.stage in (SeedStage.TRAINING, SeedStage.BLENDING)


def judge(
    found: Move, seed: Seed, config: KasminaConfig, *, room: GateResult | None, norms: list[float]
) -> GateResult | None:
    """The word of the gate before a move; None where there is no gate.

    ``room``: G0's, on what GERMINATE would plant. ``norms``: newest gradient norms of the host before TRAINING, else
    of the seed.
    """
    whose = "the host" if found.to == SeedStage.TRAINING else "the seed"
    words: dict[SeedGate, Callable[[], GateResult | None]] = {
        SeedGate.G0_SANITY: lambda: room,
        SeedGate.G1_GRADIENT_HEALTH: lambda: gates.g1_gradient_health(norms, config.gradient_window, whose),
        SeedGate.G2_STABILITY: lambda: gates.g2_stability(seed.alpha_value, seed.evidence, config),
        SeedGate.G3_INTERFACE: lambda: gates.g3_interface(seed.evidence, config),
        SeedGate.G4_SYSTEM_IMPACT: lambda: gates.g4_system_impact(seed.evidence, config),
    }
    return words[found.gate]() if found.gate is not None else None


def check_operation(payload: SeedCommand, seed: Seed) -> None:
    """Raise CommandRefused for what the table of moves can not say: fine-tuning twice, a blend of no length."""
    if payload.operation == SeedOp.FINE_TUNE and seed.fine_tuning:
        raise CommandRefused("already_fine_tuning", f"the seed in {seed.slot} is being fine-tuned already")
    _check_parameters(payload)


def _check_parameters(payload: SeedCommand) -> None:
    known = GRAFT_PARAMETERS if payload.operation == SeedOp.START_GRAFTING else ()
    unknown = sorted(set(payload.parameters) - set(known))
    if unknown:
        takes = ", ".join(known) or "no parameters"
        raise CommandRefused("unknown_parameter", f"{payload.operation.name} takes {takes}, not {', '.join(unknown)}")
    steps = payload.parameters.get("blend_steps", 1.0)
    if not (1 <= steps <= 1_000_000 and float(steps).is_integer()):
        raise CommandRefused("bad_parameter", f"blend_steps={steps}: expected a whole number from 1 to 1000000")
