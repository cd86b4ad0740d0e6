"""A policy as a user writes it: a class with one method and no base class."""

from collections.abc import Sequence

from tolaria.leyline.types import Command, FieldReport, SeedStage, SystemState
from tolaria.tamiyo import policy as do

NEXT = {
    SeedStage.DORMANT: lambda slot: do.germinate(slot, "user_gate", reason="there is room"),
    SeedStage.GERMINATED: do.start_training,
    SeedStage.TRAINING: do.start_grafting,
    SeedStage.BLENDING: do.stabilize,
    SeedStage.SHADOWING: do.evaluate,
    SeedStage.PROBATIONARY: do.fossilize,
}


class Straight:
    """Takes the first slot from stage to stage as fast as its gates allow."""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        seed = state.seeds[0]
        ready = seed.stage in NEXT and seed.metrics.get("gate_ok", 1.0) == 1.0
        return [NEXT[seed.stage](seed.seed_id)] if ready else []
