"""Policies with one mistake each, for the checks of `tolaria policy test`; and one that makes none."""

import os
import random
import time
from collections.abc import Sequence
from typing import Any

from tolaria.leyline.types import Command, EmergencySignal, FieldReport, SeedStage, SystemState
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.policy import Policy, boundary_of
from tolaria.tamiyo.sight import Sight


class Sound(Policy):
    """Germinates when the loss is low and seeds are free; base of the others."""

    version = "sound-1"

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        sees = Sight(state)
        if sees.conservative or not sees.free or sees.growing or not 0 < state.validation_loss < 0.6:
            return []
        return [do.germinate(sees.free[0].name, "low_rank", reason="level")]


class Broken(Sound):
    """Cannot be made."""

    def __init__(self) -> None:
        raise OSError("no such model file")


class Nameless(Sound):
    version = "two\nlines"


class Numbered(Sound):
    version: Any = 3


class Slow(Sound):
    """Thinks for longer than the deadline."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        if boundary_of(state) == 3:
            time.sleep(60)
        return super().decide(state, reports)


class Deadly(Sound):
    """Takes its process with it."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        if boundary_of(state) == 3:
            os._exit(3)
        return super().decide(state, reports)


class Raising(Sound):
    """Fails at an ordinary boundary."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        if boundary_of(state) == 12:
            raise ZeroDivisionError("of all things")
        return super().decide(state, reports)


class Careless(Sound):
    """Takes for granted that a metric is sent."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        assert state.training_metrics["boundaries_left"] is not None
        return super().decide(state, reports)


class Mumbling(Sound):
    """Commands what no message can hold."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        if boundary_of(state) == 8 and not Sight(state).conservative:
            return [do.set_lr("host", float("nan"))]
        return super().decide(state, reports)


class Silly(Sound):
    """Answers with something else than commands."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> Any:
        return ["germinate"] if boundary_of(state) == 8 else super().decide(state, reports)


class Lawless(Sound):
    """Skips stages."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        early = () if Sight(state).conservative else Sight(state).in_stage(SeedStage.GERMINATED)
        return [do.fossilize(slot.name) for slot in early[:1]] or super().decide(state, reports)


class Nowhere(Sound):
    """Names a slot that there is not."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        return [do.germinate("attic", "low_rank")] if boundary_of(state) == 8 else super().decide(state, reports)


class Wild(Sound):
    """Wants a rate of ten thousand times."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        return [do.scale_lr("host", 1e4)] if boundary_of(state) == 8 else super().decide(state, reports)


class Reckless(Sound):
    """Does not look at the mode."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        return [do.scale_lr("host", 2.0)] if Sight(state).conservative else super().decide(state, reports)


class Sleepy(Sound):
    """Takes its time between the boundaries."""

    def emergency(self) -> EmergencySignal | None:
        time.sleep(0.12)
        return None


class Stuck(Sound):
    """Waits in emergency() for something that never comes."""

    def emergency(self) -> EmergencySignal | None:
        time.sleep(60)
        return None


class Panicking(Sound):
    def emergency(self) -> EmergencySignal | None:
        raise RuntimeError("help")


class Moody(Sound):
    """Tosses a coin, from the system's randomness."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        factor = 0.5 + random.SystemRandom().random() / 2
        return [do.scale_lr("host", factor)] if boundary_of(state) == 8 else super().decide(state, reports)


class Remembering(Sound):
    """Counts its own calls."""

    def __init__(self) -> None:
        self.calls = 0

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        self.calls += 1
        return [do.scale_lr("host", 0.5)] if self.calls == 8 else super().decide(state, reports)
