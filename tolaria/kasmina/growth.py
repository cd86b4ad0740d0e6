"""How a seed is made, and which form a stage gives it: functions of blueprint, slot and configuration."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from tolaria.config import KasminaConfig
from tolaria.errors import CommandRefused
from tolaria.kasmina.blueprints import get_blueprint
from tolaria.kasmina.lifecycle import HOLDS_SEED
from tolaria.kasmina.seed import Seed
from tolaria.kasmina.slot import Active, Blend, Frozen, StraightThrough
from tolaria.leyline.types import SeedStage

GRAFT_PARAMETERS = ("blend_steps",)


def build_seed(
    blueprint_id: str, slot: str, shape: tuple[int, ...], *, run_seed: int, command_id: str, device: torch.device
) -> nn.Module:
    """The blueprint's module for a slot of per-sample ``shape``, made on the CPU and moved to ``device``.

    Its weights depend only on run seed and command id, so they are the same on every rank; no global generator moves.
    Raises CommandRefused for an unknown blueprint, a shape it does not take or keep, or one that fails.
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
            with torch.no_grad():
                out_shape = tuple(module(torch.zeros(2, *shape)).shape[1:])
            module = module.to(device)
        except Exception as error:  # the user's code, or a device without room: the run must outlive it
            raise CommandRefused("blueprint_failed", f"blueprint {blueprint_id!r}: {error}") from error
    if out_shape != shape:
        raise CommandRefused("shape", f"blueprint {blueprint_id!r} maps {shape} to {out_shape}")
    return module


def form_for(seed: Seed, config: KasminaConfig) -> nn.Module | None:
    """The form that a seed's stage gives its slot; None where the host is alone."""
    if seed.module is None or seed.stage not in HOLDS_SEED:
        return None
    if seed.stage == SeedStage.TRAINING and config.signal == "straight_through":
        return StraightThrough(seed.module, config.output_ratio)
    if seed.stage == SeedStage.BLENDING:
        return Blend(seed.module, seed.alpha, config.blend)
    if seed.stage in (SeedStage.PROBATIONARY, SeedStage.FOSSILIZED):
        return (Active if learns(seed, config) else Frozen)(seed.module, config.blend)
    return None


def learns(seed: Seed, config: KasminaConfig) -> bool:
    """Whether the seed's parameters get gradients in its stage."""
    if seed.stage == SeedStage.PROBATIONARY:
        return seed.fine_tuning
    if seed.stage == SeedStage.FOSSILIZED:
        return not config.freeze_fossilized
    return seed.stage in (SeedStage.TRAINING, SeedStage.BLENDING)


def check_graft_parameters(parameters: Mapping[str, float]) -> None:
    """Raise CommandRefused for a parameter that START_GRAFTING does not know or a value out of range."""
    unknown = sorted(set(parameters) - set(GRAFT_PARAMETERS))
    if unknown:
        raise CommandRefused("unknown_parameter", f"START_GRAFTING takes {GRAFT_PARAMETERS}, not {unknown}")
    steps = parameters.get("blend_steps", 1.0)
    if not (1 <= steps <= 1_000_000 and float(steps).is_integer()):
        raise CommandRefused("bad_parameter", f"blend_steps={steps}: expected a whole number from 1 to 1000000")
