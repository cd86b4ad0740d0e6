"""How a run is driven, beside what it trains: its mode, and what an operator has done to it. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """Normal or conservative, with the reason. ``held``: by command, so only a command ends it."""

    conservative: bool = False
    reason: str = ""
    healthy: int = 0
    held: bool = False

    @property
    def name(self) -> str:
        """ "normal" or "conservative"."""
        return "conservative" if self.conservative else "normal"


@dataclass(frozen=True)
class Hand:
    """What an operator has done so far: how many acts, and why the run stands still, None while it does not.

    It is saved with the state, so that a start knows which acts of the log are still to come, and is no part of its
    digest: a run that was paused is the same as one that was not.
    """

    acts: int = 0
    paused: str | None = None
