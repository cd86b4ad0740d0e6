"""Policies for fault tests, loaded by the embedded server."""

import os
import time
from collections.abc import Sequence

from tolaria.leyline.types import Command, EmergencySignal, FieldReport, SystemState
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import Policy, boundary_of

DIES_AT = 2


class Falling(Policy):
    """Takes its process with it at one boundary, before anything is answered."""

    version = "falling-1"

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        if boundary_of(state) == DIES_AT:
            os._exit(3)
        return []


class Hanging(Policy):
    """Answers the first question and never another one."""

    version = "hanging-1"

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        if boundary_of(state) > 1:
            time.sleep(3600)
        return []


class Eager(Policy):
    """Wants a seed at every boundary, and raises an emergency; as a shadow nobody listens."""

    version = "eager-1"

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        return [do.germinate("early", "low_rank", reason="now")]

    def emergency(self) -> EmergencySignal | None:
        return do.raise_level(4, "stop everything")
