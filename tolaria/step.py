"""One optimizer step.

microbatches   forward + loss (autocast, compiled) -> backward; reduced over ranks once, in or after the last one
shadows        TRAINING seeds learn beside the host, in a collective of their own
gradients      unscale -> norms -> clip, host and each seed by itself; those of frozen groups are dropped
verdict        is the reduced gradient finite, and may the step count? the same answer on every rank
update         LR -> optimizer -> scaler -> zero
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from tolaria.fence import Verdict
from tolaria.kasmina.seed import Seed
from tolaria.leyline.types import CLIP_NORM
from tolaria.objective import Batch
from tolaria.optim.lr import VIOLATIONS_TO_OPEN
from tolaria.phases import Phases, unseen
from tolaria.replica import Replica
from tolaria.state import HOST_GROUP, TrainState
from tolaria.telemetry.events import EventLog

LR_TAMPERED = f"learning rates were changed from outside at {VIOLATIONS_TO_OPEN} steps"


class StepResult(NamedTuple):
    """``loss``: this rank's part; its mean over ranks is the mean over the step's samples.

    ``taken`` is False when the reduced gradient was not finite and nothing was updated, alike on all ranks.
    ``verdict``: what the fence said before the update, if there was one. ``alone_until``: the last moment that does not
    depend on other ranks (`time.perf_counter`): the end of the last forward pass, or, where the step begins by sending
    buffers to all ranks, its beginning.
    """

    loss: float
    taken: bool
    verdict: Verdict | None
    alone_until: float


class TrainStep:
    """Takes one optimizer step from a group of microbatches. Collective; all ranks call it alike."""

    def __init__(
        self, state: TrainState, replica: Replica, events: EventLog, *, debug: bool, phases: Phases = unseen
    ) -> None:  # fmt: skip
        self.state = state
        self.replica = replica
        self.events = events
        self.debug = debug
        self.phases = phases
        self._alone_until = 0.0
        self._scaler_judged = False

    def __call__(self, group: Sequence[Batch], close_fence: Callable[[], Verdict | None]) -> StepResult:
        """``group``: the microbatches of this step on the device, at least one.

        ``close_fence`` is called once, between the gradients and the update; None where the step has no fence. What it
        raises leaves parameters and optimizer as they were before the step.
        """
        phases, frozen = self.phases, self.state.lr.frozen
        with torch.autograd.set_detect_anomaly(True) if self.debug else nullcontext():
            loss = self._backward(group)
        with phases("clip"):
            seeds = self.state.kasmina.learning_seeds()
            self._unscale(seeds, frozen)
            value, taken = self._judge_and_clip(loss, seeds, frozen)
        with phases("fence"):
            verdict = close_fence()
        if verdict is not None and verdict.lr_changed:
            self._count_lr_violation()
        with phases("optimizer"):
            self._update(taken)
        return StepResult(value, taken, verdict, self._alone_until)

    def _backward(self, group: Sequence[Batch]) -> Tensor:
        sync, phases = self.replica.sync, self.phases
        self.replica.keep_buffers()
        total: Tensor | None = None
        started = perf_counter()
        sync.begin()
        for position, batch in enumerate(group, start=1):
            with sync.microbatch(batch, position - 1, last=position == len(group)):
                with phases("forward"), self.replica.autocast():
                    loss = self.replica.loss(batch)
                self._alone_until = started if sync.sends_buffers else perf_counter()
                with phases("backward"):
                    piece = sync.backward(loss)
                total = piece if total is None else total + piece
            self.replica.shadow_backward(batch)
        with phases("sync"):
            sync.finish()
            self.replica.average_shadow_gradients()
        assert total is not None  # noqa: S101 - a group has at least one microbatch
        return total

    def _judge_and_clip(self, loss: Tensor, seeds: Sequence[Seed], frozen: frozenset[str]) -> tuple[float, bool]:
        """The step's loss as a number, and whether the step may count, equal on all ranks."""
        host = _gradients(self.state.host_parameters.values())
        grown = [_gradients(seed.named_parameters().values()) for seed in seeds]
        # The one host read of a step: the verdict decides on the host whether the optimizer runs, and the loss, which
        # the next fence carries, comes along.
        norms: list[float]
        value, *norms = torch.stack([loss, gradient_norm(host), *map(gradient_norm, grown)]).tolist()
        bounds = {group["name"]: group[CLIP_NORM] for group in self.state.optimizer.param_groups}
        self.state.kasmina.host_norms.add(norms[0])
        learns = False
        for seed, gradients, norm in zip(seeds, grown, norms[1:], strict=True):
            seed.norms.add(norm)
            if not math.isfinite(norm):
                self._drop(seed)
            elif seed.group in frozen:
                _drop_gradients(seed.named_parameters().values())
            else:
                learns = True
                _clip(gradients, bounds[seed.group], norm)
        if HOST_GROUP in frozen:
            _drop_gradients(self.state.host_parameters.values())
            # A frozen host's gradient is used for nothing, so it can spoil nothing that a seed learns from a sound one.
            return value, learns or math.isfinite(norms[0])
        if math.isfinite(norms[0]):
            _clip(host, bounds[HOST_GROUP], norms[0])
            return value, True
        return value, False

    def _unscale(self, seeds: Sequence[Seed], frozen: frozenset[str]) -> None:
        scaler = self.state.scaler
        if not scaler.is_enabled():
            return
        # The scaler judges every gradient the optimizer holds; a seed's overflow must not skip the host's step, and a
        # frozen group's nobody's. With the host frozen, the seeds are what the scale has to fit.
        groups = {HOST_GROUP: self.state.host_parameters, **{s.group: s.named_parameters() for s in seeds}}
        judged = ({HOST_GROUP} if HOST_GROUP not in frozen else set(groups)) - frozen
        held = [(p, p.grad) for n, members in groups.items() if n not in judged for p in members.values()]
        for parameter, _ in held:
            parameter.grad = None
        # It does not step, nor adapt its scale, without a gradient to judge by.
        self._scaler_judged = any(p.grad is not None for n in judged for p in groups[n].values())
        if self._scaler_judged:
            scaler.unscale_(self.state.optimizer)
        if gradients := [g for _, g in held if g is not None]:
            torch._foreach_div_(gradients, scaler.get_scale())
        for parameter, gradient in held:
            parameter.grad = gradient

    def _drop(self, seed: Seed) -> None:
        _drop_gradients(seed.named_parameters().values())
        self.replica.put_back_buffers(f"{seed.group}/")
        self.events.emit("seed_gradient_not_finite", "warning", seed=seed.slot)

    def _count_lr_violation(self) -> None:
        """Some rank found that somebody else had written a learning rate; the third time it is enough. On all ranks."""
        state, before = self.state, self.state.mode
        opened = state.lr.count_violation()
        if state.lr.tampered:
            state.mode = replace(before, conservative=True, reason=before.reason or LR_TAMPERED, healthy=0)
        if opened and self.replica.world.is_coordinator:
            self.events.emit("lr_breaker_opened", "error", reason=LR_TAMPERED)
            if not before.conservative:
                self.events.emit("mode_changed", "warning", mode=state.mode.name, reason=state.mode.reason)

    def _update(self, taken: bool) -> None:
        state = self.state
        if taken:
            for violation in state.lr.apply(state.optimizer, state.step):
                self.events.emit("lr_violation", "error", **violation._asdict())
            if self.replica.compiled_step is not None:
                self.replica.compiled_step(state.optimizer)
            elif self._scaler_judged or not state.scaler.is_enabled():
                state.scaler.step(state.optimizer)
        else:
            # What made the gradient bad is in the running statistics too, and would stay there.
            self.replica.put_back_buffers()
            self.events.emit("step_skipped", "warning", reason="the reduced gradient is not finite")
        if state.scaler.is_enabled() and self._scaler_judged:
            state.scaler.update()
        # Optimizer.zero_grad does the same inside a profiler range, which costs 25 microseconds.
        for group in state.optimizer.param_groups:
            _drop_gradients(group["params"])


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    # Without a gradient the optimizer passes a parameter over: no update, no decay, its state as it is.
    for parameter in parameters:
        parameter.grad = None


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of all together, 0-D float32 on their device; 0 without any. Does not wait."""
    if len({g.dtype for g in gradients}) != 1:
        return get_total_norm(gradients).float()
    # What `get_total_norm` does for tensors of one type, without sorting them by type: 15 microseconds less.
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm.float()


def _clip(gradients: list[Tensor], bound: float, norm: float) -> None:
    """Scale gradients of this norm down to ``bound``; 0: no bound."""
    share = bound / (norm + 1e-6)
    if bound and share < 1.0:
        torch._foreach_mul_(gradients, share)
