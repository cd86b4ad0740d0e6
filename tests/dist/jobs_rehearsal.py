"""Jobs for test_rehearsal.py: runs as those of jobs_resume.py, with rehearsals between two of their steps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tests.dist import jobs_resume
from tolaria.config import Config
from tolaria.errors import CommandRefused
from tolaria.loop import Trainer
from tolaria.rehearsal.arms import Interrupted, Rehearsal

Wish = tuple[int, str, int]
"""After which step, what change, for how many steps."""


def train(folder: str, *, wishes: Sequence[Wish], needed_at: int = 0, **config: Any) -> dict[str, Any]:
    """As `jobs_resume.train`, with these rehearsals; "told": what came of each, by rank.

    ``needed_at``: this rank wants the run back when an arm has come to that step; 0: never.
    """
    told: list[Any] = []
    carry_out = Trainer._act

    def act(trainer: Trainer, *, asked: bool) -> tuple[bool, str]:
        for step, change, steps in [wish for wish in wishes if wish[0] == trainer.state.step]:
            told.append(_tried(trainer, change, steps, f"w{step}", needed_at))
        return carry_out(trainer, asked=asked)

    def config_of(*args: Any, **wishes: Any) -> Config:
        found = make_config(*args, **wishes)
        rates = replace(found.lr, max_scale=1000.0)
        bounds = replace(found.tuning, lr_factor=1000.0)
        return replace(found, log=replace(found.log, interval_steps=1), lr=rates, tuning=bounds)

    make_config = jobs_resume.make_config
    with patch.object(Trainer, "_act", act), patch.object(jobs_resume, "make_config", config_of):
        return {**jobs_resume.train(folder, **config), "told": told}


def _tried(trainer: Trainer, change: str, steps: int, name: str, needed_at: int) -> Any:
    def needed() -> str:
        return "this rank does" if needed_at == trainer.state.step else ""

    try:
        return Rehearsal(trainer.parts, needed).run(change, steps, name).to_json()
    except CommandRefused as error:
        return [error.code, str(error)]
    except Interrupted as error:
        return ["interrupted", str(error)]


def on_rank(rank: int, **arguments: Any) -> dict[str, Any]:
    """`train` where only one rank ever needs the run back."""
    if jobs_resume.own_rank() != rank:
        arguments["needed_at"] = 0
    return train(**arguments)

