"""The numbers in a record, named once for all sinks. Pure.

A packet's metric, a tag of TensorBoard's and a Prometheus metric of one name are one number in one unit, seconds where
it is a time. `MEASURES` is what there can be; docs and dashboards are checked against it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tolaria.telemetry.sinks.record import BOUNDARY, STEP, Record


class Measure(NamedTuple):
    """``group``: under which TensorBoard shows it. ``labels``: what tells its points apart. ``unit``: "" has none."""

    help: str
    group: str
    unit: str = ""
    labels: tuple[str, ...] = ()


OF_STEPS = {
    "step_loss": Measure("Loss of the last logged step, rank 0's part of it", "train"),
    "learning_rate": Measure("Learning rate of the last logged step", "train", "", ("group",)),
    "samples_per_second": Measure("Samples of all ranks in the time of the steps since the last", "train", "1/s"),
    "step_seconds": Measure("Wall time of a step, its data included, mean since the last logged step", "train", "s"),
    "seed_alpha": Measure("Share with which a seed acts on its host", "seeds", "", ("slot",)),
}
OF_BOUNDARIES = {
    "train_loss": Measure("Training loss since the boundary before, mean over steps and ranks", "train"),
    "validation_loss": Measure("Validation loss of the last boundary", "validation"),
    "validation_loss_error": Measure("Standard error of the validation loss", "validation"),
    "validation_accuracy": Measure("Validation accuracy of the last boundary, 0 to 1", "validation"),
    "validation_metric": Measure("Further metrics of the task", "validation", "", ("metric",)),
    "boundary_seconds": Measure("Time of the last boundary by part; boundary: the whole", "boundary", "s", ("part",)),
    "rank_step_seconds": Measure("A rank's own time in a step, before it waits for others", "ranks", "s", ("rank",)),
    "seed_stage": Measure("1 for the stage that a slot is in", "seeds", "", ("slot", "stage")),
    "seed_gradient": Measure("How a seed's samples counted in the host's gradient", "seeds", "", ("slot", "value")),
    "growth_signal": Measure("What growth promises in a free slot", "growth", "", ("slot", "signal")),
    "forward_flops": Measure("FLOPs of one sample's forward pass", "train"),
    "conservative": Measure("1 in conservative mode", "train"),
}
MEASURES: Mapping[str, Measure] = {**OF_STEPS, **OF_BOUNDARIES}


class Point(NamedTuple):
    """One number. ``labels``: values of the measure's labels, in their order."""

    name: str
    value: float
    labels: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """As TensorBoard and Weights & Biases call it: ``train/learning_rate/host``."""
        return "/".join((MEASURES[self.name].group, self.name, *self.labels))


def points_of(record: Record) -> list[Point]:
    """The numbers of a record: of steps, and of rank 0's boundaries. Events have none, and what is not known is left
    out."""
    if record.kind == STEP:
        found = _of_step(record.fields)
    elif record.kind == BOUNDARY and record.rank == 0:
        found = _of_boundary(record.fields)
    else:
        return []
    return [point for point in found if _is_number(point.value)]


def _of_step(fields: Mapping[str, Any]) -> Iterator[Point]:
    yield Point("step_loss", fields.get("loss_rank0"))  # type: ignore[arg-type]
    yield Point("samples_per_second", fields.get("samples_per_s"))  # type: ignore[arg-type]
    yield Point("step_seconds", fields.get("step_s"))  # type: ignore[arg-type]
    yield Point("learning_rate", fields.get("lr"), ("host",))  # type: ignore[arg-type]
    for key, value in fields.items():
        kind, _, name = key.partition("/")
        if name and kind == "lr":
            yield Point("learning_rate", value, (name,))
        elif name and kind == "alpha":
            yield Point("seed_alpha", value, (name,))


def _of_boundary(fields: Mapping[str, Any]) -> Iterator[Point]:
    for name, field in (("train_loss", "train_loss"), ("validation_loss", "val_loss"),
                        ("validation_loss_error", "val_noise"), ("validation_accuracy", "val_accuracy"),
                        ("forward_flops", "flops_per_sample")):  # fmt: skip
        yield Point(name, fields.get(field))  # type: ignore[arg-type]
    yield Point("conservative", float(fields.get("mode") == "conservative"))
    for name, value in fields.get("metrics", {}).items():
        yield Point("validation_metric", value, (name,))
    for part, ms in fields.get("latency_ms", {}).items():
        yield Point("boundary_seconds", ms / 1e3, (part,))
    for rank, ms in enumerate(fields.get("own_ms", ())):
        yield Point("rank_step_seconds", ms / 1e3, (str(rank),))
    for slot, stage in fields.get("seeds", {}).items():
        yield Point("seed_stage", 1.0, (slot, stage))
    for name, field in (("seed_gradient", "owners"), ("growth_signal", "signals")):
        for slot, values in fields.get(field, {}).items():
            for label, value in values.items():
                yield Point(name, value, (slot, label.removeprefix("signal/")))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
