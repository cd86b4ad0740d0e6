"""This rank's compiled, data-parallel form of the objective: compile inside, DDP outside, shadows beside.

    DDP( Objective.compile() )      host and seeds that act on the output; rebuilt only when what it trains changed
    Shadow twin .compile()          one per TRAINING seed; its own gradients, its own collective

A parameter added to a module after DDP wrapped it is silently never reduced, so every change of structure ends here.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.parallel import DistributedDataParallel

from tolaria.config import Config
from tolaria.dist import World
from tolaria.errors import TaskError
from tolaria.kasmina.seed import Seed
from tolaria.kasmina.shadow import average_gradients, make_twin, random_streams_kept, refresh_buffers
from tolaria.objective import Batch, Objective
from tolaria.state import TrainState, named_buffers_of
from tolaria.telemetry.events import EventLog

# The newer name keeps the sync of buffers at construction, the older one is all that torch 2.11 knows.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)
_FINE, _NOT_COMPILED, _BROKEN = range(3)
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Replica:
    """Runs forward and backward of this rank's model. Holds no state of its own that a checkpoint would need."""

    def __init__(self, state: TrainState, world: World, config: Config, events: EventLog) -> None:
        self.state = state
        self.world = world
        self.config = config
        self.events = events
        self.compiled = config.compile.enabled
        self.shadows: list[tuple[Seed, Objective]] = []
        # Whether DDP's forward pass begins by sending rank 0's buffers to all ranks.
        self.sends_buffers = False
        self._ddp: DistributedDataParallel | None = None
        self._wrapped: list[str] = []
        self._warm: set[object] = set()
        self._moving: set[str] = set()
        self._kept: dict[str, tuple[Tensor, Tensor]] | None = None
        # One code object serves every structure of the run, so dynamo's own limit is far too low.
        limit = config.compile.structure_limit
        self._limits = torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=limit)
        if self.compiled:
            self._limits.__enter__()
            state.objective.compile(mode=config.compile.mode)

    def close(self) -> None:
        """Let go of DDP's hooks, of dynamo's limits, and of the eager stance if a failed compile had set it."""
        self._ddp = None
        self.shadows = []
        if not self.config.compile.enabled:
            return
        self._limits.__exit__(None, None, None)
        if not self.compiled:
            torch.compiler.set_stance("default")

    def autocast(self) -> torch.autocast:
        """The run's autocast context; one kind for every call, since its state is part of the compiled guards."""
        amp = self.config.precision.amp
        dtype = AMP_DTYPES.get(amp, torch.bfloat16)
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=amp != "off")

    def rebuild(self, *, first: bool = False, afresh: bool = False) -> None:
        """Bring DDP and the shadow twins in line with the structure. All ranks call it; no collective but at ``first``.

        ``first`` broadcasts rank 0's weights and buffers; later the weights are known to be equal. ``afresh`` makes a
        new wrapper in any case, for ranks that may hold wrappers of different ages: a new one agrees on its buckets in
        its second step, in a collective that an older one does not take part in.
        """
        objective = self.state.objective
        blend = self.config.kasmina.blend
        self._kept = None
        self.shadows = [(s, make_twin(objective, "slots", s, blend)) for s in self.state.kasmina.shadow_seeds()]  # type: ignore[misc]
        if self.compiled:
            for _, twin in self.shadows:
                twin.compile(mode=self.config.compile.mode)
        wanted = [name for name, p in objective.named_parameters() if p.requires_grad]
        if self.world.data_group is None or (wanted == self._wrapped and not (first or afresh)):
            return
        # The old wrapper must be gone before the new one: its hooks would reduce every gradient a second time.
        self._ddp = None
        self._wrapped = wanted
        if wanted:
            self._ddp = self._wrap(objective, init_sync=first)

    def _wrap(self, objective: Objective, *, init_sync: bool) -> DistributedDataParallel:
        alphas = [name for name, _ in objective.named_buffers() if name.endswith(".form.alpha")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, alphas)
        device = self.world.device
        self.sends_buffers = next(named_buffers_of(self.state), None) is not None
        sync_buffers: dict[str, Any] = {_SYNC_BUFFERS: self.sends_buffers}
        return DistributedDataParallel(
            objective,
            device_ids=[device.index] if device.type == "cuda" else None,
            process_group=self.world.data_group,
            init_sync=init_sync,
            **sync_buffers,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.config.dist.growth_bucket_mb,
        )

    def loss(self, batch: Batch) -> Tensor:
        """Forward of one microbatch: the weighted loss, 0-D float32. In the autocast context of `autocast`."""
        module = self._ddp if self._ddp is not None else self.state.objective
        return module(batch.inputs, batch.targets, batch.weights)  # type: ignore[no-any-return]

    def no_sync(self) -> AbstractContextManager[None]:
        """Context in which backward does not reduce gradients over ranks (every microbatch but the last)."""
        return self._ddp.no_sync() if self._ddp is not None else nullcontext()

    def shadow_backward(self, batch: Batch) -> None:
        """Forward and backward of every TRAINING seed's shadow; adds to the seeds' gradients on this rank only."""
        if not self.shadows:
            return
        with random_streams_kept(self.world.device):
            for _, twin in self.shadows:
                refresh_buffers(twin, self.state.objective)
                with self.autocast():
                    loss = twin(batch.inputs, batch.targets, batch.weights)
                self.state.scaler.scale(loss).backward()

    def average_shadow_gradients(self) -> None:
        """Average the shadow gradients over ranks, in one collective of their own. All ranks call it."""
        average_gradients([seed for seed, _ in self.shadows], self.world.data_group, self.world.world_size)

    def synchronise_buffers(self) -> None:
        """Rank 0's buffers (running statistics) on every rank, as DDP's next forward would make them anyway."""
        if self.world.data_group is not None:
            for _, buffer in named_buffers_of(self.state):
                dist.broadcast(buffer, src=0, group=self.world.data_group)

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

    def warm_up(self, batch: Batch) -> None:
        """Compile and check the present structure on one batch, leaving no trace in state, gradients or random streams.

        Collective: all ranks call it after a change of structure. A compile failure on any rank puts every rank on
        eager, with an event. Raises TaskError when the model itself fails or a trainable parameter got no gradient.
        """
        key = (self.state.kasmina.structure(), tuple(self._trained()), len(self.shadows))
        if key in self._warm:
            return
        verdict, reason = self._try_in_turns(batch)
        if verdict == _NOT_COMPILED:
            self.compiled = False
            torch.compiler.set_stance("force_eager")
            self.events.emit("compile_fallback", "warning", reason=reason or "another rank could not compile")
            verdict, reason = self._try_in_turns(batch)
        if verdict != _FINE:
            raise TaskError(reason or "the model failed on another rank")
        self._warm.add(key)

    def _try_in_turns(self, batch: Batch) -> tuple[int, str]:
        """The worst verdict over all ranks, and this rank's reason for it. Collective.

        The first rank of each node goes first, so that the others find its compiled code in the cache.
        """
        for first in (True, False):
            verdict, reason = _FINE, ""
            if (self.world.local_rank == 0) == first:
                verdict, reason = self._attempt(batch)
            worst = int(self.world.peers.max(torch.tensor([verdict])))
            if worst != _FINE:
                return worst, reason
        return _FINE, ""

    def _attempt(self, batch: Batch) -> tuple[int, str]:
        try:
            # Past its limit dynamo runs eager without a word. Here it is told to fail, so that all ranks do the same.
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                self._trial(batch)
        except TaskError as error:
            return _BROKEN, str(error)
        except FailOnRecompileLimitHit:
            return _NOT_COMPILED, f"more structures than compile.structure_limit={self.config.compile.structure_limit}"
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            if self.compiled:
                # Dynamo, inductor and the toolchain fail with these; if it was the model, eager fails next.
                return _NOT_COMPILED, f"{type(error).__name__}: {str(error).strip()[:300]}"
            if self.config.train.debug:
                raise
            return _BROKEN, f"the model failed on a batch: {type(error).__name__}: {error}"
        return _FINE, ""

    def _trial(self, batch: Batch) -> None:
        buffers = [(name, b, b.clone()) for name, b in named_buffers_of(self.state)]
        try:
            with random_streams_kept(self.world.device):
                with self._apart():
                    with self.autocast():
                        loss = self.loss(batch)
                    loss.backward()
                self.shadow_backward(batch)
            missing = [n for n, p in self._trained_parameters() if p.grad is None]
        finally:
            for _, parameter in self._trained_parameters():
                parameter.grad = None
            self._moving.update(name for name, buffer, kept in buffers if not torch.equal(buffer, kept))
            with torch.no_grad():
                for _, buffer, kept in buffers:
                    buffer.copy_(kept)
        if missing:
            raise TaskError(
                f"parameters without a gradient: {', '.join(missing[:5])}; use them in the loss or freeze them "
                "with requires_grad_(False)"
            )

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """DDP without any collective, of gradients or of buffers: ranks take their trials one after another, and one
        that fails leaves no other waiting."""
        with self.no_sync():
            if self._ddp is not None:
                self._ddp.require_forward_param_sync = False
            try:
                yield
            finally:
                if self._ddp is not None:
                    self._ddp.require_forward_param_sync = True

    def _trained(self) -> list[str]:
        return [name for name, _ in self._trained_parameters()]

    def _trained_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from ((n, p) for n, p in self.state.objective.named_parameters() if p.requires_grad)
        for seed, _ in self.shadows:
            yield from seed.named_parameters().items()


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
