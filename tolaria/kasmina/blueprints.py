"""Blueprints: named factories of seed modules, by the shape of what flows through the slot.

A seed is a function f that maps a batch of host activations h to the same shape; the slot adds it to h. The last
layer of every built-in starts at zero, so f(h) is exactly 0 at first while the gradient of that layer is not.

Shapes are per sample, without the batch dimension:

    rank 1  (features,)                 rank 2  (tokens, features)                 rank 3  (channels, height, width)
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tolaria.errors import CommandRefused

Build: TypeAlias = Callable[[tuple[int, ...]], nn.Module]

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")


@dataclass(frozen=True)
class Blueprint:
    """A named way to build a seed.

    ``build`` takes the per-sample shape at the slot and returns a module that maps (batch, *shape) to (batch, *shape)
    for any batch size; it runs on every rank with the random generator in the same state. ``ranks`` are the lengths
    of the shapes that it accepts. For people: ``summary`` (what it computes), ``init`` (what a new one starts from),
    ``use`` (when to grow it).
    """

    name: str
    ranks: frozenset[int]
    build: Build
    summary: str
    init: str = ""
    use: str = ""


class ChannelScale(nn.Module):
    """f(h) = s * h with one learned s per channel or feature: the cheapest seed there is."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        per_channel = (shape[0], 1, 1) if len(shape) == 3 else (shape[-1],)
        self.scale = nn.Parameter(torch.zeros(per_channel))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, *shape) -> the same."""
        return h * self.scale.to(h.dtype)


class ResidualMLP(nn.Module):
    """Layer norm and a two-layer perceptron, four times as wide inside, over the features of each token."""

    def __init__(self, shape: tuple[int, ...], expansion: int = 4) -> None:
        super().__init__()
        features = shape[-1]
        self.norm = nn.LayerNorm(features)
        self.up = nn.Linear(features, expansion * features)
        self.down = _zero(nn.Linear(expansion * features, features))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, *shape) -> the same."""
        down: Tensor = self.down(functional.gelu(self.up(self.norm(h))))
        return down


class ConvResidual(nn.Module):
    """Two 3x3 convolutions with group norm between, wider inside than the host where the host is narrow."""

    def __init__(self, shape: tuple[int, ...], min_hidden: int = 32) -> None:
        super().__init__()
        channels = shape[0]
        hidden = max(min_hidden, channels)
        self.widen = nn.Conv2d(channels, hidden, 3, padding=1)
        self.norm = nn.GroupNorm(_divisor(hidden, 8), hidden)
        self.narrow = _zero(nn.Conv2d(hidden, channels, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same."""
        narrow: Tensor = self.narrow(functional.gelu(self.norm(self.widen(h))))
        return narrow


class BottleneckAttention(nn.Module):
    """Self-attention in a quarter of the features, over the tokens of a sequence or the places of an image.

    Over sequences it is causal: a seed can not know whether its host is, and one that looks ahead in a causal host
    would see the answer. Over images every place sees every other.
    """

    def __init__(self, shape: tuple[int, ...], head_features: int = 16) -> None:
        super().__init__()
        self.image = len(shape) == 3
        features = shape[0] if self.image else shape[-1]
        self.heads = max(1, features // 4 // head_features)
        inner = self.heads * min(head_features, max(4, features // 4))
        self.norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * inner, bias=False)
        self.out = _zero(nn.Linear(inner, features))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, *shape) -> the same."""
        x = h.flatten(2).transpose(1, 2) if self.image else h  # (batch, tokens, features)
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()  # each (batch, heads, tokens, head features)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=not self.image)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out.transpose(1, 2).reshape(h.shape) if self.image else out


class LowRank(nn.Module):
    """A linear map of low rank over the features of each token, or over the channels at each place of an image."""

    def __init__(self, shape: tuple[int, ...], max_rank: int = 8) -> None:
        super().__init__()
        self.image = len(shape) == 3
        features = shape[0] if self.image else shape[-1]
        rank = max(1, min(max_rank, features // 4))
        self.norm = nn.LayerNorm(features)
        self.down = nn.Linear(features, rank, bias=False)
        self.up = _zero(nn.Linear(rank, features))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, *shape) -> the same."""
        x = h.movedim(1, -1) if self.image else h
        up: Tensor = self.up(self.down(self.norm(x)))
        return up.movedim(-1, 1) if self.image else up


def _zero(layer: _Layer) -> _Layer:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _divisor(number: int, largest: int) -> int:
    return next(d for d in range(largest, 0, -1) if number % d == 0)


def _built_in(
    name: str, ranks: Iterable[int], build: Build, summary: str, init: str, use: str
) -> tuple[str, Blueprint]:  # fmt: skip
    return name, Blueprint(name, frozenset(ranks), build, summary, init, use)


_BLUEPRINTS: dict[str, Blueprint] = dict([
    _built_in(
        "identity", (1, 2, 3), ChannelScale, "one learned factor per channel or feature", "all factors 0",
        "almost for nothing: lets a run turn single channels up or down",
    ),
    _built_in(
        "low_rank", (1, 2, 3), LowRank, "layer norm and a linear map of rank up to 8 over channels or features",
        "down: torch's default, up: 0", "few parameters: mixes features that the host keeps apart",
    ),
    _built_in(
        "residual_mlp", (1, 2), ResidualMLP, "layer norm and a two-layer perceptron, 4 x as wide inside",
        "up: torch's default, down: 0", "the usual choice for vectors and tokens: capacity at each token",
    ),
    _built_in(
        "conv_residual", (3,), ConvResidual, "two 3x3 convolutions, 32 channels inside or as wide as the host",
        "widen: torch's default, narrow: 0", "the usual choice for images: capacity where features are local",
    ),
    _built_in(
        "bottleneck_attention", (2, 3), BottleneckAttention, "layer norm and self-attention in a quarter of the "
        "features, causal over tokens", "query, key and value: torch's default, out: 0",
        "when places far apart must see each other and the host has no attention there",
    ),
])  # fmt: skip

BUILT_IN = frozenset(_BLUEPRINTS)
"""The names of those that are there in every run."""


def register_blueprint(
    name: str,
    build: Build,
    *,
    ranks: Iterable[int] = (1, 2, 3),
    summary: str = "",
    init: str = "",
    use: str = "",
) -> None:
    """Make a blueprint known under ``name``; call it on every rank, before training starts (in the task's function).

    Local. See `Blueprint` for what ``build`` must do; start its last layer at zero, so that a new seed disturbs
    nothing. Registering the same function again is fine. Raises ValueError for a name that is taken or malformed, and
    for ranks that are not whole numbers from 1 on.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"blueprint name {name!r}: expected 1 to 64 letters, digits, '_', '.' or '-'")
    accepted = frozenset(ranks)
    if not accepted or min(accepted) < 1:
        raise ValueError(f"blueprint {name!r}: ranks={sorted(accepted)}: expected whole numbers from 1 on")
    known = _BLUEPRINTS.get(name)
    if known is not None and known.build is not build:
        raise ValueError(f"blueprint {name!r} is registered already, with another function; choose another name")
    _BLUEPRINTS[name] = Blueprint(name, accepted, build, summary, init, use)


def get_blueprint(name: str) -> Blueprint:
    """The blueprint of that name. Raises CommandRefused (code ``unknown_blueprint``) that lists the known ones."""
    if name not in _BLUEPRINTS:
        known = ", ".join(blueprint_names())
        raise CommandRefused("unknown_blueprint", f"blueprint {name!r} is not known; known are {known}")
    return _BLUEPRINTS[name]


def blueprint_names() -> tuple[str, ...]:
    """The names of all blueprints, sorted."""
    return tuple(sorted(_BLUEPRINTS))
