"""What a policy chooses by: what growth promises at each free slot, and what the model costs as it is.

    GrowthSignal    per free slot and blueprint: the gradient that a new seed would get, its parameters, its FLOPs
    ForwardCost     FLOPs of one sample through the present model

Both run eager beside training and leave no trace in parameters, gradients, buffers, random streams or compiled graphs.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tolaria.config_tamiyo import POLICY_NONE
from tolaria.data import Loader, dataset_size
from tolaria.dist import World
from tolaria.errors import TaskError
from tolaria.kasmina.candidates import Candidate, Passed, birth_gradient, candidates_for, chosen_names, newborn
from tolaria.kasmina.flops import count_flops
from tolaria.kasmina.tap import passed_through, tapped
from tolaria.leyline.types import SeedStage
from tolaria.objective import Batch, Objective
from tolaria.replica import Replica, evaluating
from tolaria.state import TrainState, named_buffers_of
from tolaria.streams import load_rng_tensors, rng_tensors
from tolaria.task import Task, users_code

Signals = dict[str, dict[str, float]]
"""Metrics by slot: "signal/<blueprint>", "cost/<blueprint>", "flops/<blueprint>"."""


@contextmanager
def kept(buffers: Iterable[Tensor]) -> Iterator[None]:
    """The buffers are afterwards what they were before."""
    before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def no_trace(state: TrainState, device: torch.device) -> Iterator[None]:
    """Buffers and random generators are afterwards what they were before."""
    streams = rng_tensors(device)
    with kept(buffer for _, buffer in named_buffers_of(state)):
        try:
            yield
        finally:
            load_rng_tensors(streams, device)


@contextmanager
def unweighted(seam: Tensor | None) -> Iterator[None]:
    """Every sample counts once: the seam, which holds the weights of the last microbatch, is of ones meanwhile."""
    with kept([] if seam is None else [seam]):
        if seam is not None:
            seam.fill_(1.0)
        yield


class GrowthSignal:
    """Measures the free slots at a boundary. Collective: all ranks call `measure` together.

    Raises ConfigError when ``kasmina.candidates`` names what is no blueprint.
    """

    def __init__(self, task: Task, state: TrainState, replica: Replica, loader: Loader, world: World) -> None:
        self.task = task
        self.state = state
        self.replica = replica
        self.loader = loader
        self.world = world
        chosen_names(replica.config.kasmina)  # a wrong name is told before training starts
        tamiyo = replica.config.tamiyo
        self._asked = bool(tamiyo.endpoint) or tamiyo.policy != POLICY_NONE

    def measure(self) -> Signals:
        """The metrics of every DORMANT slot, equal on every rank; empty when nothing could grow or nobody asks.

        One forward and backward pass over one batch, then the candidates alone. What fails, on any rank, is left out
        with an event: the run does not need it.
        """
        metrics: Signals = {}
        kasmina, config = self.state.kasmina, self.replica.config.kasmina
        free = [s for s in kasmina.seeds.values() if s.stage == SeedStage.DORMANT]
        if free and config.measure_signal and self._asked and not self.state.mode.conservative:
            found = {s.slot: c for s in free if (c := candidates_for(s.shape, config, kasmina.room))}
            with no_trace(self.state, self.world.device):
                passed = self._passed(found)
                for slot, signals in self._signals(found, passed).items():
                    metrics[slot] = {**_costs(found[slot]), **signals}
        return metrics

    def batch(self) -> Batch:
        """This rank's part of the boundary's batch: samples drawn by run seed and boundary, weighted to their mean."""
        sampler = self.state.sampler
        size = dataset_size(self.task.train, "training")
        generator = torch.Generator().manual_seed((sampler.seed * 1_000_003 + self.state.boundary) % 2**63)
        count = sampler.batch_size * self.world.world_size
        indices = torch.randint(size, (count,), generator=generator).tolist()
        first = self.world.global_rank * sampler.batch_size
        own = indices[first : first + sampler.batch_size]
        return next(
            iter(self.loader.batches(self.task.train, [(own, [1.0 / len(own)] * len(own))], seed=sampler.loader_seed))
        )

    def _passed(self, found: Mapping[str, list[Candidate]]) -> dict[str, Passed]:
        """(h, v) of every slot on this rank; nothing on all ranks if the pass failed on one, or finds differ."""
        passed: dict[str, Passed] = {}
        digest, reason = bytes(32), "another rank failed, or has other blueprints"
        try:
            with users_code("measuring what seeds would get"):
                passed = self._pass(found) if found else {}
            digest = hashlib.sha256(repr(found).encode()).digest()
        except TaskError as error:
            reason = str(error)
        digests = self.world.peers.gather_digests(digest)
        if bytes(32) not in digests and len(set(digests)) == 1:
            return passed
        self.replica.events.emit("signal_failed", "warning", reason=reason)
        return {}

    def _pass(self, slots: Iterable[str]) -> dict[str, Passed]:
        batch = self.batch()
        kasmina = self.state.kasmina
        with tapped(kasmina.slots, slots) as taps, unweighted(kasmina.seam):
            with self.replica.autocast():
                # forward by itself is eager: the taps would be compiled for one pass.
                loss = Objective.forward(self.state.objective, batch.inputs, batch.targets, batch.weights).sum()
            return passed_through(loss * self.state.scaler.get_scale(), taps)

    def _signals(self, found: Mapping[str, list[Candidate]], passed: Mapping[str, Passed]) -> Signals:
        """The size of each candidate's gradient over the whole batch of all ranks.

        A newborn depends on blueprint and shape alone, so it is built once for all slots; one is held at a time.
        """
        alike: dict[tuple[tuple[int, ...], Candidate], list[str]] = {}
        for slot in passed:
            for candidate in found[slot]:
                alike.setdefault((self.state.kasmina.seeds[slot].shape, candidate), []).append(slot)
        norms: dict[tuple[str, str], Tensor] = {}
        for (shape, candidate), slots in alike.items():
            seed = self._newborn(candidate.blueprint, shape)
            for slot in slots:
                whole = self._gradient(seed, candidate, passed[slot])
                if self.world.data_group is not None:
                    dist.all_reduce(whole, group=self.world.data_group)
                norms[slot, candidate.blueprint] = torch.linalg.vector_norm(whole, dtype=torch.float64)
        # A boundary may read the device, once.
        sizes = torch.stack(list(norms.values())).tolist() if norms else []
        scale = self.world.world_size * self.state.scaler.get_scale()
        signals: Signals = {slot: {} for slot in passed}
        for (slot, blueprint), size in zip(norms, sizes, strict=True):
            if math.isfinite(size):
                signals[slot][f"signal/{blueprint}"] = size / scale
        return signals

    def _newborn(self, name: str, shape: tuple[int, ...]) -> nn.Module | None:
        """None where the blueprint fails on this rank."""
        with suppress(TaskError), users_code(f"blueprint {name!r}"):
            return newborn(name, shape, run_seed=self.state.sampler.seed, device=self.world.device)
        return None

    def _gradient(self, seed: nn.Module | None, candidate: Candidate, passed: Passed) -> Tensor:
        """This rank's gradient; NaN where the blueprint fails on this rank, which leaves it out on all."""
        if seed is not None:
            with suppress(TaskError), users_code(f"blueprint {candidate.blueprint!r}"), kept(seed.buffers()):
                return birth_gradient(seed, passed, self.replica.autocast)
        return torch.full((candidate.parameters,), math.nan, device=self.world.device)


class ForwardCost:
    """Counts the FLOPs of one sample's forward pass, once for every structure. Local; the same on every rank."""

    def __init__(self, task: Task, state: TrainState, loader: Loader) -> None:
        self.task = task
        self.state = state
        self.loader = loader
        self._known: dict[object, int | None] = {}

    def flops(self) -> int | None:
        """Of the model in its present structure, as validation runs it; None where it cannot be counted."""
        key, model = self.state.kasmina.structure(), self.state.objective.model
        if key not in self._known:
            self._known[key] = None
            # Counting runs the model in a mode of torch that not every model's own code can live with.
            with suppress(TaskError), no_trace(self.state, self.loader.device), users_code("counting FLOPs"):
                batch = next(iter(self.loader.batches(self.task.validation, [([0, 0], [0.5, 0.5])])))
                with evaluating(self.state.objective):
                    self._known[key] = count_flops(lambda: model(batch.inputs)) // 2
        return self._known[key]


def _costs(candidates: list[Candidate]) -> dict[str, float]:
    costs: Mapping[str, float] = {f"cost/{c.blueprint}": float(c.parameters) for c in candidates}
    return {**costs, **{f"flops/{c.blueprint}": float(c.flops) for c in candidates if c.flops is not None}}
