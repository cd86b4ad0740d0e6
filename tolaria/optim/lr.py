"""Learning rates: every group's rate is a function of the step number and a few numbers that can be saved.

    rate(group, step) = base_lr * share(group's policy, step)     warm-up and schedule; see tolaria/optim/schedule.py
                        * re-warm(step)                           from 0.1 to 1 after a return, if asked for
                        * scale                                   product of the commands so far
                        * conservative_factor                     while the run is in conservative mode
                        and 0 while the group is frozen

Warm-ups, re-warm and conservative mode are brakes, on top of a rate for a while. Commands set, and bounds hold for, the
settled rate, the one without them: no command makes up for a brake and outlives it.

Steps count from 0: `lr_at(name, n)` is the rate of the optimizer step that makes the (n+1)-th update. All arithmetic
is in Python floats (IEEE 754 double), so ranks that make the same calls get the same bits. The controller is given
the optimizer at each call and never keeps it, so a rebuilt optimizer can not leave it driving the old one.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch.optim import Optimizer

from tolaria.config_tuning import LRConfig
from tolaria.errors import CheckpointMismatch, CommandRefused
from tolaria.optim.integrity import LRViolation, RateWriter
from tolaria.optim.schedule import Kind, checked_rate, frozen_by, group_share, policy_of, rewarm_share, settled_share

Cause: TypeAlias = Literal["added", "removed", "command", "undo", "follow_host", "restarted", "rewarm", "mode"]

HISTORY_LENGTH = 1000
VIOLATIONS_TO_OPEN = 3


class LRChange(NamedTuple):
    """One change that the schedule did not make. ``step``: the first step with ``new_lr``. ``scale``: after it."""

    step: int
    group: str
    cause: Cause
    old_lr: float
    new_lr: float
    scale: float


@dataclass
class _Group:
    kind: Kind
    born_step: int
    scale: float = 1.0
    progress: float = 0.0
    frozen: bool = False

    @property
    def is_sound(self) -> bool:
        # A scale outside today's bounds is sound: the bounds may have been narrowed between two runs.
        return (
            self.kind in get_args(Kind)
            and type(self.born_step) is int and self.born_step >= 0
            and math.isfinite(self.scale) and self.scale > 0
            and 0.0 <= self.progress <= 1.0
            and type(self.frozen) is bool
        )  # fmt: skip


class LRController:
    """The only writer of learning rates. Local: no method communicates; call each alike on all ranks.

    ``base_lr`` is the host's peak rate, ``total_steps`` the planned optimizer steps of the run (1 or more).
    Groups are told apart by the ``"name"`` of the optimizer's parameter groups. A seed's rate follows the host's
    schedule but not the commands that scale the host: a command reaches the groups that its pattern names, once.
    """

    def __init__(self, config: LRConfig, base_lr: float, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps!r}: expected 1 or more")
        self._config = config
        self._base_lr = self._configured_lr = checked_rate(base_lr)
        self._total_steps = total_steps
        self._groups: dict[str, _Group] = {}
        self._writer = RateWriter()
        self._history: deque[LRChange] = deque(maxlen=HISTORY_LENGTH)
        self._found = 0
        self._violations = 0
        self._next_step = 0
        self._rewarm = (0, 0)
        self._conservative = False

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the known groups, oldest first."""
        return tuple(self._groups)

    @property
    def frozen(self) -> frozenset[str]:
        """Groups that must not be updated at all, by command or by policy."""
        return frozenset(n for n, g in self._groups.items() if g.frozen or frozen_by(self._config, n, g.kind))

    @property
    def history(self) -> tuple[LRChange, ...]:
        """The last 1,000 changes, oldest first. The schedule's own course is not in it: `lr_at` gives it."""
        return tuple(self._history)

    # Integrity: a rank finds what was done on it, all ranks count alike

    @property
    def tampered(self) -> bool:
        """Whether the integrity breaker is open: foreign changes were counted at three steps or more."""
        return self._violations >= VIOLATIONS_TO_OPEN

    def take_found(self) -> int:
        """Foreign changes that `apply` has found on this rank since the last call; may differ over ranks."""
        found, self._found = self._found, 0
        return found

    def count_violation(self) -> bool:
        """Count one step at which some rank found a foreign change. True if that opens the breaker."""
        self._violations += 1
        return self._violations == VIOLATIONS_TO_OPEN

    def reset_integrity(self) -> None:
        """Close the integrity breaker: forget the violations counted so far."""
        self._violations = 0

    # Groups and what changes their course

    def add_group(self, name: str, kind: Kind = "host", born_step: int = 0) -> None:
        """Know a further group. ``born_step``: the step at which a seed's warm-up starts.

        Raises ValueError for a name that is already known, an unknown kind or a negative step.
        """
        if name in self._groups:
            raise ValueError(f"learning-rate group {name!r} exists already")
        if kind not in get_args(Kind) or born_step < 0:
            raise ValueError(f"group {name!r}: kind={kind!r}, born_step={born_step!r}: expected host|seed, 0 or more")
        self._groups[name] = _Group(kind, born_step)
        self._record(name, "added", 0.0)

    def remove_group(self, name: str) -> None:
        """Forget a group and all that commands did to it. Raises KeyError for an unknown name."""
        group = self._group(name)
        self._history.append(
            LRChange(self._next_step, name, "removed", self.lr_at(name, self._next_step), 0.0, group.scale)
        )
        del self._groups[name]
        self._writer.forget(name)

    def follow_host(self, name: str) -> None:
        """Treat a seed's group as part of the host from the next step on; what commands did stays. Raises KeyError."""
        self._change(name, "follow_host", self._next_step, kind="host")

    def restart_warmup(self, name: str, step: int) -> None:
        """Begin a seed's warm-up at ``step``; what commands did stays. Raises KeyError."""
        self._change(name, "restarted", step, born_step=step)

    def set_progress(self, name: str, fraction: float) -> None:
        """Say how far a seed is blended in, 0 to 1 (used by morpho_adaptive). Raises KeyError, ValueError."""
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"progress of group {name!r} is {fraction!r}: expected 0 to 1")
        self._group(name).progress = float(fraction)

    def rewarm(self, step: int, steps: int) -> None:
        """Bring all rates up again from a tenth, over ``steps`` steps from ``step`` on; 0 ends a re-warm."""
        old = {name: self.lr_at(name, step) for name in self._groups}
        self._rewarm = (step, steps)
        for name, old_lr in old.items():
            self._record(name, "rewarm", old_lr, step)

    def set_conservative(self, on: bool) -> None:
        """Put ``lr.conservative_factor`` on all rates, or take it off again."""
        if on == self._conservative:
            return
        old = {name: self.lr_at(name, self._next_step) for name in self._groups}
        self._conservative = on
        if self._config.conservative_factor != 1.0:
            for name, old_lr in old.items():
                self._record(name, "mode", old_lr)

    # Rates

    def set_base_rate(self, base_lr: float) -> None:
        """Replace the host's peak rate; what commands did to groups stays. Raises ValueError unless it is above 0."""
        before = {name: self.lr_at(name, self._next_step) for name in self._groups}
        self._base_lr = checked_rate(base_lr)
        for name, old_lr in before.items():
            self._record(name, "command", old_lr)

    def lr_at(self, name: str, step: int) -> float:
        """The rate of a group at ``step`` as things stand now. Changes nothing. Raises KeyError."""
        return self._rate(name, self._group(name), step)

    def settled_lr_at(self, name: str, step: int) -> float:
        """The rate at ``step`` with scale 1, not frozen and without any brake. Raises KeyError."""
        kind = self._group(name).kind
        return self._base_lr * settled_share(self._config, name, kind, step, self._total_steps)

    def scale_of(self, name: str) -> float:
        """The product of all commands on a group's rate so far. Raises KeyError."""
        return self._group(name).scale

    def is_frozen(self, name: str) -> bool:
        """Whether a command has frozen the group. Raises KeyError."""
        return self._group(name).frozen

    def frozen_by(self, name: str) -> str:
        """The configuration key whose policy keeps the group frozen, empty when none does. Raises KeyError."""
        return frozen_by(self._config, name, self._group(name).kind)

    def apply(self, optimizer: Optimizer, step: int) -> list[LRViolation]:
        """Write the rates of ``step`` into every group of ``optimizer``; call it right before the step.

        A group whose rate is not what the last call left there was changed by somebody else: the change is
        returned, counted for `take_found`, and overwritten. A group met for the first time, or for the first time
        after `load_state_dict`, has nothing to be compared with. Raises KeyError for a group that was never added,
        before any rate is written.
        """
        rates = [(group, self.lr_at(group["name"], step)) for group in optimizer.param_groups]
        self._next_step = step + 1
        violations = self._writer.write(rates, step)
        self._found += len(violations)
        return violations

    # Commands

    def matching(self, pattern: str) -> list[str]:
        """Groups whose name matches a shell pattern. Raises CommandRefused ("unknown_group") when there is none."""
        names = [name for name in self._groups if fnmatchcase(name, pattern)]
        if not names:
            there = ", ".join(self._groups)
            raise CommandRefused("unknown_group", f"no optimizer group matches {pattern!r}; there are {there}")
        return names

    def set_scale(self, name: str, scale: float, step: int, cause: Cause = "command") -> None:
        """Give a group this total scale from ``step`` on. Raises KeyError, ValueError for a scale not above 0."""
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale of group {name!r} is {scale!r}: expected a finite number above 0")
        self._change(name, cause, step, scale=scale)

    def set_frozen(self, name: str, frozen: bool, step: int, cause: Cause = "command") -> None:
        """Freeze a group from ``step`` on, or let it go on from where it was. Raises KeyError."""
        self._change(name, cause, step, frozen=frozen)

    # Memory

    def state_dict(self) -> dict[str, Any]:
        """All that `lr_at` and `apply` depend on besides the constructor's arguments and the mode; JSON-able."""
        return {
            "groups": {name: asdict(group) for name, group in self._groups.items()},
            "violations": self._violations,
            "next_step": self._next_step,
            "rewarm": list(self._rewarm),
            "base_lr": None if self._base_lr == self._configured_lr else self._base_lr,
            "history": list(map(list, self._history)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises CheckpointMismatch, with nothing changed, when it is not that."""
        try:
            groups = {str(name): _Group(**fields) for name, fields in state["groups"].items()}
            history = [LRChange(*entry) for entry in state["history"]]
            violations, next_step = int(state["violations"]), int(state["next_step"])
            rewarm_start, rewarm_steps = map(int, state["rewarm"])
            base_lr = self._configured_lr if state["base_lr"] is None else checked_rate(float(state["base_lr"]))
            sound = all(group.is_sound for group in groups.values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointMismatch(f"saved learning-rate state is malformed: {error!r}") from error
        if not sound:
            raise CheckpointMismatch(f"saved learning-rate state holds a value out of its range: {groups}")
        self._groups = groups
        self._base_lr = base_lr
        self._writer.forget()
        self._history = deque(history, maxlen=HISTORY_LENGTH)
        self._found, self._violations, self._next_step = 0, violations, next_step
        self._rewarm = (rewarm_start, rewarm_steps)

    def _group(self, name: str) -> _Group:
        if name not in self._groups:
            raise KeyError(f"no learning-rate group {name!r}; there are {', '.join(self._groups) or 'none'}")
        return self._groups[name]

    def _rate(self, name: str, group: _Group, step: int) -> float:
        if group.frozen:
            return 0.0
        share = group_share(
            self._config, policy_of(self._config, name, group.kind), group.kind, step, self._total_steps,
            age=step - group.born_step, progress=group.progress,
        )  # fmt: skip
        rate = self._base_lr * share * rewarm_share(step, *self._rewarm) * group.scale
        return rate * self._config.conservative_factor if self._conservative else rate

    def _change(self, name: str, cause: Cause, step: int, **fields: Any) -> None:
        old_lr = self._rate(name, self._group(name), step)
        self._groups[name] = replace(self._groups[name], **fields)
        self._record(name, cause, old_lr, step)

    def _record(self, name: str, cause: Cause, old_lr: float, step: int | None = None) -> None:
        at, group = self._next_step if step is None else step, self._groups[name]
        self._history.append(LRChange(at, name, cause, old_lr, self._rate(name, group, at), group.scale))
