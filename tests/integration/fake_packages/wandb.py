"""Stands for the package of that name, which needs a service: keeps what it is given in a file, or breaks as asked."""

import json
import os
from pathlib import Path
from typing import Any

CALLS = Path(os.environ["TOLARIA_TEST_WANDB"])
BREAK_AT = int(os.environ.get("TOLARIA_TEST_WANDB_BREAKS", "0"))


class Run:
    def __init__(self) -> None:
        self.calls = 0

    def define_metric(self, name: str, *, step_metric: str) -> None:
        keep("define_metric", {"name": name, "step_metric": step_metric})

    def log(self, values: dict[str, Any]) -> None:
        self.calls += 1
        if self.calls == BREAK_AT:
            raise RuntimeError("the service says no")
        keep("log", values)

    def finish(self) -> None:
        keep("finish", {})


def init(**settings: Any) -> Run:
    keep("init", settings)
    return Run()


def keep(call: str, values: dict[str, Any]) -> None:
    with CALLS.open("a") as file:
        file.write(json.dumps({"call": call, **values}) + "\n")
