"""One optimizer step.

microbatches   forward + loss (autocast, compiled) -> backward; reduced over ranks once, in or after the last one
shadows        TRAINING seeds learn beside the host, in a collective of their own
gradients      unscale -> norms -> clip, host and each seed by itself
verdict        is the reduced gradient finite, and may the step count? the same answer on every rank
update         LR -> optimizer -> scaler -> zero
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tolaria.fence import Verdict
from tolaria.kasmina.seed import Seed
from tolaria.objective import Batch
from tolaria.replica import Replica
from tolaria.state import TrainState
from tolaria.telemetry.events import EventLog


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

    def __init__(self, state: TrainState, replica: Replica, events: EventLog, *, clip_norm: float, debug: bool) -> None:
        self.state = state
        self.replica = replica
        self.events = events
        self.clip_norm = clip_norm
        self.debug = debug
        self._alone_until = 0.0

    def __call__(self, group: Sequence[Batch], close_fence: Callable[[], Verdict]) -> StepResult:
        """``group``: the microbatches of this step on the device, at least one.

        ``close_fence`` is called once, between the gradients and the update. What it raises leaves parameters and
        optimizer as they were before the step.
        """
        self.replica.keep_buffers()
        with torch.autograd.set_detect_anomaly(True) if self.debug else nullcontext():
            loss = self._backward(group)
        host = _gradients(self.state.host_parameters.values())
        seeds = [(s, _gradients(s.named_parameters().values())) for s in self.state.kasmina.learning_seeds()]
        self._unscale(host, seeds)
        norms = torch.stack([get_total_norm(host), *(get_total_norm(g) for _, g in seeds)])
        # The one host read of a step: the verdict decides on the host whether the optimizer runs, and the loss, which
        # the next fence carries, comes along.
        value, *read = torch.cat([loss[None], norms]).tolist()
        finite = [math.isfinite(norm) for norm in read]
        self.state.kasmina.host_norms.add(norms[0])
        for (seed, _), norm, ok in zip(seeds, norms[1:], finite[1:], strict=True):
            seed.norms.add(norm)
            if not ok:
                self._drop(seed)
            elif self.clip_norm:
                clip_grads_with_norm_(seed.named_parameters().values(), self.clip_norm, norm)
        taken = finite[0]
        if taken and self.clip_norm:
            clip_grads_with_norm_(self.state.host_parameters.values(), self.clip_norm, norms[0])
        verdict = close_fence()
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

    def _unscale(self, host: list[Tensor], seeds: list[tuple[Seed, list[Tensor]]]) -> None:
        scaler = self.state.scaler
        if not scaler.is_enabled():
            return
        # The scaler judges every gradient the optimizer holds; a seed's overflow must not skip the host's step.
        held = [(p, p.grad) for s, _ in seeds for p in s.named_parameters().values()]
        for parameter, _ in held:
            parameter.grad = None
        scaler.unscale_(self.state.optimizer)
        if gradients := [g for _, g in held if g is not None]:
            torch._foreach_div_(gradients, scaler.get_scale())
        for parameter, gradient in held:
            parameter.grad = gradient

    def _drop(self, seed: Seed) -> None:
        for parameter in seed.named_parameters().values():
            parameter.grad = None
        self.replica.put_back_buffers(f"{seed.group}/")
        self.events.emit("seed_gradient_not_finite", "warning", seed=seed.slot)

    def _update(self, taken: bool) -> None:
        state = self.state
        if taken:
            for violation in state.lr.apply(state.optimizer, state.step):
                self.events.emit("lr_violation", "error", **violation._asdict())
            state.scaler.step(state.optimizer)
        else:
            # What made the gradient bad is in the running statistics too, and would stay there.
            self.replica.put_back_buffers()
            self.events.emit("step_skipped", "warning", reason="the reduced gradient is not finite")
        if state.scaler.is_enabled():
            state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
