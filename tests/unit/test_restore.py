"""A start that differs from the run it goes on from says so, and goes on only when told to."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import jobs_resume as jobs
from tests.dist.test_resume import by_rank
from tolaria import build
from tolaria.config import Config
from tolaria.dist import Peers, World
from tolaria.errors import CheckpointMismatch, RunLocked, WalError
from tolaria.restore import facts_of
from tolaria.task import Task
from tolaria.tasks.digits import make_task as make_digits


def train(folder: Path, *, resume: bool = False, accept: bool = False, **changes: Any) -> Any:
    config = jobs.make_config(str(folder), resume=resume, steps=8 if resume else 4)
    return build.train(changed(config, accept, changes), task=jobs.make_task)


def changed(config: Config, accept: bool, changes: dict[str, Any]) -> Config:
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, accept_changes=accept))
    for key, value in changes.items():
        section, _, name = key.partition("_")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


@pytest.mark.parametrize(("change", "told"), [
    ({"train_batch_size": 2}, "train.batch_size 4 -> 2"),
    ({"precision_amp": "off"}, "precision.amp 'bf16' -> 'off'"),
    ({"optim_name": "sgd"}, "optim.name 'adamw' -> 'sgd'"),
])  # fmt: skip
def test_another_configuration_is_refused_by_name(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    train(tmp_path / "run")
    with pytest.raises(CheckpointMismatch, match="accept_changes") as refused:
        train(tmp_path / "run", resume=True, **change)
    assert told in str(refused.value)


def test_it_is_accepted_when_one_says_so_and_noted(tmp_path: Path) -> None:
    train(tmp_path / "run")
    assert train(tmp_path / "run", resume=True, accept=True, train_batch_size=2).steps == 8
    assert by_rank(tmp_path / "run", "changes_accepted", "changed") == [(0, ["train.batch_size 4 -> 2"])]


def test_another_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run")
    monkeypatch.setattr("tolaria.restore.torch.__version__", "9.9.9")
    with pytest.raises(CheckpointMismatch, match=r"torch .* -> '9\.9\.9'"):
        train(tmp_path / "run", resume=True)


def test_a_damaged_log_refuses_the_start(tmp_path: Path) -> None:
    train(tmp_path / "run")
    segment = next((tmp_path / "run" / "wal").glob("*.log"))
    raw = bytearray(segment.read_bytes())
    raw[200] ^= 1
    segment.write_bytes(raw)
    with pytest.raises(WalError, match="damaged"):
        train(tmp_path / "run", resume=True)
    assert RunLocked.exit_code != WalError.exit_code == 74


def test_a_task_may_be_a_partial_or_an_object() -> None:
    class Maker:
        def __call__(self) -> Task:
            raise NotImplementedError

    world = World(
        global_rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), generation="g", peers=Peers(None, 0, 1),
        background=Peers(None, 0, 1), data_group=None,
    )  # fmt: skip
    whole = facts_of(Config(), make_digits, world)
    assert facts_of(Config(), partial(partial(make_digits, width=4)), world) == whole
    assert whole["task.factory"] == "tolaria.tasks.digits:make_task" and whole["task.code"]
    assert facts_of(Config(), Maker(), world)["task.factory"].endswith("<locals>.Maker")
