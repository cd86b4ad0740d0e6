"""`TrainState`: the one object that holds everything a run must not lose. Sole owner of what it holds.

    replicated, equal on every rank       model, seeds, optimizer, LR, scaler, data position, step, mode
    this rank's own                       random generators, meters of the running epoch

All that is saved hangs here; `capture` and `load` are each other's inverse, and a run that is saved, loaded and
continued is bit-equal to one that was not interrupted.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria.compare import check_same, digest_of, tensor_hashes
from tolaria.config import OptimConfig
from tolaria.data import EpochSampler
from tolaria.kasmina.host import Kasmina
from tolaria.leyline.types import CLIP_NORM, SeedStage
from tolaria.mode import Hand, Mode
from tolaria.objective import Objective
from tolaria.optim.lr import LRController
from tolaria.optim.persist import (
    copy_tensors,
    group_options,
    has_form,
    load_group_options,
    load_state,
    set_scalars,
    state_scalars,
    state_tensors,
    without_state,
)
from tolaria.optim.rebuild import build_optimizer, carry_hooks, regroup
from tolaria.optim.surgery import change_class, saved_settings, settings_meta
from tolaria.optim.tuning import Tuner

HOST_GROUP = "host"
HAND = "hand"
Copy: TypeAlias = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]
"""Overwrites live tensors (second) by those of the same names (first)."""


@dataclass(frozen=True)
class Memento:
    """What `TrainState.restore` needs to take back a change of structure, optimizer, LR or mode."""

    kasmina: dict[str, dict[str, Any]]
    optimizer: Optimizer
    optim: OptimConfig
    options: list[dict[str, Any]]
    lr: dict[str, Any]
    tuner: dict[str, Any]
    mode: Mode


class TrainState:
    """Everything that training changes. Methods are local; call those that change something alike on all ranks."""

    def __init__(
        self,
        *,
        objective: Objective,
        host_parameters: Mapping[str, nn.Parameter],
        host_buffers: Mapping[str, Tensor],
        kasmina: Kasmina,
        optimizer: Optimizer,
        optim: OptimConfig,
        lr: LRController,
        tuner: Tuner,
        clip_norm: float,
        scaler: torch.amp.GradScaler,
        sampler: EpochSampler,
    ) -> None:
        self.objective = objective
        self.host_parameters = dict(host_parameters)
        self.host_buffers = dict(host_buffers)
        self.kasmina = kasmina
        self.optimizer = optimizer
        self.optim = self._configured = optim
        self.lr = lr
        self.tuner = tuner
        self._fresh_options = {CLIP_NORM: clip_norm}
        for group in optimizer.param_groups:
            group.update(self._fresh_options)
        self.scaler = scaler
        self.sampler = sampler
        self.mode = Mode()
        self.hand = Hand()
        self.step = 0
        self.boundary = 0
        self.skipped_steps = 0

    @property
    def mode(self) -> Mode:
        """Normal or conservative; the learning rates follow it."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        self.lr.set_conservative(mode.conservative)

    @property
    def parameter_count(self) -> int:
        """Parameters of host and seeds."""
        return sum(p.numel() for p in self.host_parameters.values()) + self.kasmina.grown_parameters

    @property
    def configured_optimizer(self) -> str:
        """The name that the run was started with; ``optim.name`` is that of the optimizer in force."""
        return self._configured.name

    # Structure

    def regroup(self) -> None:
        """Bring optimizer groups and LR groups in line with Kasmina's seeds; the host's state stays bit-identical."""
        groups = self._groups()
        wanted = {name for members in groups.values() for name in members}
        present = [(group["name"], list(map(id, group["params"]))) for group in self.optimizer.param_groups]
        if present == [(name, list(map(id, members.values()))) for name, members in groups.items()]:
            return
        had = {name for group in self.optimizer.param_groups for name in group["param_names"]}
        self.optimizer = regroup(self.optimizer, groups, defaults=self._fresh_options, dropped=had - wanted)
        for name in set(self.lr.groups) - set(groups):
            self.lr.remove_group(name)
            self.tuner.forget(name)
        for name in groups:
            if name not in self.lr.groups:
                self.lr.add_group(name, "host" if name == HOST_GROUP else "seed", self.step)

    def plan_optimizer(self, name: str, given: Mapping[str, float]) -> tuple[OptimConfig, Optimizer]:
        """What `change_optimizer` would put in place. Changes nothing; raises what it raises."""
        changes: dict[str, Any] = {"name": name, **given}
        settings = replace(self.optim, **changes)
        return settings, change_class(self.optimizer, settings, anew=given.keys() - {"lr"})

    def change_optimizer(self, name: str, given: Mapping[str, float]) -> None:
        """Go on with another optimizer class from the next step on. What stays: `change_class`.

        ``given``: lr (the host's new peak rate), momentum, weight_decay, for all groups. Raises ValueError, ConfigError
        or TaskError, with nothing changed.
        """
        self.optim, self.optimizer = self.plan_optimizer(name, given)
        self.tuner.class_changed()
        if "lr" in given:
            self.lr.set_base_rate(self.optim.lr)

    def restart_warmup(self, group: str) -> None:
        """Begin the LR warm-up of a seed's group at this step."""
        self.lr.restart_warmup(group, self.step)

    def left_overs(self, group: str) -> list[str]:
        """What optimizer and LR controller still hold of a group (for gate G5)."""
        held = ["optimizer group"] if any(g["name"] == group for g in self.optimizer.param_groups) else []
        return held + (["LR group"] if group in self.lr.groups else [])

    def memento(self) -> Memento:
        """Keep what `restore` needs. Cheap: references and numbers, no copy of the host."""
        tuner, options = self.tuner.state_dict(), group_options(self.optimizer)
        kasmina, lr = self.kasmina.memento(), self.lr.state_dict()
        return Memento(kasmina, self.optimizer, self.optim, options, lr, tuner, self.mode)

    def restore(self, memento: Memento) -> None:
        """Take back every change of structure, optimizer, LR and mode since `memento`."""
        self.kasmina.restore(memento.kasmina)
        self.optimizer, self.optim = memento.optimizer, memento.optim
        load_group_options(self.optimizer, memento.options)
        self.mode = memento.mode  # before the rates, in whose history the change of mode is
        self.lr.load_state_dict(memento.lr)
        self.tuner.load_state_dict(memento.tuner)

    def after_step(self, *, taken: bool) -> bool:
        """Count one optimizer step, taken or skipped. True if it ended the epoch."""
        self.step += 1
        self.skipped_steps += not taken
        if taken and not self.mode.conservative:
            self.kasmina.advance()
            for seed in self.kasmina.seeds.values():
                if seed.stage == SeedStage.BLENDING:
                    self.lr.set_progress(seed.group, seed.alpha_value)
        return self.sampler.advance()

    # What is equal on every rank

    def tensors(self) -> dict[str, Tensor]:
        """The live replicated tensors by name: ``model/...``, ``seed/<slot>/...``, ``optim/<parameter>/<key>``."""
        found: dict[str, Tensor] = {}
        for name, tensor in (*self.host_parameters.items(), *self.host_buffers.items()):
            found[f"model/{name}"] = tensor.detach()
        for seed in self.kasmina.seeds.values():
            for name, tensor in (*seed.named_parameters().items(), *seed.named_buffers().items()):
                found[name] = tensor.detach()
        for name, tensor in state_tensors(self.optimizer).items():
            found[f"optim/{name}"] = tensor
        return found

    def meta(self) -> dict[str, Any]:
        """The rest of the replicated state, as JSON."""
        return {
            "step": self.step,
            "boundary": self.boundary,
            "skipped_steps": self.skipped_steps,
            "sampler": self.sampler.state_dict(),
            "kasmina": self.kasmina.state_dict(),
            "lr": self.lr.state_dict(),
            "tuner": self.tuner.state_dict(),
            # Rates are the LR controller's; what somebody else wrote is no part of the state.
            "groups": group_options(self.optimizer, rates=False),
            "optimizer": settings_meta(self._configured, self.optim) | {"scalars": state_scalars(self.optimizer)},
            "scaler": dict(self.scaler.state_dict()),
            "mode": asdict(self.mode),
            HAND: asdict(self.hand),
        }

    def digest(self) -> bytes:
        """sha256 over names, types, shapes and bytes of all replicated state. Reads every tensor once."""
        return digest_of(self.tensors(), without_hand(self.meta()))

    def structure_digest(self) -> bytes:
        """Digest of what a command can change: structure, new weights, groups, LR, mode; without the host's weights."""
        shapes = [[n, str(t.dtype), list(t.shape)] for n, t in sorted(self.tensors().items())]
        # Hashed where they are: it compares ranks, and sha256 would take the seeds to the host one by one.
        seeds = tensor_hashes({n: t for n, t in self.tensors().items() if n.startswith("seed/")})
        meta = without_hand(self.meta())
        # Earlier changes were compared when they came; a thousand of them as text take 1 ms.
        del meta["lr"]["history"][:-64]
        return digest_of({}, {**meta, "shapes": shapes, "seeds": seeds})

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, copy: Copy = copy_tensors) -> bool:
        """Take over a saved state, in place where structure and optimizer are the same. True if the structure changed.

        Raises CheckpointMismatch when it belongs to another model, TaskError for its data: the seeds are built first,
        everything is checked before the first tensor is copied. ``copy(source, live)`` moves the bytes; what it raises
        leaves the state half copied.
        """
        settings = saved_settings(self._configured, meta.get("optimizer", {}))
        before = list(self.optimizer.param_groups)
        forms = {name: slot.form for name, slot in self.kasmina.slots.items()}
        learning = self.kasmina.shadow_seeds()
        self.kasmina.load_state_dict(meta["kasmina"])
        self.step, self.boundary = int(meta["step"]), int(meta["boundary"])
        self.skipped_steps = int(meta["skipped_steps"])
        self._forget_replaced_seeds()
        if settings != self.optim:
            new = build_optimizer(settings, self._groups(), next(iter(self.host_parameters.values())).device)
            carry_hooks(self.optimizer, new)
            self.optimizer, self.optim = new, settings
        self.regroup()
        own, saved = without_state(self.tensors()), without_state(tensors)
        check_same(own, saved)
        self.sampler.load_state_dict(meta["sampler"])
        self.mode, self.hand = Mode(**meta["mode"]), Hand(**meta.get(HAND, {}))
        self.lr.load_state_dict(meta["lr"])
        self.tuner.load_state_dict(meta["tuner"])
        self.scaler.load_state_dict(dict(meta["scaler"]))
        load_group_options(self.optimizer, meta["groups"])
        live = self.tensors()
        of_optimizer = {name[6:]: t for name, t in tensors.items() if name.startswith("optim/")}
        scalars = meta["optimizer"]["scalars"]
        if has_form(self.optimizer, of_optimizer, scalars):
            copy(tensors, live)
            set_scalars(self.optimizer, scalars)
        else:
            load_state(self.optimizer, of_optimizer, scalars)
            copy(saved, own)
        # A seed that learns behind the host is of the same form as one that does not.
        same = _same(before, self.optimizer.param_groups) and _same(learning, self.kasmina.shadow_seeds())
        return not same or any(slot.form is not forms[n] for n, slot in self.kasmina.slots.items())

    def _groups(self) -> dict[str, Mapping[str, nn.Parameter]]:
        return {HOST_GROUP: self.host_parameters, **self.kasmina.groups()}

    def _forget_replaced_seeds(self) -> None:
        # A seed built again may have other shapes under the same names, and its state comes with the saved tensors.
        wanted = {id(p) for members in self.kasmina.groups().values() for p in members.values()}
        wanted |= set(map(id, self.host_parameters.values()))
        for parameter in [p for p in self.optimizer.state if id(p) not in wanted]:
            del self.optimizer.state[parameter]


def without_hand(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The meta of a state as its digest takes it: without what an operator did but training does not know."""
    return {key: value for key, value in meta.items() if key != HAND}


def named_buffers_of(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a forward pass may change, of host and seeds, by name and in one order on all ranks."""
    yield from sorted(state.host_buffers.items())
    for seed in state.kasmina.seeds.values():
        yield from sorted(seed.named_buffers().items())


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))
