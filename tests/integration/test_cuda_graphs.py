"""With compile.mode=reduce-overhead the step replays recorded CUDA graphs; what it trains must be the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.rig import Rig, alone, tiny_config
from tolaria.config import CompileConfig
from tolaria.leyline.types import SeedStage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_recorded_steps_train_as_plain_ones_do_through_growth(
    accumulation: int, batch_norm: bool, tmp_path: Path
) -> None:
    ends = []
    for mode in ("default", "reduce-overhead"):
        folder = tmp_path / mode
        folder.mkdir()
        config = replace(tiny_config(compiled=True, accumulation=accumulation), compile=CompileConfig(mode=mode))  # type: ignore[arg-type]
        world = replace(alone(), device=torch.device("cuda", 0))
        with Rig.build(folder, world=world, config=config, batch_norm=batch_norm) as rig:
            rig.replica.warm_up(rig.sample)
            rig.grow("early", SeedStage.BLENDING)
            rig.train(4)
            assert rig.told("compile_fallback") == []
            ends.append({name: tensor.clone() for name, tensor in rig.state.tensors().items()})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
