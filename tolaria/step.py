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
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

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


@dataclass(frozen=True)
class StepResult:
    """``loss``: this rank's part, 0-D on the device; its mean over ranks is the mean over the step's samples.

    ``value``: the same as a number. ``taken`` is False when the reduced gradient was not finite and nothing was
    updated, alike on all ranks. ``verdict``: what the fence said before the update. ``alone_until``: the last
    moment that does not depend on other ranks (`time.perf_counter`): the end of the last forward pass, or, where the
    step begins by sending buffers to all ranks, its beginning.
    """

    loss: Tensor
    value: float
    taken: bool
    verdict: Verdict
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

    def __call__(self, group: Sequence[Batch], close_fence: Callable[[], Verdict]) -> StepResult:
        """``group``: the microbatches of this step on the device, at least one.

        ``close_fence`` is called once, between the gradients and the update. What it raises leaves parameters and
        optimizer as they were before the step.
        """
        self.replica.keep_buffers()
        with torch.autograd.set_detect_anomaly(True) if self.debug else nullcontext():
            loss = self._backward(group)
        frozen = self.state.lr.frozen
        host = _gradients(self.state.host_parameters.values())
        seeds = [(s, _gradients(s.named_parameters().values())) for s in self.state.kasmina.learning_seeds()]
        self._unscale([seed for seed, _ in seeds], frozen)
        norms = torch.stack([get_total_norm(host), *(get_total_norm(g) for _, g in seeds)])
        # The one host read of a step: the verdict decides on the host whether the optimizer runs, and the loss, which
        # the next fence carries, comes along.
        value, *read = torch.cat([loss[None], norms]).tolist()
        finite = [math.isfinite(norm) for norm in read]
        clip_norms = {group["name"]: group[CLIP_NORM] for group in self.state.optimizer.param_groups}
        self.state.kasmina.host_norms.add(norms[0])
        for (seed, _), norm, ok in zip(seeds, norms[1:], finite[1:], strict=True):
            seed.norms.add(norm)
            if not ok:
                self._drop(seed)
            elif seed.group in frozen:
                _drop_gradients(seed.named_parameters().values())
            else:
                _clip(seed.named_parameters().values(), clip_norms[seed.group], norm)
        # A frozen host's gradient is used for nothing, so it can spoil nothing that a seed learns from a sound one.
        learns = any(ok and seed.group not in frozen for (seed, _), ok in zip(seeds, finite[1:], strict=True))
        taken = finite[0] or (HOST_GROUP in frozen and learns)
        if HOST_GROUP in frozen:
            _drop_gradients(self.state.host_parameters.values())
        elif taken:
            _clip(self.state.host_parameters.values(), clip_norms[HOST_GROUP], norms[0])
        verdict = close_fence()
        if verdict.lr_changed:
            self._count_lr_violation()
        self._update(taken)
        return StepResult(loss, value, taken, verdict, self._alone_until)

    def _backward(self, group: Sequence[Batch]) -> Tensor:
        sync = self.replica.sync
        total = torch.zeros((), device=self.replica.world.device)
        started = perf_counter()
        sync.begin()
        for position, batch in enumerate(group):
            with sync.microbatch(batch, position, last=position == len(group) - 1):
                with self.replica.autocast():
                    loss = self.replica.loss(batch)
                self._alone_until = started if sync.sends_buffers else perf_counter()
                total += sync.backward(loss)
            self.replica.shadow_backward(batch)
        sync.finish()
        self.replica.average_shadow_gradients()
        return total

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
        state.optimizer.zero_grad(set_to_none=True)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    # Without a gradient the optimizer passes a parameter over: no update, no decay, its state as it is.
    for parameter in parameters:
        parameter.grad = None


def _clip(parameters: Iterable[nn.Parameter], bound: float, norm: Tensor) -> None:
    if bound:
        clip_grads_with_norm_(parameters, bound, norm)
