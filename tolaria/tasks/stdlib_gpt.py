"""A byte-level GPT on the source of Python's own standard library."""

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tolaria.errors import TaskError
from tolaria.task import Task

VOCABULARY = 256
VALIDATION_ONE_IN = 10
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class Windows(Dataset[Any]):
    """Consecutive windows of a text: inputs and the bytes that follow them, both int64 (context,)."""

    def __init__(self, text: bytes, context: int) -> None:
        if len(text) <= context:
            raise TaskError(f"{len(text)} bytes of text hold no window of context={context}; use more text or less")
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        starts = torch.tensor(indices).unsqueeze(1) * self.context
        window = self.bytes[starts + torch.arange(self.context + 1)].long()  # (batch, context + 1)
        return window[:, :-1], window[:, 1:]


class Block(nn.Module):
    """One pre-norm transformer block: causal attention, then a perceptron, each added to its input."""

    def __init__(self, features: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.attention_out = nn.Linear(features, features, bias=False)
        self.mlp_norm = nn.LayerNorm(features)
        self.up = nn.Linear(features, expansion * features)
        self.down = nn.Linear(expansion * features, features)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, features) -> the same."""
        batch, time, features = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, features // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (batch, heads, time, features / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, features))
        out: Tensor = x + self.down(functional.gelu(self.up(self.mlp_norm(x))))
        return out


class ByteGPT(nn.Module):
    """Embedding of bytes and positions, blocks, and a linear layer to the logits of the next byte."""

    def __init__(self, *, layers: int, features: int, heads: int, context: int, expansion: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, features)
        self.positions = nn.Embedding(context, features)
        self.blocks = nn.ModuleList(Block(features, heads, expansion) for _ in range(layers))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream is smaller the more blocks add to it.
                into_stream = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if into_stream else 0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """int64 (batch, time) -> logits (batch, time, 256)."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.bytes(inputs) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def source_files(root: Path) -> Iterator[Path]:
    """The .py files of the standard library below ``root``, without tests and installed packages.

    Their order is that of a hash of the relative path: fixed, yet any first part of it is a fair sample.
    """
    found: dict[bytes, Path] = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and path.is_file():
            found[hashlib.sha256(relative.as_posix().encode()).digest()] = path
    return (found[digest] for digest in sorted(found))


def load_text(root: Path, max_train_bytes: int, max_validation_bytes: int) -> tuple[bytes, bytes]:
    """Training and validation text: one file in ten is held out, each text is cut at its limit in bytes."""
    texts = bytearray(), bytearray()
    limits = max_train_bytes, max_validation_bytes
    for index, path in enumerate(source_files(root)):
        part = int(index % VALIDATION_ONE_IN == 0)
        if len(texts[part]) < limits[part]:
            texts[part].extend(path.read_bytes() + b"\n")
        if all(len(text) >= limit for text, limit in zip(texts, limits, strict=True)):
            break
    train, validation = (bytes(text[:limit]) for text, limit in zip(texts, limits, strict=True))
    return train, validation


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per byte in nats, float32 (batch, time)."""
    return functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the next byte was guessed, else 0; float32 (batch, time)."""
    return (logits.argmax(dim=-1) == targets).float()


def bits_per_byte(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss in bits, float32 (batch, time)."""
    return loss(logits, targets) / math.log(2)


def make_task(
    layers: int = 4,
    features: int = 128,
    heads: int = 4,
    context: int = 128,
    expansion: int = 4,
    max_train_bytes: int = 2_000_000,
    max_validation_bytes: int = 200_000,
) -> Task:
    """The task. Slots: middle (after the block in the middle) and last (after the last block).

    ``expansion``: inner width of each block's perceptron, in ``features``.
    """
    if layers < 2 or context < 1:
        raise TaskError(f"task.args.layers={layers}, context={context}: expected 2 or more layers, 1 or more bytes")
    if expansion < 1:
        raise TaskError(f"task.args.expansion={expansion}: expected 1 or more")
    if heads < 1 or features % heads:
        raise TaskError(f"task.args.features={features}: expected a multiple of heads={heads}")
    root = Path(sysconfig.get_path("stdlib"))
    train, validation = load_text(root, max_train_bytes, max_validation_bytes)
    return Task(
        model=ByteGPT(layers=layers, features=features, heads=heads, context=context, expansion=expansion),
        loss=loss,
        train=Windows(train, context),
        validation=Windows(validation, context),
        accuracy=accuracy,
        metrics={"bits_per_byte": bits_per_byte},
        slots={"middle": f"blocks.{layers // 2 - 1}", "last": f"blocks.{layers - 1}"},
        collate=_already_batched,
    )


def _already_batched(batch: Any) -> Any:
    return batch
