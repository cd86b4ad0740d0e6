"""What the host of a `Rig` shows of itself step by step, where two runs differ in it, and a form that leaks."""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tests.rig import Rig, host_momentum, same_bits

Trace: TypeAlias = dict[str, Tensor]


def trace(rig: Rig, steps: int, *, logits: bool = True) -> list[Trace]:
    """Take steps; of each: logits, loss, host gradients as the optimizer gets them, then parameters, buffers, optimizer
    state and random stream. Without ``logits`` no hook is put on the model (a compiled one would be traced anew).
    """
    return [_one_step(rig, logits=logits) for _ in range(steps)]


def _one_step(rig: Rig, *, logits: bool) -> Trace:
    seen: Trace = {}
    state = rig.state

    def note_logits(module: nn.Module, args: Any, output: Tensor) -> None:
        seen[f"logits {len(seen)}"] = output.detach().clone()

    def note_gradients(optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients = {n: p.grad for n, p in state.host_parameters.items()}
        seen.update({f"gradient {n}": g.clone() for n, g in gradients.items() if g is not None})

    hooks = [state.optimizer.register_step_pre_hook(note_gradients)]
    if logits:
        hooks.append(state.objective.model.register_forward_hook(note_logits))
    result = rig.take_step()
    for hook in hooks:
        hook.remove()
    state.after_step(taken=result.taken)
    seen["loss"] = torch.tensor(result.loss)
    seen["random stream"] = torch.get_rng_state()
    seen.update({f"parameter {n}": p.detach().clone() for n, p in state.host_parameters.items()})
    seen.update({f"buffer {n}": b.clone() for n, b in state.host_buffers.items()})
    seen.update({f"optimizer {n}": t for n, t in host_momentum(state).items()})
    return seen


def differences(one: list[Trace], other: list[Trace]) -> list[str]:
    """Where two runs' traces are not equal bit for bit: "step 0: gradient inlet.weight" and so on."""
    assert len(one) == len(other)
    found = []
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        missing = sorted(a.keys() ^ b.keys())
        unequal = [name for name in a if name in b and not same_bits(a[name], b[name])]
        found += [f"step {step}: {name}" for name in missing + unequal]
    return found


class Leaky(nn.Module):
    """A form that shows the host's value and lets the seed learn, but what the seed reads is not detached."""

    def __init__(self, seed: nn.Module) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, h: Tensor) -> Tensor:
        """h, with the gradient of h + f(h)."""
        f: Tensor = self.seed(h)
        return h + (f - f.detach())
