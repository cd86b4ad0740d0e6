"""Which events of a run to show. Pure."""

from collections.abc import Collection
from dataclasses import dataclass

from tolaria.view.course import Event
from tolaria.view.values import text, whole

LEVELS = ("info", "warning", "error", "critical")

ALIKE = frozenset({
    "act_applied", "act_refused", "boundary", "changes_accepted", "checkpoint_good", "checkpoint_skipped",
    "compile_fallback", "drift_traced", "emergency", "gave_up", "halt_cleared", "halted", "incident", "paused",
    "rehearsed", "resumed", "run_ended", "run_started", "seed_gradient_not_finite", "seed_judged", "seed_moved",
    "signal_failed", "step_skipped", "stop_requested", "straggler", "went_back",
})  # fmt: skip
"""Kinds that every rank tells alike, as all do the same: one line of rank 0 says it for all."""

SILENT = "decision"
"""A decision of no change, one at every boundary, is shown where it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """``ranks``: only of these; empty: rank 0 and what only others tell. ``level``: at least. ``kinds``: empty: all.

    ``since``: from this step on; an event that carries no step of its own belongs to the one before it.
    """

    ranks: Collection[int] = ()
    level: str = "info"
    kinds: Collection[str] = ()
    since: int = 0

    def takes(self, event: Event, *, step: int) -> bool:
        """Whether an event is to be shown; ``step``: where the run was."""
        rank, kind, level = whole(event.get("rank")), text(event.get("kind")), text(event.get("level"))
        if self.ranks and rank not in self.ranks:
            return False
        if not self.ranks and rank > 0 and kind in ALIKE:
            return False
        if self.kinds and kind not in self.kinds:
            return False
        if kind == SILENT and not self.kinds and not event.get("commands") and event.get("source") != "fallback":
            return False
        if LEVELS.index(level if level in LEVELS else "info") < LEVELS.index(self.level):
            return False
        return step >= self.since
