"""What one run has compiled the next one does not compile, and trains the same with it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from tests.rig import make_task, tiny_config
from tolaria import build
from tolaria.config import (
    CheckpointConfig,
    CompileConfig,
    Config,
    DistConfig,
    LogConfig,
    RunConfig,
    TamiyoConfig,
    TrainConfig,
)
from tolaria.config_tamiyo import POLICY_NONE
from tolaria.telemetry.events import read_events


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that is as new before and afterwards."""
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # inductor's own; taken away again afterwards
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(folder: Path) -> tuple[str, dict[str, Any]]:
    """A compiled run of three steps: digest of its end, and what happened to the compiler's cache."""
    torch._dynamo.reset()
    counters.clear()
    base = tiny_config(compiled=True)
    config = Config(
        run=RunConfig(dir=str(folder), seed=5),
        train=TrainConfig(max_steps=3, batch_size=4),
        precision=base.precision,
        compile=CompileConfig(enabled=True),
        kasmina=base.kasmina,
        tamiyo=TamiyoConfig(policy=POLICY_NONE),
        checkpoint=CheckpointConfig(every=0),
        dist=DistConfig(device="cpu", threads=1),
        log=LogConfig(progress="off"),
    )
    with torch._inductor.config.patch(compile_threads=1):  # no processes of the compiler's own
        summary = build.train(config, task=make_task)
    assert list(read_events(folder / "events.jsonl", "compile_fallback")) == []
    return summary.state_digest, dict(counters["inductor"])


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("compiler")
def test_a_second_run_beside_the_first_compiles_nothing_and_trains_the_same(tmp_path: Path) -> None:
    digest, first = train(tmp_path / "first")
    assert first.get("fxgraph_cache_miss", 0) > 0 and first.get("fxgraph_cache_hit", 0) == 0
    (pack,) = (tmp_path / ".compile_cache").iterdir()
    written = pack.stat().st_mtime_ns
    again, second = train(tmp_path / "second")
    assert second.get("fxgraph_cache_hit", 0) == first["fxgraph_cache_miss"]
    assert second.get("fxgraph_cache_miss", 0) == 0
    assert again == digest
    assert pack.stat().st_mtime_ns == written
