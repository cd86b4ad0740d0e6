"""Which way to a step's gradients the configuration asks for."""

from tolaria.config import Config
from tolaria.dist import World
from tolaria.gradients.fused import WEIGHT_FLOOR, WEIGHT_FLOOR_FP16, ProjectedGradients, WeightedGradients
from tolaria.gradients.owners import Owners
from tolaria.gradients.sync import DdpGradients, GradientSync
from tolaria.gradients.tally import Tally
from tolaria.state import TrainState
from tolaria.telemetry.goodput import Ledger


def make_sync(state: TrainState, world: World, config: Config, tally: Tally, ledger: Ledger) -> GradientSync:
    """What produces gradients with ``aggregate.mode``."""
    mode = config.aggregate.mode
    if mode == "sum":
        return DdpGradients(state, world, config.dist.growth_bucket_mb, ledger)
    owners = Owners(state.kasmina.seeds, state.sampler, config.aggregate, world.device)
    if mode == "pcgrad":
        return ProjectedGradients(state, world, owners, tally, ledger, run_seed=config.run.seed)
    seam = next(iter(state.kasmina.seeds.values())).seam
    if seam is None:
        raise ValueError("aggregate.mode='weighted': expected slots with a seam, as build_state makes them")
    floor = WEIGHT_FLOOR_FP16 if config.precision.amp == "fp16" else WEIGHT_FLOOR
    return WeightedGradients(state, world, owners, tally, ledger, seam=seam, floor=floor)
