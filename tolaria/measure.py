"""What a boundary knows: the state of the run since the last one and its validation, over all ranks.

Validation runs in evaluation mode, each rank on its share. Seeds that are SHADOWING or PROBATIONARY cost a
second pass each, without or with the seed; the difference is taken sample by sample, so that its standard error does
not contain what is common to both passes (both are eager). Everything travels in one packed float64 sum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.data import Loader, Plan, dataset_size, validation_plan
from tolaria.dist import World
from tolaria.kasmina.seed import Seed
from tolaria.kasmina.slot import Gauge
from tolaria.leyline.types import SeedStage
from tolaria.objective import Batch, weighted_values
from tolaria.outlook import ForwardCost, GrowthSignal, Signals, no_trace
from tolaria.replica import Replica, evaluating
from tolaria.state import TrainState
from tolaria.task import Task, users_code
from tolaria.telemetry.meters import Meters
from tolaria.telemetry.pace import NO_STEPS, StepTimes
from tolaria.telemetry.split import Split
from tolaria.validation import ValidationForward

TRAIN_METERS = ("loss",)
"""What the loop meters between boundaries: the loss of each step taken, this rank's part."""

_TIMED = 5
"""Forward passes with and without a seed, of which the fastest counts: others on the machine only slow them down."""

PROBED = (SeedStage.SHADOWING, SeedStage.PROBATIONARY)


@dataclass(frozen=True)
class Worth:
    """What one seed was found to be worth. ``noise``: the standard error of ``contribution``; NaN is unknown.

    ``forward_ms``: milliseconds of one validation batch's forward pass with the seed and without, taken in turns, the
    least of each, means over ranks; empty while the seed is only probed.
    """

    contribution: float
    noise: float
    forward_ms: Sequence[float] = ()


@dataclass(frozen=True)
class Report:
    """One boundary in numbers, equal on every rank. Losses are means per sample, accuracy in [0, 1].

    ``train_loss`` is NaN when no step was taken since the last boundary. ``metrics`` are the task's further ones.
    ``own_ms``, ``data_ms``, ``wait_ms``: each rank's own milliseconds in a step, those of waiting for its data in them,
    and those of waiting for other ranks; ``step_ms``: of a whole step, the mean over ranks; 0: no step.
    ``val_noise``: the standard error of ``val_loss``, as of a sample of all data. ``worth``: what seeds were
    found to be worth at this boundary, by slot. ``signals``: what growth promises at each free slot. ``flops``: of one
    sample's forward pass, None if unknown. ``spent_ms``: what "validation" and "signal" took on this rank.
    ``owners``: how each seed's samples counted in the host's gradient, by slot (see `Replica.owner_metrics`).
    """

    train_loss: float
    val_loss: float
    val_accuracy: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    own_ms: Sequence[float] = ()
    val_noise: float = math.nan
    step_ms: float = 0.0
    worth: Mapping[str, Worth] = field(default_factory=dict)
    signals: Signals = field(default_factory=dict)
    flops: int | None = None
    spent_ms: Mapping[str, float] = field(default_factory=dict)
    owners: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    data_ms: Sequence[float] = ()
    wait_ms: Sequence[float] = ()


class Evaluator:
    """Measures the run at a boundary. Collective: all ranks call it together."""

    def __init__(
        self, task: Task, state: TrainState, replica: Replica, loader: Loader, world: World, batch: int
    ) -> None:
        self.task = task
        self.state = state
        self.replica = replica
        self.loader = loader
        self.world = world
        self.size = dataset_size(task.validation, "validation")
        self.signal = GrowthSignal(task, state, replica, loader, world)
        self.cost = ForwardCost(task, state, loader)
        self._plan = validation_plan(self.size, world.global_rank, world.world_size, batch)
        self.forward = ValidationForward(state, replica, replica.config.compile, len(self._plan))

    def rehearse(self) -> None:
        """One validation batch before training starts, so that a mistake does not show after the first epoch only.

        Collective, since it is compiled here where it is to be; the user's data may move the random generators. Raises
        TaskError for whatever model, loss, accuracy or a metric raises, and for results of a wrong form.
        """
        with users_code("validating a batch", debug=self.replica.config.train.debug):
            self._pass(self._plan[:1])
        self._prepare()

    def measure(self, train: Meters, pace: StepTimes = NO_STEPS) -> Report:
        """Validate, reduce over ranks, and update the evidence of every seed.

        ``train``: this rank's `TRAIN_METERS` since the last boundary, which begin anew; ``pace``: its steps' times.
        Reads the device; blocks for the validation.
        """
        split, phases = Split(), self.replica.ledger.phases
        self.replica.synchronise_buffers()
        with split.timed("validation"), phases("validation"):
            local = self._validate()
        local.update(zip(("train/loss", "train/steps"), train.packed(), strict=True))
        train.reset()
        local["step_ms"] = torch.tensor(pace.whole_ms)
        rows = torch.zeros(3, self.world.world_size, dtype=torch.float64)
        rows[:, self.world.global_rank] = torch.tensor([pace.own_ms, pace.data_ms, pace.wait_ms])
        # Brought together on the device, so that the host waits for it once and not for each value.
        packed = torch.stack([v.to(self.world.device, torch.float64) for v in local.values()]).cpu()
        summed = self.world.peers.sum(torch.cat([packed, rows.flatten()])).tolist()
        values = dict(zip(local, summed, strict=False))
        report = self._report(values, summed[len(local) :])
        self._update_evidence(values, report.val_loss)
        with split.timed("signal"), phases("validation"):
            signals, flops = self.signal.measure(), self.cost.flops()
        return replace(report, worth=self._worth(values), signals=signals, flops=flops, spent_ms=split.ms)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Validate the model as it is, and nothing else: the weighted loss of each of this rank's samples, (n,), and
        the sum of their accuracies, 0-D; both float64 on the device. Collective, for the buffers."""
        self.replica.synchronise_buffers()
        self.forward.prepare(self._first_batch)
        sums, losses = self._pass(self._plan)
        return losses, sums["accuracy"].to(torch.float64)

    def _validate(self) -> dict[str, Tensor]:
        """This rank's sums over the validation data, of the model as it is and of each seed that is probed."""
        self._prepare()
        sums, losses = self._pass(self._plan)
        local = {f"val/{name}": value for name, value in sums.items()}
        local["squares"] = losses.square().sum()
        for seed in self.state.kasmina.seeds.values():
            if seed.stage in PROBED:
                local.update(self._probe(seed, losses))
        return local

    def _pass(self, plan: Plan) -> tuple[dict[str, Tensor], Tensor]:
        """Sums of all values over this rank's samples, and the loss of each, float64."""
        objective = self.state.objective
        totals: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        with evaluating(objective):
            for batch in self.loader.batches(self.task.validation, plan):
                with self.replica.autocast():
                    # Not through the objective, whose compiled form is for training: shapes and mode are others.
                    outputs = self.forward(batch.inputs)
                values = weighted_values(self.task, outputs, batch)
                losses.append(values["loss"])
                for name, value in values.items():
                    totals[name] = totals[name] + value.sum() if name in totals else value.sum()
        return totals, torch.cat(losses)

    def _prepare(self) -> None:
        with self.replica.ledger.phases("compile"):
            self.forward.prepare(self._first_batch)

    def _first_batch(self) -> Batch:
        return next(iter(self.loader.batches(self.task.validation, self._plan[:1])))

    def _forward_ms(self, slot: str) -> tuple[float, float]:
        """Milliseconds of one batch's forward pass with a seed that acts and without, in turns, the least of each."""
        model, kasmina = self.state.objective.model, self.state.kasmina
        with_seed, without = [], []
        with no_trace(self.state, self.world.device), evaluating(self.state.objective):
            batch = self._first_batch()
            for _ in range(_TIMED):
                with_seed.append(self._timed(model, batch))
                with kasmina.probing(slot, active=False):
                    without.append(self._timed(model, batch))
        return min(with_seed), min(without)

    def _timed(self, model: nn.Module, batch: Batch) -> float:
        cuda = self.world.device.type == "cuda"
        start = perf_counter()
        with self.replica.autocast():
            model(batch.inputs)
        if cuda:
            torch.cuda.synchronize(self.world.device)
        return (perf_counter() - start) * 1e3

    def _probe(self, seed: Seed, losses: Tensor) -> dict[str, Tensor]:
        with self.state.kasmina.probing(seed.slot, active=seed.stage == SeedStage.SHADOWING) as gauge:
            sums, probed = self._pass(self._plan)
        key = f"probe/{seed.slot}"
        found = {f"{key}/loss": sums["loss"], f"{key}/squares": (probed - losses).square().sum()}
        if seed.stage == SeedStage.PROBATIONARY:
            times = map(torch.tensor, self._forward_ms(seed.slot))
            found.update(zip((f"{key}/ms_with", f"{key}/ms_without"), times, strict=True))
        if isinstance(gauge, Gauge):
            names = (f"{key}/host_squares", f"{key}/seed_squares", f"{key}/non_finite")
            found.update(dict(zip(names, gauge.totals, strict=True)))
            found[f"{key}/mismatch"] = torch.tensor(float(bool(gauge.mismatch)))
        return found

    def _report(self, values: Mapping[str, float], of_ranks: Sequence[float]) -> Report:
        steps = values["train/steps"]
        noise = standard_error(values["val/loss"], values["squares"], self.size)
        means = {n.removeprefix("val/"): v / self.size for n, v in values.items() if n.startswith("val/")}
        train_loss = values["train/loss"] / steps if steps else math.nan
        step_ms = values["step_ms"] / self.world.world_size
        owners = self.replica.owner_metrics()
        loss, accuracy = means.pop("loss"), means.pop("accuracy")
        ranks = self.world.world_size
        own_ms, data_ms, wait_ms = (tuple(of_ranks[at : at + ranks]) for at in range(0, 3 * ranks, ranks))
        return Report(train_loss, loss, accuracy, means, own_ms, noise, step_ms=step_ms, owners=owners,
                      data_ms=data_ms, wait_ms=wait_ms)  # fmt: skip

    def _worth(self, values: Mapping[str, float]) -> dict[str, Worth]:
        found = {}
        for seed in self.state.kasmina.seeds.values():
            if seed.stage in PROBED:
                keys = [f"probe/{seed.slot}/{name}" for name in ("ms_with", "ms_without")]
                times = [values[key] / self.world.world_size for key in keys if key in values]
                found[seed.slot] = Worth(seed.evidence.contribution, seed.evidence.contribution_noise, times)
        return found

    def _update_evidence(self, values: Mapping[str, float], val_loss: float) -> None:
        self.state.kasmina.read_norms()
        for seed in self.state.kasmina.seeds.values():
            if not seed.occupied:
                continue
            evidence: Any = seed.evidence
            evidence.loss_now = val_loss
            key = f"probe/{seed.slot}"
            if f"{key}/loss" not in values:
                continue
            probed = values[f"{key}/loss"] / self.size
            difference = values[f"{key}/loss"] - values["val/loss"]
            evidence.contribution_noise = standard_error(difference, values[f"{key}/squares"], self.size)
            if seed.stage == SeedStage.PROBATIONARY:
                evidence.loss_with, evidence.loss_without = val_loss, probed
                continue
            evidence.loss_with, evidence.loss_without = probed, val_loss
            host, grown = values[f"{key}/host_squares"], values[f"{key}/seed_squares"]
            evidence.output_ratio = math.sqrt(grown / host) if host > 0 else math.nan
            evidence.non_finite_outputs = int(values[f"{key}/non_finite"])
            evidence.shape_mismatch = "differs from the host's" if values[f"{key}/mismatch"] else ""


def standard_error(total: float, squares: float, count: int) -> float:
    """Standard error of a mean, from the sum of ``count`` values and of their squares; NaN for one value alone."""
    if count < 2 or not math.isfinite(squares):
        return math.nan
    # Rounding may bring a spread of nothing below zero.
    return math.sqrt(max(0.0, squares - total * total / count) / (count - 1) / count)
