"""The model's forward pass in validation: compiled where that pays, apart from training, else eager.

A graph of its own, since mode, gradients and batch size differ from training's: no structure of training is compiled
again for it. It is made for structures that last, in which no seed is on its way, and for validations that are long.
On two cores of a CPU a GPT of 0.9 M parameters took 36 ms a batch compiled and 50 ms eager, after 6 s of compiling; a
small convolutional network gained nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from tolaria.config import CompileConfig
from tolaria.leyline.types import SeedStage
from tolaria.objective import Batch
from tolaria.outlook import no_trace
from tolaria.replica import Replica, evaluating
from tolaria.state import TrainState
from tolaria.trial import MODEL_ERRORS

MIN_BATCHES = 32
"""Batches of a rank in one validation from which ``compile.validation=auto`` compiles: the same in every start of a
run, so that a resumed one validates in the same way."""

ON_THE_WAY = frozenset(SeedStage) - {
    SeedStage.DORMANT, SeedStage.FOSSILIZED, SeedStage.CULLED, SeedStage.EMBARGOED, SeedStage.RESETTING,
    SeedStage.TERMINATED,
}  # fmt: skip


class ValidationForward:
    """Runs the model on a batch's inputs, in evaluation mode and without gradients, which is the caller's part."""

    def __init__(self, state: TrainState, replica: Replica, config: CompileConfig, batches: int) -> None:
        """``batches``: of this rank in one validation."""
        model = state.objective.model

        def validate(inputs: Any) -> Any:
            return model(inputs)

        self._state = state
        self._replica = replica
        self._eager: Callable[[Any], Any] = model
        self._compiled = torch.compile(validate, mode=config.mode, dynamic=False)
        chosen = config.validation == "on" or (config.validation == "auto" and batches >= MIN_BATCHES)
        self._wanted = config.enabled and chosen
        self._ready: set[object] = set()

    @property
    def compiled(self) -> bool:
        """Whether the structure, as it is now, runs compiled. The same on all ranks."""
        return self._wanted and self._lasting() and self._replica.compiled and self._key() in self._ready

    def __call__(self, inputs: Any) -> Any:
        """What the model returns for ``inputs``."""
        return (self._compiled if self.compiled else self._eager)(inputs)

    def prepare(self, batch: Callable[[], Batch]) -> None:
        """Compile for the present structure, if it is to be, on one ``batch()``. No trace in state, random streams.

        Collective, like `Replica.warm_up`: the first rank of each node compiles first. A failure on any rank puts
        validation on eager on all of them, with an event, and training stays as it is.
        """
        if not self._wanted or not self._lasting() or not self._replica.compiled or self._key() in self._ready:
            return
        world = self._replica.world
        with no_trace(self._state, world.device):
            first = batch()
            for turn in (True, False):
                reason = self._attempt(first) if (world.local_rank == 0) == turn else ""
                if int(world.peers.max(torch.tensor([int(bool(reason))]))):
                    self._wanted = False
                    reason = reason or "another rank could not compile"
                    self._replica.events.emit("compile_fallback", "warning", part="validation", reason=reason)
                    return
        self._ready.add(self._key())

    def _attempt(self, batch: Batch) -> str:
        """Why this rank cannot compile; "" when it can."""
        try:
            with (
                torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
                evaluating(self._state.objective),
                self._replica.autocast(),
            ):
                self._compiled(batch.inputs)
        except FailOnRecompileLimitHit:
            return "more structures than compile.structure_limit"
        except MODEL_ERRORS as error:
            # Dynamo, inductor and the toolchain fail with these; if it is the model, eager says so.
            return f"{type(error).__name__}: {str(error).strip()[:300]}"
        return ""

    def _lasting(self) -> bool:
        # A seed on its way changes the structure every few boundaries, and is probed by swapping it in and out.
        return not any(seed.stage in ON_THE_WAY for seed in self._state.kasmina.seeds.values())

    def _key(self) -> object:
        return self._state.kasmina.structure()
