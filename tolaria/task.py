"""What a user brings: a model, its loss, data and metrics, as one `Task`.

`--task my_package.my_module:make_task` names a function that returns a Task. It is called once on every rank
after the random generators were seeded alike, so that all ranks build the same model.
"""

import importlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from tolaria.errors import TaskError

NOBODY = -1
"""The seed id of samples that belong to no seed."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training problem.

    model: any nn.Module; called as ``model(inputs)``.
    loss: ``loss(outputs, targets)`` -> one loss per sample, shape (batch,) or (batch, ...); Tolaria averages. It is
        per sample so that uneven last batches weigh every sample the same on any number of ranks.
    train, validation: map-style datasets whose items are ``(input, target)``, or ``(input, target, seed id)`` where
        samples belong to seeds: the index of the slot in the sorted slot names, or -1 for nobody's. What that does to
        the host's gradient is ``aggregate.mode``; samples of a slot that holds no seed are nobody's. An
        ``__getitems__(list[int])`` that returns what ``collate`` takes is used when there is one.
    accuracy: ``accuracy(outputs, targets)`` -> per-sample values in [0, 1], same shape rule as ``loss``.
    metrics: further validation metrics by name, same form as ``accuracy``.
    slots: places to grow, slot name -> path of a module in ``model`` (see ``nn.Module.named_modules``); slots that
        the model already contains as ``tolaria.Slot`` need no entry.
    optimizer: overrides of the ``optim`` section of the configuration, by key.
    collate: makes one ``(inputs, targets)`` pair of batched tensors from a list of items, or one
        ``(inputs, targets, seed ids)`` triple, seed ids of shape (batch,), int64.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    train: Dataset[Any]
    validation: Dataset[Any]
    accuracy: Callable[[Any, Any], Tensor]
    metrics: Mapping[str, Callable[[Any, Any], Tensor]] = field(default_factory=dict)
    slots: Mapping[str, str] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] = default_collate


def in_words(error: BaseException) -> str:
    """What a user's code raised, on one line: type, text, and the user's line that led to it."""
    text = str(error).strip()
    if "Original Traceback" in text:
        # From a loader process: torch puts the whole stack of that process into the message; its last line says it all.
        return text.rpartition("\n")[2]
    own = (str(Path(__file__).parent), str(Path(torch.__file__).parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


@contextmanager
def users_code(what: str, *, debug: bool = False) -> Iterator[None]:
    """For calls of the user's code: whatever comes out is raised as TaskError that says what was being done.

    With ``debug`` it comes out as it is, with its stack.
    """
    try:
        yield
    except TaskError:
        raise
    except Exception as error:
        if debug:
            raise
        raise TaskError(f"{what} raised {in_words(error)}") from error


def import_object(path: str, key: str) -> Any:
    """The object at ``package.module:name``. Raises TaskError that names ``key`` and what was wrong."""
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise TaskError(f"{key}={path!r}: expected package.module:name")
    with users_code(f"{key}={path!r}: importing {module_name}"):
        module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise TaskError(f"{key}={path!r}: module {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def load_task(factory: str | Callable[..., Task], args: Mapping[str, Any], seed: int) -> Task:
    """Build the user's task on this rank, from ``package.module:function`` or the function itself.

    Local; seeds torch's global generator first. Whatever the function raises is reported as TaskError with the cause
    attached.
    """
    path = factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory))
    factory = import_object(factory, "task.factory") if isinstance(factory, str) else factory
    torch.manual_seed(seed)
    with users_code(f"task.factory={path!r}"):
        task = factory(**args)
    if not isinstance(task, Task):
        raise TaskError(f"task.factory={path!r} returned {type(task).__name__}; expected tolaria.Task")
    return task
