"""This rank's compiled, data-parallel form of the objective: compile inside, DDP outside, shadows beside.

    sync( Objective.compile() )     host and seeds that act on the output; gradients/ reduces what it gives
    Shadow twin .compile()          one per TRAINING seed; its own gradients, its own collective

A parameter that comes later is silently never reduced, so every change of structure ends here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from tolaria.compiled_code import CompiledCode, compiling_seen
from tolaria.config import Config
from tolaria.dist import World
from tolaria.errors import TaskError
from tolaria.gradients.choice import make_sync
from tolaria.gradients.sync import send_from_first
from tolaria.gradients.tally import Tally
from tolaria.kasmina.seed import Seed
from tolaria.kasmina.shadow import average_gradients, make_twin, random_streams_kept, refresh_buffers
from tolaria.objective import Batch, Objective
from tolaria.optim.compiled import CompiledStep
from tolaria.state import TrainState, named_buffers_of
from tolaria.telemetry.events import EventLog
from tolaria.telemetry.goodput import Ledger
from tolaria.trial import MODEL_ERRORS, Reach, fine_on_one, host_reach, without_a_trace

Part: TypeAlias = tuple[Any, ...]
"""One of the things that a step runs: a kind, and what makes another one of it."""

_FINE, _NOT_COMPILED, _BROKEN = range(3)
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Replica:
    """Runs forward and backward of this rank's model. Holds no state of its own that a checkpoint would need."""

    def __init__(
        self, state: TrainState, world: World, config: Config, events: EventLog, code: CompiledCode | None = None,
        ledger: Ledger | None = None,
    ) -> None:  # fmt: skip
        self.state = state
        self.world = world
        self.config = config
        self.events = events
        self.code = code
        self.compiled = config.compile.enabled
        self.compiled_step = CompiledStep() if config.optim.compile_step else None
        self.shadows: list[tuple[Seed, Objective]] = []
        self.tally = Tally(list(state.kasmina.seeds), world.device)
        self.ledger = ledger if ledger is not None else Ledger()
        self.sync = make_sync(state, world, config, self.tally, self.ledger)
        self._warm: set[Part] = set()
        self._gave_up = False
        self._moving: set[str] = set()
        self._kept: dict[str, tuple[Tensor, Tensor]] | None = None
        # One code object serves every structure of the run, so dynamo's own limit is far too low.
        limit = config.compile.structure_limit
        self._settings = ExitStack()
        if self.compiled:
            self._settings.enter_context(
                torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=limit)
            )
            self._settings.enter_context(compiling_seen(self.ledger))
            if config.aggregate.mode == "pcgrad":
                # A graph that has given its buffers away can not run backward a second time.
                self._settings.enter_context(torch._functorch.config.patch(donated_buffer=False))
            state.objective.compile(mode=config.compile.mode)

    def close(self) -> None:
        """Let go of hooks and buffers, of the compiler's settings, and of the eager stance if a failed compile had set
        it."""
        self.sync.close()
        self.shadows = []
        self._settings.close()
        if self._gave_up:
            torch.compiler.set_stance("default")

    def autocast(self) -> AbstractContextManager[None]:
        """The run's autocast context; one kind for every call, since its state is part of the compiled guards."""
        dtype = AMP_DTYPES.get(self.config.precision.amp)
        return torch.autocast(self.world.device.type, dtype=dtype) if dtype is not None else nullcontext()

    def rebuild(self, *, first: bool = False, afresh: bool = False) -> None:
        """Follow the structure with gradients and shadow twins. All ranks call it; no collective but at ``first``.

        ``first`` broadcasts rank 0's weights and buffers; later the weights are known to be equal. ``afresh`` makes a
        new wrapper in any case, for ranks that may hold wrappers of different ages: a new one agrees on its buckets in
        its second step, in a collective that an older one does not take part in.
        """
        objective = self.state.objective
        blend = self.config.kasmina.blend
        self._kept = None
        self.shadows = [(s, make_twin(objective, "slots", s, blend)) for s in self.state.kasmina.shadow_seeds()]  # type: ignore[misc]
        for _, twin in self.shadows:
            twin.summed = True
            if self.compiled:
                twin.compile(mode=self.config.compile.mode)
        self.sync.rebuild(first=first, afresh=afresh)

    def loss(self, batch: Batch) -> Tensor:
        """Forward of one microbatch, in the autocast context of `autocast`: its weighted loss, 0-D float32, or where
        owners matter (aggregate.mode) that of each sample, (batch,)."""
        return self.sync.module(batch.inputs, batch.targets, batch.weights)  # type: ignore[no-any-return]

    def shadow_backward(self, batch: Batch) -> None:
        """Forward and backward of every TRAINING seed's shadow; adds to the seeds' gradients on this rank only."""
        self._shadow_backward(batch, self.shadows)

    def _shadow_backward(self, batch: Batch, shadows: Sequence[tuple[Seed, Objective]]) -> None:
        if not shadows:
            return
        with random_streams_kept(self.world.device):
            for _, twin in shadows:
                refresh_buffers(twin, self.state.objective)
                with self.autocast():
                    loss = twin(batch.inputs, batch.targets, batch.weights)
                self.state.scaler.scale(loss).backward()

    def average_shadow_gradients(self) -> None:
        """Average the shadow gradients over ranks, in one collective of their own. All ranks call it."""
        average_gradients([seed for seed, _ in self.shadows], self.world.data_group, self.world.world_size)

    def synchronise_buffers(self) -> None:
        """Rank 0's buffers (running statistics) on every rank, as the next step would make them anyway."""
        send_from_first((buffer for _, buffer in named_buffers_of(self.state)), self.world.data_group)

    def owner_metrics(self) -> dict[str, dict[str, float]]:
        """How the samples of each seed counted since the last boundary; begins anew. Waits for the device.

        By slot that holds a seed: "weight" now, and means of "share" (of the sample weight), "shared_norm" (of its
        gradient on the host), and the number of "conflicts"; nothing with aggregate.mode=sum.
        """
        mode = self.config.aggregate.mode
        if mode == "sum":
            return {}
        found = self.tally.take()
        seeds = [seed for seed in self.state.kasmina.seeds.values() if seed.occupied]
        return {
            seed.slot: {"weight": seed.gradient_weight if mode == "weighted" else 1.0, **found.get(seed.slot, {})}
            for seed in seeds
        }

    def keep_buffers(self) -> None:
        """Copy the buffers that a forward pass moves (running statistics), for `put_back_buffers`. Does not wait."""
        if self._kept is None:
            moving = {n: b for n, b in named_buffers_of(self.state) if n in self._moving}
            # By type, since copies of one type are one kernel.
            self._kept = {n: (b, torch.empty_like(b)) for n, b in sorted(moving.items(), key=lambda x: str(x[1].dtype))}
        for _, pairs in groupby(self._kept.values(), key=lambda pair: pair[0].dtype):
            originals, copies = zip(*pairs, strict=True)
            torch._foreach_copy_(copies, originals)

    def put_back_buffers(self, prefix: str = "") -> None:
        """Undo what forward passes did since `keep_buffers` to the buffers whose name begins with ``prefix``."""
        for name, (buffer, copy) in (self._kept or {}).items():
            if name.startswith(prefix):
                buffer.copy_(copy)

    # Warm-up

    def warm_up(self, sample: Callable[[int], Batch]) -> None:
        """Compile and check what is new in structure and optimizer; no trace in state, gradients, random streams.

        ``sample``: gives a batch of so many samples, on this rank; not asked where nothing is new. Collective: all
        ranks call it after a change of structure. A compile failure on any rank puts every rank on eager, with an
        event. Raises TaskError when the model itself fails or a trainable parameter got no gradient.
        """
        new = self._parts() - self._warm
        if not new:
            return
        with self.ledger.phases("compile"):
            self._warm_up(sample, new)

    def _warm_up(self, sample: Callable[[int], Batch], new: set[Part]) -> None:
        verdict, reason = self._try_in_turns(sample, new)
        if verdict == _NOT_COMPILED:
            self.compiled, self.compiled_step, self._gave_up = False, None, True
            torch.compiler.set_stance("force_eager")
            self.events.emit("compile_fallback", "warning", reason=reason or "another rank could not compile")
            verdict, reason = self._try_in_turns(sample, new)
        if verdict != _FINE:
            raise TaskError(reason or "the model failed on another rank")
        self._warm |= new
        if self.code is not None:
            self.code.keep()

    def _parts(self) -> set[Part]:
        """What a step runs now; each is compiled and tried by itself."""
        structure = self.state.kasmina.structure()
        trained = tuple(name for name, p in self.state.objective.named_parameters() if p.requires_grad)
        shadows = {("shadow", seed.slot, seed.blueprint, structure) for seed, _ in self.shadows}
        return {("host", structure, trained), ("optimizer", type(self.state.optimizer)), *shadows}

    def _try_in_turns(self, sample: Callable[[int], Batch], new: set[Part]) -> tuple[int, str]:
        """The worst verdict over all ranks, and this rank's reason for it. Collective.

        The first rank of each node compiles first, so that the others find its code in the cache.
        """
        turn = self.world.local_rank == 0
        for turns in ((True,), (False,)) if self._compiles else ((True, False),):
            verdict, reason = _FINE, ""
            if turn in turns:
                verdict, reason = self._attempt(sample, new)
            worst = int(self.world.peers.max(torch.tensor([verdict])))
            if worst != _FINE:
                return worst, reason
        return _FINE, ""

    @property
    def _compiles(self) -> bool:
        return self.compiled or self.compiled_step is not None

    def _attempt(self, sample: Callable[[int], Batch], new: set[Part]) -> tuple[int, str]:
        try:
            # Past its limit dynamo runs eager without a word. Here it is told to fail, so that all ranks do the same.
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                self._trial(sample, new)
                if self.compiled_step is not None:
                    self.compiled_step.rehearse(self.state.optimizer)
        except TaskError as error:
            return _BROKEN, str(error)
        except FailOnRecompileLimitHit:
            return _NOT_COMPILED, f"more structures than compile.structure_limit={self.config.compile.structure_limit}"
        except MODEL_ERRORS as error:
            if self._compiles:
                # Dynamo, inductor and the toolchain fail with these; if it was the model, eager fails next.
                return _NOT_COMPILED, f"{type(error).__name__}: {str(error).strip()[:300]}"
            if self.config.train.debug:
                raise
            return _BROKEN, f"the model failed on a batch: {type(error).__name__}: {error}"
        return _FINE, ""

    def _trial(self, sample: Callable[[int], Batch], new: set[Part]) -> None:
        host = any(part[0] == "host" for part in new)
        slots = {part[1] for part in new if part[0] == "shadow"}
        shadows = [(seed, twin) for seed, twin in self.shadows if seed.slot in slots]
        if not (host or shadows) or (self._one_sample_tells and self._fine_on_one(sample(1), host, shadows)):
            return
        batch = sample(self.config.train.batch_size)
        trained = {s.group: s.named_parameters() for s, _ in shadows}
        if host:
            trained["host"] = {n: p for n, p in self.state.objective.named_parameters() if p.requires_grad}
        with without_a_trace(self.state, self.world.device, self._moving):
            if host:
                with self.sync.apart():
                    with self.autocast():
                        loss = self.loss(batch)
                    loss.backward(torch.ones_like(loss))
            self._shadow_backward(batch, shadows)
            missing = [n for members in trained.values() for n, p in members.items() if p.grad is None]
        if missing:
            raise TaskError(
                f"parameters without a gradient: {', '.join(missing[:5])}; use them in the loss or freeze them "
                "with requires_grad_(False)"
            )

    @property
    def _one_sample_tells(self) -> bool:
        """Whether a change of a structure that runs may be tried on one sample: not where the whole batch is compiled,
        where memory is scarce, or where seeds want to know the weights of a whole batch."""
        whole = self._compiles or self.world.device.type != "cpu" or self.config.aggregate.mode == "weighted"
        return bool(self._warm) and not whole and not self.config.train.debug

    def _fine_on_one(self, batch: Batch, host: bool, shadows: Sequence[tuple[Seed, Objective]]) -> bool:
        reaches = [Reach(twin, [*seed.named_parameters().values()]) for seed, twin in shadows]
        if host:
            # A residual seed is added to what flows to the host anyway.
            reaches.append(host_reach(self.state, cuts=self.config.kasmina.blend != "residual"))
        return fine_on_one(self.state, reaches, batch, self.autocast, self._moving)


@contextmanager
def evaluating(objective: Objective) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is back in its own mode."""
    modes = [(m, m.training) for m in objective.modules()]
    objective.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
