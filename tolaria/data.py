"""Which rank sees which sample when: a sampler with a cursor, batches of one shape, no rank ever without a batch.

    epoch order   permutation of (seed, epoch), the same on every rank
    one group     accumulation x ranks x batch samples in a row of that order
    rank r        microbatch m is the (m * ranks + r)-th run of `batch` samples in the group

The last group of an epoch is filled up with samples of weight 0, so that every sample counts exactly once, every
rank takes part in every collective, and the shapes (and with them the compiled graph) never change.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tolaria.config import DataConfig
from tolaria.errors import TaskError
from tolaria.objective import Batch
from tolaria.task import NOBODY, Task, users_code
from tolaria.workers import LOOK_S, load

Plan = list[tuple[list[int], list[float]]]
Window = tuple[int, int, int]
"""A run of samples in an epoch's order: (epoch, first position, end position)."""


def dataset_size(dataset: Dataset[Any], what: str) -> int:
    """Number of samples. Raises TaskError for a dataset without a length or without samples."""
    try:
        size = len(cast(Sized, dataset))
    except TypeError as error:
        raise TaskError(f"the task's {what} data has no len(); expected a map-style dataset") from error
    if size < 1:
        raise TaskError(f"the task's {what} data is empty")
    return size


class EpochSampler:
    """The position in the data: (seed, epoch, cursor). The cursor counts samples of the epoch over all ranks.

    Windows of an epoch's order can be left out; every other sample is still seen exactly once. The state is the same
    on every rank and does not depend on their number, so another number of ranks may resume.
    """

    def __init__(
        self, num_samples: int, *, seed: int, rank: int, world_size: int, batch_size: int, accumulation: int
    ) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.epoch = 0
        self.cursor = 0
        self.skipped: list[Window] = []

    @property
    def group_size(self) -> int:
        """Samples of one optimizer step over all ranks and microbatches."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may be partly filled."""
        return -(-self.num_samples // self.group_size)

    def order(self, epoch: int | None = None) -> list[int]:
        """The sample order of an epoch, of the present one by default."""
        which = self.epoch if epoch is None else epoch
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + which) % 2**63)
        order: list[int] = torch.randperm(self.num_samples, generator=generator).tolist()
        return order

    @property
    def loader_seed(self) -> int:
        """Seed of this rank's loader processes from the present position on."""
        position = (self.seed * 1_000_003 + self.epoch) * 1_000_003 + self.cursor
        return (position * self.world_size + self.rank) % 2**63

    def remaining(self) -> Plan:
        """This rank's microbatches from the cursor to the end of the epoch: (indices, weights) of each."""
        order, plan, cursor = self.order(), [], self.cursor
        while (window := self._group_from(cursor)) is not None:
            _, start, cursor = window
            group = order[start:cursor]
            weight = self.world_size / len(group)
            for micro in range(self.accumulation):
                first = (micro * self.world_size + self.rank) * self.batch_size
                plan.append(_filled(group[first : first + self.batch_size], weight, self.batch_size, group[0]))
        return plan

    @property
    def window(self) -> Window | None:
        """The samples of the next optimizer step; None when the rest of the epoch is left out."""
        return self._group_from(self.cursor)

    def samples(self, windows: Sequence[Window]) -> list[int]:
        """The dataset's indices in these windows."""
        return [i for epoch, start, end in windows for i in self.order(epoch)[start:end]]

    def advance(self) -> bool:
        """One optimizer step was taken. True if that ended the epoch; then the next one begins at its start."""
        window = self.window
        self.cursor = window[2] if window is not None else self.num_samples
        return self.turn_over()

    def skip(self, windows: Sequence[Window]) -> None:
        """Leave these samples out; what was left out before stays out."""
        self.skipped = sorted({*self.skipped, *windows})

    def turn_over(self) -> bool:
        """Begin the next epoch that has something left if nothing is left of this one. True if it did."""
        ended = self.window is None
        while self.window is None:
            self.epoch, self.cursor = self.epoch + 1, 0
        return ended

    def _group_from(self, cursor: int) -> Window | None:
        if not self.skipped:
            end = min(cursor + self.group_size, self.num_samples)
            return (self.epoch, cursor, end) if cursor < end else None
        ahead = [(start, end) for epoch, start, end in self.skipped if epoch == self.epoch]
        for start, end in ahead:
            if start <= cursor < end:
                cursor = end
        if cursor >= self.num_samples:
            return None
        stops = [start for start, _ in ahead if start > cursor]
        return self.epoch, cursor, min([cursor + self.group_size, self.num_samples, *stops])

    def state_dict(self) -> dict[str, Any]:
        """The position, what it is a position in, and what is left out."""
        return {
            "seed": self.seed, "epoch": self.epoch, "cursor": self.cursor, "num_samples": self.num_samples,
            "skipped": [list(window) for window in self.skipped],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a position. Raises TaskError when it belongs to another dataset or sample order."""
        for key in ("seed", "num_samples"):
            if state[key] != getattr(self, key):
                raise TaskError(f"the checkpoint's data has {key}={state[key]}, this run's {getattr(self, key)}")
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.skipped = [(int(epoch), int(start), int(end)) for epoch, start, end in state["skipped"]]


def _filled(indices: Sequence[int], weight: float, size: int, filler: int) -> tuple[list[int], list[float]]:
    missing = size - len(indices)
    return [*indices, *[filler] * missing], [weight] * len(indices) + [0.0] * missing


def validation_plan(num_samples: int, rank: int, world_size: int, batch_size: int) -> Plan:
    """This rank's share of one pass over the validation set, every sample of weight 1 on exactly one rank."""
    # No larger than a rank's share, or a small set would be mostly filler.
    size = min(batch_size, -(-num_samples // world_size))
    plan = []
    for start in range(0, num_samples, size * world_size):
        first = start + rank * size
        indices = range(first, min(first + size, num_samples))
        plan.append(_filled(indices, 1.0, size, 0))
    return plan


class Loader:
    """Loads planned microbatches and brings them to the device, one ahead on CUDA."""

    def __init__(self, task: Task, config: DataConfig, device: torch.device, emit: Callable[..., None]) -> None:
        """``emit``: `EventLog.emit`; is told of loader processes that were replaced."""
        self.task = task
        # How many slots there are, once it is known: the seed ids of samples are checked against it.
        self.num_slots: int | None = None
        # Of tensors of four dimensions, once the model is known.
        self.memory_format = torch.preserve_format
        self._emit = emit
        # All batches of an epoch but the last few have equal weights.
        self._weights: tuple[list[float], Tensor] = ([], torch.empty(0))
        self.config = config
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, dataset: Dataset[Any], plan: Plan, *, seed: int = 0) -> Iterator[Batch]:
        """The microbatches of ``plan`` on the device. Draws nothing from the global random generators.

        ``seed`` decides what loader processes draw; without them the dataset draws from this process's generators.

        Raises TaskError, at the batch in question, for whatever the user's dataset or collate raises.
        """
        # No more of them than batches: a boundary's single batch waits for one to start, not for all.
        processes = min(self.config.num_workers, len(plan))

        def make(start: int) -> DataLoader[Any]:
            return DataLoader(
                dataset,
                batch_sampler=[indices for indices, _ in plan[start:]],
                collate_fn=self.task.collate,
                num_workers=processes,
                timeout=LOOK_S,
                pin_memory=self.device.type == "cuda",
                # Those that take over do not draw what the first ones drew.
                generator=torch.Generator().manual_seed((seed + start) % 2**63),
            )

        wait_s = self.config.timeout_s
        items = load(make, len(plan), timeout_s=wait_s, tell=self._tell) if processes else self._read(dataset, plan)
        on_host = self._loaded(items, plan)
        if self._stream is not None:
            return self._ahead(on_host)
        return on_host if self.memory_format == torch.preserve_format else map(self._copy, on_host)

    def _read(self, dataset: Dataset[Any], plan: Plan) -> Iterator[Any]:
        """The items of a plan, read in this process: a DataLoader costs 30 microseconds more for each."""
        together = getattr(dataset, "__getitems__", None)
        for indices, _ in plan:
            item = self.task.collate(together(indices) if together else [dataset[index] for index in indices])
            yield _each(item, Tensor.pin_memory) if self._stream is not None else item

    def _loaded(self, items: Iterator[Any], plan: Plan) -> Iterator[Batch]:
        with users_code("loading the task's data"):
            for item, (_, weights) in zip(items, plan, strict=True):
                yield self._batch(item, weights)

    def _tell(self, reason: str, batch: int) -> None:
        self._emit("loader_restarted", "warning", reason=reason, batch=batch)

    def _batch(self, item: Any, weights: list[float]) -> Batch:
        if not (isinstance(item, (tuple, list)) and len(item) in (2, 3)):
            raise TaskError(
                f"the task's collate returned {type(item).__name__}; expected a pair (inputs, targets) or a triple "
                "(inputs, targets, seed ids)"
            )
        if weights != self._weights[0]:
            self._weights = weights, torch.tensor(weights)
        counts = self._weights[1]
        if len(item) == 2:
            return Batch(item[0], item[1], counts)
        ids = _checked_ids(item[2], len(weights), self.num_slots)
        return Batch(item[0], item[1], counts, ids, tuple(ids[counts > 0].unique().tolist()))

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        # The copy of the next batch runs on a stream of its own while this one is computed.
        copies = map(self._copy, batches)
        following = next(copies, None)
        while following is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)  # type: ignore[arg-type]
            current = following
            for tensor in _tensors((current.inputs, current.targets, current.weights, current.seed_ids)):
                tensor.record_stream(torch.cuda.current_stream(self.device))
            following = next(copies, None)
            yield current

    def _copy(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self._stream):
            names = ("inputs", "targets", "weights", "seed_ids")
            return replace(batch, **{name: _each(getattr(batch, name), self._move) for name in names})

    def _move(self, tensor: Tensor) -> Tensor:
        form = self.memory_format if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(self.device, non_blocking=True, memory_format=form)


def _checked_ids(ids: Any, batch: int, num_slots: int | None) -> Tensor:
    """The seed ids of a batch, (batch,), int64. Raises TaskError for anything that is none."""
    if not isinstance(ids, Tensor) or ids.shape != (batch,) or ids.dtype != torch.int64:
        seen = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TaskError(f"the seed ids of a batch are {seen}; expected an int64 tensor of shape ({batch},)")
    most = (num_slots if num_slots is not None else 2**31) - 1
    if bool(((ids < NOBODY) | (ids > most)).any()):
        wrong = sorted({i for i in ids.tolist() if not NOBODY <= i <= most})
        slots = f"; the run has {num_slots} slots" if num_slots is not None else ""
        raise TaskError(f"seed ids {wrong[:5]} in a batch: expected {NOBODY} (nobody's) to {most}{slots}")
    return ids


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_each(item, change) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
