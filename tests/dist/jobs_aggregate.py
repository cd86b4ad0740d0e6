"""Jobs for test_aggregation.py: the gradients of each mode on several ranks. Each runs on every rank."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from tests.dist.jobs_growth import collectives, digests
from tests.dist.jobs_resume import own_rank
from tests.owned import Gradients, distance, gradients, make_task, of_host, owned_config, owned_rig
from tests.rig import Rig, same_bits
from tolaria.config import Config
from tolaria.dist import init_world
from tolaria.errors import ReplicaMismatch
from tolaria.leyline.types import SeedStage

GLOBAL_BATCH = 16
STEPS = 3


def owner(index: int) -> int:
    """Host and four seeds in turn, but the last of a step's samples are all one seed's: ranks hold unlike shares."""
    return 1 if index % 16 > 12 else index % 5 - 1


@contextmanager
def on_all_ranks(config: Config, seeds: Mapping[str, str], **task: Any) -> Iterator[Rig]:
    """`owned_rig` over all ranks, or in one process."""
    world = init_world(device="cpu", timeout_s=30, control_timeout_s=30)
    stages = {slot: SeedStage[stage] for slot, stage in seeds.items()}
    with tempfile.TemporaryDirectory() as folder, owned_rig(Path(folder), config, stages, world=world, **task) as rig:
        yield rig
    world.close()


def one_batch(mode: str, attribution: str, seeds: Mapping[str, str], world_size: int, opposed: bool) -> dict[str, Any]:
    """Steps on the same global batches, whatever the number of ranks; what the optimizer got in the last one."""
    config = owned_config(mode, attribution, batch_size=GLOBAL_BATCH // world_size)
    with on_all_ranks(config, seeds, owner=owner, opposed=opposed) as rig:
        assert rig.world.world_size == world_size
        found = gradients(rig, STEPS)
        return {
            "gradients": {name: g.flatten().tolist() for name, g in found.items()},
            "metrics": rig.replica.owner_metrics(),
            "collectives": collectives(rig),
            "digests": digests(rig),
        }


def idle_slot(mode: str) -> list[str]:
    """Host gradients that differ between samples of a slot without a seed and samples of nobody's."""
    found = []
    for whose in (lambda _: -1, owner):
        with on_all_ranks(owned_config(mode, batch_size=4), {}, owner=whose, dtype=torch.float32) as rig:
            found.append(gradients(rig, STEPS))
    return [name for name in found[0] if not same_bits(found[0][name], found[1][name])]


def training_seed(mode: str) -> list[str]:
    """Host gradients that differ with and without a TRAINING seed that owns no sample."""
    found = []
    for seeds in ({}, {"b": "TRAINING"}):
        config = owned_config(mode, batch_size=4)
        with on_all_ranks(config, seeds, owner=lambda _: -1, dtype=torch.float32) as rig:
            found.append(of_host(gradients(rig, STEPS)))
    return [name for name in found[0] if not same_bits(found[0][name], found[1][name])]


def compiled_and_eager(mode: str) -> dict[str, Any]:
    """The same steps eager and compiled; owners differ between microbatches, alpha and weights between steps."""
    seeds = {"a": "TRAINING", "b": "BLENDING", "c": "PROBATIONARY"}
    donated = torch._functorch.config.donated_buffer
    found: list[Gradients] = []
    told: dict[str, Any] = {}
    for compiled in (False, True):
        config = owned_config(mode, compiled=compiled, accumulation=2, batch_size=3)
        with on_all_ranks(config, seeds, owner=owner, opposed=True) as rig:
            blending = rig.state.kasmina.seeds["b"]
            blending.blend_steps, blending.blend_position = 8, 2
            rig.replica.warm_up(rig.sample)
            graphs: int = counters["stats"]["unique_graphs"]
            found.append(gradients(rig, 4))
            told = {
                "alpha": blending.alpha_value,
                "compiled": rig.replica.compiled and graphs > 0,
                "fallbacks": [event["reason"] for event in rig.told("compile_fallback")],
                "new_graphs": counters["stats"]["unique_graphs"] - graphs,
            }
    restored = torch._functorch.config.donated_buffer == donated
    return {**told, "distance": distance(found[1], found[0]), "setting_restored": restored}


def unlike_models(mode: str) -> str:
    """What a start says when rank 1's model is of another type."""
    dtype = torch.float64 if own_rank() else torch.float32
    world = init_world(device="cpu", timeout_s=30, control_timeout_s=30)
    try:
        with tempfile.TemporaryDirectory() as folder:
            Rig.build(Path(folder), world=world, config=owned_config(mode, "kasmina"), make=make_task, dtype=dtype)
    except ReplicaMismatch as error:
        return str(error)
    finally:
        world.close()
    return ""
