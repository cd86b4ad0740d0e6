"""What takes back an operator's last command. Pure: from what was done to the command that undoes it.

optimizer     the tuner takes its own change back, bit for bit
mode          the mode before
germinate     cancel, or cull once it blends
the rest      only together with the weights: by going back to the state before the act
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from tolaria.errors import CommandRefused
from tolaria.leyline.limits import clip_text
from tolaria.leyline.types import (
    OPTIMIZER_CLASS,
    BreakerCommand,
    Command,
    OptimizerCommand,
    SeedCommand,
    SeedOp,
    SeedStage,
)
from tolaria.tamiyo import policy as do

_CANCELLED = (SeedStage.GERMINATED, SeedStage.TRAINING)
_CULLED = (SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY)


class Growing(Protocol):
    """What an undo has to know of a seed: its stage, and the command that it germinated by."""

    stage: SeedStage
    command_id: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """One act that can still be taken back. ``kind``: optimizer, mode, seed or other; ``detail``: what of it.

    ``conservative``: whether the run was, before the act.
    """

    act: int
    step: int
    what: str
    kind: str
    detail: str = ""
    command_id: str = ""
    conservative: bool = False

    @classmethod
    def of(cls, act: int, step: int, command: Command, what: str, *, conservative: bool) -> Self:
        """From a command that has taken effect."""
        payload, kind, detail = command.payload, "other", ""
        if isinstance(payload, OptimizerCommand) and not payload.optimizer_id.startswith(OPTIMIZER_CLASS):
            kind, detail = "optimizer", payload.optimizer_id or "*"
        elif isinstance(payload, BreakerCommand):
            kind = "mode"
        elif isinstance(payload, SeedCommand) and payload.operation == SeedOp.GERMINATE:
            kind, detail = "seed", command.target_seed_id
        return cls(
            act=act, step=step, what=what, kind=kind, detail=detail, command_id=command.command_id,
            conservative=conservative,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """For the saved state."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(**body)


def inverse(done: Done, *, newest: Callable[[str], str | None], seed: Callable[[str], Growing]) -> Command:
    """The command that takes an act back and leaves the weights as they are.

    ``newest``: id of the newest optimizer command on the groups of a pattern; ``seed``: what grows in a slot.
    Raises CommandRefused("needs_weights") where there is none, ("changed_since") where somebody else has changed the
    same since.
    """
    why = clip_text(f"undo of act {done.act} ({done.what})")
    if done.kind == "optimizer":
        last = newest(done.detail)
        if last != done.command_id:
            by = f"command {last} has" if last else "another class of optimizer or a cull has"
            raise CommandRefused("changed_since", f"{by} changed {done.detail} since; {_WEIGHTS}")
        return do.undo(done.detail, reason=why)
    if done.kind == "mode":
        return do.conservative(done.conservative, reason=why)
    if done.kind == "seed":
        grown = seed(done.detail)
        if grown.command_id != done.command_id:
            raise CommandRefused("changed_since", f"the seed of {done.what} is gone from {done.detail}; {_WEIGHTS}")
        if grown.stage in _CANCELLED:
            return do.cancel(done.detail, reason=why)
        if grown.stage in _CULLED:
            return do.cull(done.detail, reason=why)
    raise CommandRefused("needs_weights", f"{done.what} changed what training has used since; {_WEIGHTS}")


_WEIGHTS = "only --weights can take it back: to the state before it, steps since included"
