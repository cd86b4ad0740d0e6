"""The policy that answers every boundary with nothing: the run trains as if it were alone."""

from collections.abc import Sequence

from tolaria.leyline.types import Command, FieldReport, SystemState
from tolaria.tamiyo.policy import Policy


class NoopPolicy(Policy):
    """Answers, and asks for nothing."""

    version = "noop-1"

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        """No command, ever."""
        return []
