"""Jobs for test_measure.py: what a boundary measures, on all ranks and in one process with the whole batch."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.dist.jobs_growth import joined
from tests.rig import Rig, alone, tiny_config
from tolaria.kasmina import blueprints
from tolaria.kasmina.blueprints import register_blueprint
from tolaria.leyline.types import SeedStage
from tolaria.measure import TRAIN_METERS, Report
from tolaria.telemetry.meters import Meters


def told(rig: Rig, report: Report) -> dict[str, Any]:
    """What the ranks must agree on."""
    evidence = rig.state.kasmina.seeds["early"].evidence
    return {
        "signals": report.signals,
        "noise": report.val_noise,
        "flops": report.flops,
        "contribution": [evidence.contribution, evidence.contribution_noise],
    }


def against_one_process(stage: str) -> dict[str, Any]:
    """The same run and boundary on all ranks and in one process with batches as large as theirs together.

    The slot "early" goes to ``stage`` first; "DORMANT": it stays free.
    """
    # Other jobs of these ranks may have left blueprints that draw random numbers.
    kasmina = {"output_ratio": 1e6, "candidates": "identity,low_rank,residual_mlp"}
    with joined(tiny_config(batch_size=4, **kasmina)) as rig, tempfile.TemporaryDirectory() as folder:
        config = tiny_config(batch_size=4 * rig.world.world_size, **kasmina)
        with Rig.build(Path(folder), world=alone(), config=config) as single:
            found = []
            for each in (rig, single):
                each.train(4)
                if stage != SeedStage.DORMANT.name:
                    each.grow("early", SeedStage[stage])
                found.append(told(each, each.evaluator.measure(Meters(TRAIN_METERS))))
            return {"ranks": found[0], "single": found[1]}


class Picky(nn.Linear):
    """A seed that fails on the last rank, where it is not only tried."""

    fails = False

    def forward(self, h: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        if self.fails and len(h) > 2:
            raise torch.OutOfMemoryError("injected: no room for this seed")
        return super().forward(h)


def one_rank_fails(what: str) -> dict[str, Any]:
    """Measure while something fails on the last rank, and once more when it does not; then train on."""
    # The ranks live on; what is registered here must not.
    with joined() as rig, patch.dict(blueprints._BLUEPRINTS):
        last = rig.world.global_rank == rig.world.world_size - 1
        if what == "other_blueprints" and last:
            register_blueprint("only_here", lambda shape: nn.Linear(shape[-1], shape[-1]), ranks=[1])
        register_blueprint("picky", lambda shape: Picky(shape[-1], shape[-1]), ranks=[1])
        rig.train(2)
        model = rig.state.objective.model
        broken = what == "host" and last
        handle = model.register_forward_pre_hook(_fail) if broken else None
        Picky.fails = what == "seed" and last
        measured = rig.evaluator.signal.measure()
        if handle is not None:
            handle.remove()
        Picky.fails = False
        again = rig.evaluator.signal.measure()
        rig.train(3)
        digests = [d.hex() for d in rig.world.peers.gather_digests(rig.state.digest())]
        return {"measured": measured, "again": again, "digests": digests, "told": len(rig.told("signal_failed"))}


def _fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("injected: no room for this pass")
