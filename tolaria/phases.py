"""The named parts of a step, for whoever wants to see where its time goes; nobody, usually, and then they cost nothing.

data        waiting for the next batch
forward     forward pass and loss
backward    backward pass, the reduction of gradients over ranks in it
sync        what of that reduction is left when the backward pass is over
clip        norms, the verdict on them, clipping
fence       opening it before the forward pass, reading it before the update
optimizer   learning rates, the update, gradients let go
bookkeeping what the loop does between two steps
boundary    a boundary, validation included
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal[
    "data", "forward", "backward", "sync", "clip", "fence", "optimizer", "bookkeeping", "boundary"
]
Phases: TypeAlias = Callable[[Phase], AbstractContextManager[None]]
"""Called at the beginning of a phase; the context is left at its end."""

_NOTHING = nullcontext()


def unseen(phase: Phase) -> AbstractContextManager[None]:
    """The usual `Phases`: looks at nothing. Some 0.2 microseconds."""
    return _NOTHING
