"""Kasmina: the host's slots and the seeds in them. Sole owner of seeds; the same calls on every rank, in one order."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.config import KasminaConfig
from tolaria.errors import CheckpointMismatch, CommandRefused
from tolaria.kasmina import gates
from tolaria.kasmina.budget import Budget
from tolaria.kasmina.gates import Evidence, GateResult
from tolaria.kasmina.growth import build_seed, check_operation, form_for, judge, learns, size_of
from tolaria.kasmina.lifecycle import FORWARD, Move, after_boundary, move
from tolaria.kasmina.seed import NormRing, Seed
from tolaria.kasmina.slot import Gauge, HostOnly, Slot
from tolaria.kasmina.view import seed_state
from tolaria.leyline.types import Command, SeedCommand, SeedOp, SeedStage, SeedState


@dataclass(frozen=True)
class PlannedMove:
    """A seed command that may be applied: its move, the gate's word, and for GERMINATE the finished module."""

    command: Command
    seed_command: SeedCommand
    move: Move
    gate: GateResult | None
    module: nn.Module | None


class Kasmina:
    """Slots, seeds, stages, gates and alpha of one rank's model. All methods are local and deterministic."""

    def __init__(
        self,
        slots: Mapping[str, Slot],
        shapes: Mapping[str, tuple[int, ...]],
        config: KasminaConfig,
        run_seed: int,
        device: torch.device,
        *,
        bytes_per_parameter: Callable[[], int],
        seam: Tensor | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        self.slots = dict(slots)
        self.budget = Budget(config, bytes_per_parameter)
        self.config = config
        self.device = device
        self.seam = seam
        self._memory_format = memory_format
        self._run_seed = run_seed
        self.host_norms = NormRing(config.gradient_window)
        self.seeds = {
            name: Seed(
                slot=name,
                shape=tuple(shapes[name]),
                alpha=torch.zeros((), device=device),
                norms=NormRing(config.gradient_window),
                seam=seam,
            )
            for name in sorted(slots)
        }
        self._host_only = {name: HostOnly() for name in slots}

    @property
    def grown_parameters(self) -> int:
        """Parameters of all seeds together."""
        return sum(seed.parameter_count for seed in self.seeds.values())

    def room(self, parameters: int, already_planned: int = 0) -> GateResult:
        """Gate G0's word on a seed of so many parameters, beside those that are there and those that are planned."""
        return self.budget.check(parameters, self.grown_parameters + already_planned)

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters of every seed by group name, for the optimizer."""
        return {s.group: s.named_parameters() for s in self.seeds.values() if s.occupied}

    def shadow_seeds(self) -> list[Seed]:
        """Seeds that learn on a shadow branch now."""
        if self.config.signal != "shadow":
            return []
        return [s for s in self.seeds.values() if s.stage == SeedStage.TRAINING]

    def learning_seeds(self) -> list[Seed]:
        """Seeds whose parameters get gradients now."""
        return [s for s in self.seeds.values() if s.module is not None and learns(s, self.config)]

    def structure(self) -> tuple[tuple[str, str, str], ...]:
        """What the forward graph looks like: (slot, form, blueprint) for every slot that is not host only."""
        forms = ((n, type(s.form).__name__, self.seeds[n].blueprint) for n, s in sorted(self.slots.items()))
        return tuple(f for f in forms if f[1] != HostOnly.__name__)

    def plan(self, command: Command, *, already_planned: int = 0) -> PlannedMove:
        """Check a seed command without changing anything; raises CommandRefused with the reason.

        ``already_planned``: parameters of germinations planned at the same boundary.
        """
        payload = command.payload
        if not isinstance(payload, SeedCommand):
            raise CommandRefused("wrong_payload", f"a seed command needs a seed operation, not {payload!r}")
        seed = self.seeds.get(command.target_seed_id)
        if seed is None:
            known = ", ".join(self.seeds) or "none"
            raise CommandRefused("unknown_seed", f"no slot {command.target_seed_id!r}; slots: {known}")
        found = move(seed.stage, payload.operation)
        check_operation(payload, seed)
        module, room = None, None
        if payload.operation == SeedOp.GERMINATE:
            # Without memory for what is too large to be built.
            size = size_of(payload.blueprint_id, seed.shape)
            _require(self.room(size, already_planned) if size is not None else None)
            # A straight-through seed runs between the host's layers, and its random numbers would be among theirs.
            silent = self.config.signal == "straight_through"
            module = self._build(seed, payload.blueprint_id, command.command_id, silent=silent)
            room = self.room(sum(p.numel() for p in module.parameters()), already_planned)
        result = self._judge(found, seed, room)
        _require(result)
        return PlannedMove(command, payload, found, result, module)

    def apply(self, planned: PlannedMove) -> None:
        """Carry out a planned move. Undo with `memento` and `restore`."""
        seed = self.seeds[planned.command.target_seed_id]
        operation = planned.seed_command.operation
        if operation == SeedOp.GERMINATE:
            seed.module = planned.module
            seed.blueprint = planned.seed_command.blueprint_id
            seed.command_id = planned.command.command_id
            seed.evidence = Evidence()
            seed.age_boundaries = 0
        elif operation == SeedOp.START_GRAFTING:
            seed.schedule = self.config.schedule
            seed.blend_steps = int(planned.seed_command.parameters.get("blend_steps", self.config.blend_steps))
            seed.blend_position = 0
            seed.alpha.zero_()
            seed.evidence.loss_before_graft = seed.evidence.loss_now
        elif operation == SeedOp.EVALUATE:
            # The contribution counts only as measured with the seed at work, not as probed behind the host.
            seed.evidence = replace(
                seed.evidence, loss_with=math.nan, loss_without=math.nan, contribution_noise=math.nan
            )
        elif operation == SeedOp.FINE_TUNE:
            seed.fine_tuning = True
        elif operation in (SeedOp.CULL, SeedOp.CANCEL):
            self._clear(seed)
        if operation != SeedOp.FINE_TUNE:
            seed.enter(planned.move.to)
        self._settle(seed)

    def tick(self, left_overs: Callable[[str], list[str]]) -> list[tuple[str, SeedStage, SeedStage]]:
        """Count one boundary and make the moves that happen by themselves: (slot, from, to) of each.

        ``left_overs(group)`` names what optimizer and schedules still hold of a group, for gate G5.
        """
        moves = []
        for seed in self.seeds.values():
            seed.boundaries_in_stage += 1
            seed.age_boundaries += seed.occupied
            to = after_boundary(seed.stage, seed.boundaries_in_stage, self.config.embargo_boundaries)
            held = ["module"] if seed.module is not None else []
            if to == SeedStage.DORMANT != seed.stage and not gates.g5_reset(held + left_overs(seed.group)).ok:
                continue
            if to != seed.stage:
                moves.append((seed.slot, seed.stage, to))
                seed.enter(to)
                self._settle(seed)
        return moves

    def terminate(self) -> None:
        """End of the run: every slot that holds no part of the host is TERMINATED and empty."""
        for seed in self.seeds.values():
            if seed.stage != SeedStage.FOSSILIZED:
                self._clear(seed)
                seed.enter(SeedStage.TERMINATED)
                self._settle(seed)

    def advance(self) -> None:
        """Advance alpha of every BLENDING seed; call once per optimizer step that was taken."""
        for seed in self.seeds.values():
            seed.advance()

    def read_norms(self) -> None:
        """Put the last gradient norms into the seeds' evidence."""
        for seed in self.seeds.values():
            if seed.occupied:
                seed.evidence.gradient_norms = seed.norms.read()

    @contextmanager
    def probing(self, slot: str, *, active: bool) -> Iterator[Gauge | None]:
        """For a validation pass: the seed at alpha 1 (``active``, measured by the yielded Gauge) or the host alone."""
        seed, place = self.seeds[slot], self.slots[slot]
        if seed.module is None:
            raise ValueError(f"slot {slot!r} holds no seed to probe")
        form = place.form
        gauge = Gauge(seed.module, self.config.blend) if active else None
        place.form = gauge if gauge is not None else self._host_only[slot]
        try:
            yield gauge
        finally:
            place.form = form

    def next_gate(self, seed: Seed) -> GateResult | None:
        """The gate on the seed's way forward, evaluated now; None where there is none."""
        operation = FORWARD.get(seed.stage)
        return self._judge(move(seed.stage, operation), seed) if operation is not None else None

    def seed_states(self, learning_rate: Callable[[str], float]) -> tuple[SeedState, ...]:
        """Every slot as the policy sees it."""
        return tuple(self._seed_state(seed, learning_rate) for seed in self.seeds.values())

    def _seed_state(self, seed: Seed, learning_rate: Callable[[str], float]) -> SeedState:
        depth = list(self.slots).index(seed.slot)
        if not seed.occupied:
            since = {"boundaries_in_stage": float(seed.boundaries_in_stage)}
            return SeedState(seed_id=seed.slot, stage=seed.stage, layer_depth=depth, metrics=since)
        return seed_state(seed, depth=depth, gate=self.next_gate(seed), learning_rate=learning_rate(seed.group))

    def memento(self) -> dict[str, dict[str, Any]]:
        """What `restore` needs to take back every change of structure made after this call."""
        return {name: seed.memento() for name, seed in self.seeds.items()}

    def restore(self, memento: dict[str, dict[str, Any]]) -> None:
        """Take back every change since `memento`; modules and tensors are the same objects as then."""
        for name, seed in self.seeds.items():
            seed.restore(memento[name])
            self._settle(seed)

    def state_dict(self) -> dict[str, Any]:
        """Stages, alphas and evidence as JSON; the parameters are the checkpoint's tensors."""
        return {
            "seeds": {name: seed.state_dict() for name, seed in self.seeds.items()},
            "host_norms": [n.hex() for n in self.host_norms.read()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over every seed's stage; modules that are there already stay, others are built or removed.

        Raises CheckpointMismatch when the slots are others or a seed cannot be built.
        """
        saved = state["seeds"]
        if set(saved) != set(self.seeds):
            raise CheckpointMismatch(f"the checkpoint has slots {sorted(saved)}, the model has {sorted(self.seeds)}")
        for name, seed in self.seeds.items():
            if tuple(saved[name]["shape"]) != seed.shape:
                raise CheckpointMismatch(
                    f"slot {name!r}: shape {saved[name]['shape']} saved, {seed.shape} in the model"
                )
            before = (seed.stage, seed.fine_tuning, seed.blueprint, seed.command_id)
            seed.load_state_dict(saved[name])
            after = (seed.stage, seed.fine_tuning, seed.blueprint, seed.command_id)
            if after == before and seed.occupied == (seed.module is not None):
                continue  # the same module in the same form: a compiled graph goes on with it
            try:
                if not seed.occupied:
                    seed.module = None
                elif seed.module is None or after[2:] != before[2:]:
                    seed.module = self._build(seed, seed.blueprint, seed.command_id)
            except CommandRefused as error:
                raise CheckpointMismatch(f"slot {name!r}: its seed cannot be built again: {error}") from error
            self._settle(seed)
        self.host_norms.load([float.fromhex(n) for n in state["host_norms"]])

    def _clear(self, seed: Seed) -> None:
        seed.module = None
        seed.blueprint = seed.command_id = ""
        seed.fine_tuning = False
        seed.blend_position = 0
        seed.alpha.zero_()
        seed.norms.load([])
        seed.evidence = Evidence()

    def _settle(self, seed: Seed) -> None:
        """Give slot and parameters the form that the seed's stage asks for."""
        form = form_for(seed, self.config)
        self.slots[seed.slot].form = form if form is not None else self._host_only[seed.slot]
        if seed.module is not None:
            seed.module.requires_grad_(learns(seed, self.config))

    def _build(self, seed: Seed, blueprint_id: str, command_id: str, *, silent: bool = False) -> nn.Module:
        return build_seed(
            blueprint_id, seed.slot, seed.shape, run_seed=self._run_seed, command_id=command_id, device=self.device,
            memory_format=self._memory_format, silent=silent,
        )  # fmt: skip

    def _judge(self, found: Move, seed: Seed, room: GateResult | None = None) -> GateResult | None:
        norms = self.host_norms.read() if found.to == SeedStage.TRAINING else seed.evidence.gradient_norms
        return judge(found, seed, self.config, room=room, norms=norms)


def _require(result: GateResult | None) -> None:
    if result is not None and not result.ok:
        raise CommandRefused(result.gate.name.lower(), f"gate {result.gate.name}: {result.reason}")
