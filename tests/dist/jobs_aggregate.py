"""Jobs for test_aggregation.py: the gradients of each mode on several ranks. Each runs on every rank."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.dist.jobs_growth import collectives, digests
from tests.owned import gradients, of_host, owned_config, owned_rig
from tests.rig import Rig, same_bits
from tolaria.config import Config
from tolaria.dist import init_world
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
