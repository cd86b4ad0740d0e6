"""The named parts of a run's time, for whoever looks at where it goes: `tolaria/telemetry/goodput.py` at those in which
no step gets on, the profiler at all.

Of a step:

data        waiting for the next batch
forward     forward pass and loss
backward    backward pass, the reduction of gradients over ranks in it
sync        what of that reduction is left when the backward pass is over; sending buffers before the forward pass
clip        norms, the verdict on them, clipping
fence       opening it before the forward pass, reading it before the update
optimizer   learning rates, the update, gradients let go
bookkeeping what the loop does between two steps
boundary    a boundary, with what follows where it is part of one

Of what is no step:

compile     trying and compiling a structure that is new
validation  passes over the validation data
checkpoint  a snapshot or a checkpoint, as long as the training thread waits for it
rollback    going back to an earlier state
rehearsal   trying something out, and coming back from it
paused      standing still because somebody asked for it
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal[
    "data", "forward", "backward", "sync", "clip", "fence", "optimizer", "bookkeeping", "boundary",
    "compile", "validation", "checkpoint", "rollback", "rehearsal", "paused",
]  # fmt: skip
Phases: TypeAlias = Callable[[Phase], AbstractContextManager[None]]
"""Called at the beginning of a phase; the context is left at its end."""

_NOTHING = nullcontext()


def unseen(phase: Phase) -> AbstractContextManager[None]:
    """The usual `Phases`: looks at nothing. Some 0.2 microseconds."""
    return _NOTHING
