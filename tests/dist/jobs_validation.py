"""Jobs for test_validation.py: validation compiled on all ranks, or on none."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tests.dist.jobs_growth import joined
from tests.dist.jobs_verdicts import FailingCompiler, own_rank
from tests.rig import tiny_config
from tolaria.config import DataConfig
from tolaria.measure import TRAIN_METERS
from tolaria.telemetry.meters import Meters


def measure(*, choice: str, bad_rank: int, good: int) -> dict[str, Any]:
    """Train a little and validate twice; on one rank the compiler fails after ``good`` graphs."""
    config = tiny_config(compiled=True)
    config = replace(
        config, compile=replace(config.compile, validation=choice), data=DataConfig(validation_batch_size=2)
    )
    compiler = FailingCompiler(good if own_rank() == bad_rank else 1000)
    with patch("torch._inductor.compile_fx.compile_fx", compiler), joined(config) as rig:
        rig.replica.warm_up(rig.sample)
        rig.train(3)
        reports = [rig.evaluator.measure(Meters(TRAIN_METERS)) for _ in range(2)]
        return {
            "validation compiled": rig.evaluator.forward.compiled,
            "training compiled": rig.replica.compiled,
            "numbers": [(r.val_loss, r.val_accuracy, r.val_noise) for r in reports],
            "reasons": [e["reason"] for e in rig.told("compile_fallback") if e["rank"] == rig.world.global_rank],
            "digest": rig.state.digest().hex(),
        }
