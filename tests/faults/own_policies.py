"""Policies for fault tests, loaded by the embedded server."""

import os
from collections.abc import Sequence

from tolaria.leyline.types import Command, FieldReport, SystemState
from tolaria.tamiyo.policy import Policy, boundary_of

DIES_AT = 2


class Falling(Policy):
    """Takes its process with it at one boundary, before anything is answered."""

    version = "falling-1"

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        if boundary_of(state) == DIES_AT:
            os._exit(3)
        return []
