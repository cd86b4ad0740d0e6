"""Weights & Biases, through its own package.

Its own step only rises, so every number is drawn over "step", which is logged with it beside "branch": after a return
to an earlier state a curve goes on from the earlier step, and "branch" tells the two courses apart.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tolaria.errors import ConfigError
from tolaria.telemetry.sinks.points import points_of
from tolaria.telemetry.sinks.record import Record


class WeightsBiasesSink:
    """Logs to ``project`` as the run ``run_id``, called ``name``; ``config``: the run's settings by section.

    The service is first spoken to in the sink's thread. Raises ConfigError when the package is missing.
    """

    name = "wandb"

    def __init__(self, project: str, *, run_id: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            self._package: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(f"telemetry.wandb={project!r}: {error}; pip install wandb, or leave it empty") from error
        self._settings = {
            "project": project, "id": run_id, "name": name, "dir": str(folder), "resume": "allow",
            "config": dict(config),
        }  # fmt: skip
        self._run: Any = None

    @property
    def where(self) -> str:
        """The project."""
        return str(self._settings["project"])

    def write(self, record: Record) -> None:
        """Log the record's numbers."""
        points = points_of(record)
        if not points:
            return
        if self._run is None:
            self._run = self._package.init(**self._settings)
            self._run.define_metric("*", step_metric="step")
        self._run.log({point.tag: point.value for point in points} | {"step": record.step, "branch": record.branch})

    def flush(self) -> None:
        """Nothing is kept back; the package sends by itself."""

    def close(self) -> None:
        """Send the rest."""
        if self._run is not None:
            self._run.finish()
