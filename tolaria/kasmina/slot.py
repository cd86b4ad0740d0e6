"""A slot: the place in the host where a seed can grow, and the forms it takes from stage to stage.

    h ----------------> HostOnly         h                      no cost
    h --+-------------> StraightThrough  h, gradient also to f  TRAINING, cheap signal
        |  +- f(h') --/
    h --+-------------> Blend            h + alpha * f(h')      BLENDING, h' detached
    h --+-------------> Active, Frozen   h + f(h)               PROBATIONARY, FOSSILIZED

A stage change swaps the module object in `Slot.form`, so that each structure is compiled once and coming back to
one costs nothing; alpha is a 0-D buffer, so that its change never retraces.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tolaria.errors import TaskError
from tolaria.kasmina.seam import seed_input, seed_output

_SLOT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class HostOnly(nn.Module):
    """The host's own output, untouched."""

    def forward(self, h: Tensor) -> Tensor:
        """Return ``h`` itself."""
        return h


class Active(nn.Module):
    """The seed in full: ``h + f(h)`` (residual) or ``f(h)`` (convex at alpha 1).

    ``seam``: the weights of a batch's samples where they are weighted (see `tolaria.kasmina.seam`), else None.
    """

    def __init__(self, seed: nn.Module, blend: str, seam: Tensor | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.residual = blend == "residual"
        self.seam = seam

    def forward(self, h: Tensor) -> Tensor:
        """``h``: (batch, ...); the same shape comes back."""
        f: Tensor = seed_output(self.seed(seed_input(h, self.seam)), self.seam).to(h.dtype)
        return h + f if self.residual else f


class Frozen(Active):
    """`Active` with a seed that does not learn now.

    A class of its own, since torch 2.11's guards do not see that requires_grad changed on parameters they know, and
    would go on running a graph without the seed's gradients.
    """


class Blend(nn.Module):
    """The seed mixed in with weight alpha; what the seed reads is detached, so only ``h`` itself trains the host."""

    alpha: Tensor

    def __init__(self, seed: nn.Module, alpha: Tensor, blend: str, seam: Tensor | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("alpha", alpha, persistent=False)
        self.residual = blend == "residual"
        self.seam = seam

    def forward(self, h: Tensor) -> Tensor:
        """``h``: (batch, ...); the same shape comes back."""
        f: Tensor = seed_output(self.seed(h.detach()), self.seam).to(h.dtype)
        return h + self.alpha * f if self.residual else (1 - self.alpha) * h + self.alpha * f


class _HostForwardSeedBackward(torch.autograd.Function):
    """Forward: the host's tensor. Backward: the same gradient to the host, bit for bit, and to the seed."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, f: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


class StraightThrough(nn.Module):
    """Host output, while the seed gets the gradient it would have at alpha 1 (first order only).

    The objective is linear in f and so unbounded; f is scaled down per sample to at most ``ratio`` times the norm of
    h, which removes the gradient's component along a growing f. A NaN in f never reaches h or its gradient.
    """

    def __init__(self, seed: nn.Module, ratio: float, seam: Tensor | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.ratio = ratio
        self.seam = seam

    def forward(self, h: Tensor) -> Tensor:
        """``h`` unchanged; the seed is in the backward only."""
        f = self.seed(h.detach())
        h_norm = h.detach().flatten(1).norm(dim=1)
        f_norm = f.flatten(1).norm(dim=1)
        scale = (self.ratio * h_norm / f_norm.clamp_min(1e-12)).clamp_max(1.0)
        bounded = (f * scale.view(-1, *([1] * (f.dim() - 1)))).to(h.dtype)
        return _HostForwardSeedBackward.apply(h, seed_output(bounded, self.seam))  # type: ignore[no-any-return,no-untyped-call]


class Gauge(nn.Module):
    """`Active` that measures itself: sums of squares of h and f and a count of non-finite values.

    ``totals`` has shape (3,), float64: sum of h^2, sum of f^2, number of non-finite elements of f. For validation.
    """

    def __init__(self, seed: nn.Module, blend: str) -> None:
        super().__init__()
        self.seed = seed
        self.residual = blend == "residual"
        self.totals = torch.zeros(3, dtype=torch.float64)
        self.mismatch = ""

    def forward(self, h: Tensor) -> Tensor:
        """``h`` with the seed in full, measured."""
        f: Tensor = self.seed(h)
        if f.shape != h.shape:
            self.mismatch = f"{tuple(f.shape)} instead of {tuple(h.shape)}"
        squares = [h.double().square().sum(), f.double().square().sum(), (~f.isfinite()).sum().double()]
        # Where h is: to bring each batch's sums to the host would wait for the device each time.
        self.totals = self.totals.to(h.device) + torch.stack(squares)
        f = f.to(h.dtype)
        return h + f if self.residual else f


class _ShapeProbe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, ...] | None = None
        self.carries = ""

    def forward(self, h: Any) -> Any:
        """Note shape and type."""
        self.carries = str(h.dtype) if isinstance(h, Tensor) else f"a {type(h).__name__}"
        if isinstance(h, Tensor) and h.dtype.is_floating_point:
            self.shape = tuple(h.shape[1:])
        return h


class Slot(nn.Module):
    """A named place to grow. Put one into a model, or let Tolaria attach one to a module's output by path.

    ``forward(h)`` maps a tensor of shape (batch, ...) to the same shape; without a seed it returns ``h`` itself.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        # A slot's name travels as an id in messages, which is ASCII.
        if _SLOT_NAME.fullmatch(name) is None:
            raise TaskError(f"slot name {name!r}: expected 1 to 64 of a-z A-Z 0-9 - _ . starting with none of - .")
        self.name = name
        self.form: nn.Module = HostOnly()

    def forward(self, h: Tensor) -> Tensor:
        """``h``: (batch, ...), through the present form."""
        return self.form(h)  # type: ignore[no-any-return]


class SlotHook:
    """Forward hook that sends a module's output through a slot. An object, so that a copied model copies it too."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """torch's forward hook: what it returns replaces the module's output."""
        return self.slot(output)


def attach(model: nn.Module, name: str, path: str) -> tuple[Slot, RemovableHandle]:
    """Attach a new slot to the output of the module at ``path``; the model's source and names stay as they are."""
    modules = dict(model.named_modules())
    if path not in modules or path == "":
        known = ", ".join(sorted(p for p in modules if p)[:12])
        raise TaskError(f"slot {name!r}: the model has no module {path!r}; it has {known} ...")
    slot = Slot(name)
    return slot, modules[path].register_forward_hook(SlotHook(slot))


def find_slots(model: nn.Module) -> dict[str, Slot]:
    """The slots that a model contains, by name. Raises TaskError for two of one name."""
    found: dict[str, Slot] = {}
    for path, module in model.named_modules():
        if isinstance(module, Slot):
            if module.name in found:
                raise TaskError(f"two slots are named {module.name!r} (the second one is at {path!r})")
            found[module.name] = module
    return found


def probe_shapes(slots: dict[str, Slot], forward: Any) -> dict[str, tuple[int, ...]]:
    """Run ``forward()`` once with every slot listening; the per-sample shape each slot saw.

    Raises TaskError for a slot that was not reached or whose value is not a floating-point tensor.
    """
    probes = {name: _ShapeProbe() for name in slots}
    forms = {name: slot.form for name, slot in slots.items()}
    for name, slot in slots.items():
        slot.form = probes[name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for name, slot in slots.items():
            slot.form = forms[name]
    shapes = {}
    for name, probe in probes.items():
        if not probe.carries:
            raise TaskError(f"slot {name!r}: nothing passed through it in a forward pass")
        if probe.shape is None:
            raise TaskError(f"slot {name!r}: carries {probe.carries}; expected a floating-point tensor")
        shapes[name] = probe.shape
    return shapes
