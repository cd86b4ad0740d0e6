"""Runs in which commands change how the host and its seeds learn, and one in which somebody else does."""

import hashlib
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.dist import jobs_resume
from tolaria import build
from tolaria.config_recovery import RecoveryConfig
from tolaria.state import HOST_GROUP
from tolaria.task import Task

FOREIGN_LR = 0.5


def train_disturbed(folder: str, *, rank: int, steps: list[int]) -> dict[str, Any]:
    """Train while somebody on ``rank`` writes the learning rate after some of its steps; -1: nobody."""
    taken = 0

    def disturb(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal taken
        taken += optimizer.param_groups[0].get("name") == HOST_GROUP  # stand-ins for measurements have no name
        if jobs_resume.own_rank() == rank and taken in steps:
            optimizer.param_groups[0]["lr"] = FOREIGN_LR

    config = replace(jobs_resume.make_config(folder), recovery=RecoveryConfig(drift_steps=1, snapshot_steps=3))
    made: list[Task] = []

    def make_task() -> Task:
        made.append(jobs_resume.make_task())
        return made[-1]

    handle = register_optimizer_step_post_hook(disturb)
    try:
        summary = build.train(config, task=make_task)
    finally:
        handle.remove()
    weights = b"".join(p.detach().numpy().tobytes() for p in made[-1].model.parameters())
    return {
        "outcome": summary.outcome, "digest": summary.state_digest[jobs_resume.own_rank()],
        "weights": hashlib.sha256(weights).hexdigest(), "incidents": len(summary.incidents),
    }  # fmt: skip
