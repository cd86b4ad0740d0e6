"""Learning rates: every group's rate is a function of the step number and a few numbers that can be saved.

    host rate(step)  = base_lr * warm-up(step) * schedule(step)          the same course on every rank
                       * re-warm(step)                                   from 0.1 to 1 after a return, if asked for
    group rate(step) = host rate(step) * share(group, step) * scale      share: 1 for the host, by policy for a seed
                                                                         scale: product of the commands so far

Steps count from 0: `lr_at(name, n)` is the rate of the optimizer step that makes the (n+1)-th update. All arithmetic
is in Python floats (IEEE 754 double), so ranks that make the same calls get the same bits. The controller is given
the optimizer at each call and never keeps it, so a rebuilt optimizer can not leave it driving the old one.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch.optim import Optimizer

from tolaria.config import LRConfig
from tolaria.errors import CheckpointMismatch, CommandRefused
from tolaria.optim.schedule import checked_rate, host_share

Kind: TypeAlias = Literal["host", "seed"]
Cause: TypeAlias = Literal["added", "removed", "command", "follow_host", "corrected"]

HISTORY_LENGTH = 1000
RELATIVE_TOLERANCE = 1e-6
ABSOLUTE_TOLERANCE = 1e-12
VIOLATIONS_TO_OPEN = 3
WARMUP_START = 0.01  # share of its rate with which a seed starts under seed_warmup
REWARM_START = 0.1  # share of every rate right after a return to an earlier state
ADAPTIVE_START = 0.1  # share of the host's rate with which a seed starts under morpho_adaptive


class LRViolation(NamedTuple):
    """Somebody else wrote a learning rate: ``found`` stood in the group where ``expected`` was left."""

    step: int
    group: str
    expected: float
    found: float


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
        self._written: dict[str, float] = {}
        self._history: deque[LRChange] = deque(maxlen=HISTORY_LENGTH)
        self._violations = 0
        self._next_step = 0
        self._rewarm = (0, 0)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the known groups, oldest first."""
        return tuple(self._groups)

    @property
    def history(self) -> tuple[LRChange, ...]:
        """The last 1,000 changes, oldest first. The schedule's own course is not in it: `lr_at` gives it."""
        return tuple(self._history)

    @property
    def tampered(self) -> bool:
        """Whether three or more foreign changes were found since the start or the last `reset_integrity`."""
        return self._violations >= VIOLATIONS_TO_OPEN

    def reset_integrity(self) -> None:
        """Close the integrity breaker: forget the violations counted so far."""
        self._violations = 0

    def add_group(self, name: str, kind: Kind = "host", born_step: int = 0) -> None:
        """Know a further group. ``born_step``: the step at which a seed's warm-up starts.

        Raises ValueError for a name that is already known, an unknown kind or a negative step.
        """
        if name in self._groups:
            raise ValueError(f"learning-rate group {name!r} exists already")
        if kind not in get_args(Kind) or born_step < 0:
            raise ValueError(f"group {name!r}: kind={kind!r}, born_step={born_step!r}: expected host|seed, 0 or more")
        self._groups[name] = _Group(kind, born_step)
        self._record(name, "added", 0.0, self.lr_at(name, self._next_step), 1.0)

    def remove_group(self, name: str) -> None:
        """Forget a group and all that commands did to it. Raises KeyError for an unknown name."""
        group = self._group(name)
        old_lr = self.lr_at(name, self._next_step)
        del self._groups[name]
        self._written.pop(name, None)
        self._record(name, "removed", old_lr, 0.0, group.scale)

    def follow_host(self, name: str) -> None:
        """Treat a seed's group as part of the host from the next step on; its scale stays. Raises KeyError."""
        group = self._group(name)
        old_lr = self.lr_at(name, self._next_step)
        group.kind = "host"
        self._record(name, "follow_host", old_lr, self.lr_at(name, self._next_step), group.scale)

    def set_progress(self, name: str, fraction: float) -> None:
        """Say how far a seed is blended in, 0 to 1 (used by morpho_adaptive). Raises KeyError, ValueError."""
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"progress of group {name!r} is {fraction!r}: expected 0 to 1")
        self._group(name).progress = float(fraction)

    def rewarm(self, step: int, steps: int) -> None:
        """Bring all rates up again from a tenth, over ``steps`` steps from ``step`` on; 0 ends a re-warm."""
        self._rewarm = (step, steps)

    def set_base_rate(self, base_lr: float) -> None:
        """Put another peak rate of the host in place of the configured one; what commands did to groups stays.

        Raises ValueError unless it is a finite number above 0.
        """
        before = {name: self.lr_at(name, self._next_step) for name in self._groups}
        self._base_lr = checked_rate(base_lr)
        for name, group in self._groups.items():
            self._record(name, "command", before[name], self.lr_at(name, self._next_step), group.scale)

    def lr_at(self, name: str, step: int) -> float:
        """The rate of a group at ``step`` as things stand now. Changes nothing. Raises KeyError."""
        return self._rate(self._group(name), step, self._host_lr(step))

    def apply(self, optimizer: Optimizer, step: int) -> list[LRViolation]:
        """Write the rates of ``step`` into every group of ``optimizer``; call it right before the step.

        A group whose rate is not what the last call left there was changed by somebody else: the change is
        returned, counted, recorded and overwritten. A group met for the first time, or for the first time after
        `load_state_dict`, has nothing to be compared with. Raises KeyError for a group that was never added, before
        any rate is written.
        """
        known = [(group, group["name"], self._group(group["name"])) for group in optimizer.param_groups]
        host_lr = self._host_lr(step)
        self._next_step = step + 1
        violations = []
        for group, name, state in known:
            new_lr = self._rate(state, step, host_lr)
            expected = self._written.get(name)
            if expected is not None and not _same_rate(group["lr"], expected):
                found = float(group["lr"])
                violations.append(LRViolation(step, name, expected, found))
                self._history.append(LRChange(step, name, "corrected", found, new_lr, state.scale))
            group["lr"] = self._written[name] = new_lr
        self._violations += len(violations)
        return violations

    def plan_scale(self, pattern: str, factor: float, *, conservative: bool) -> list[LRChange]:
        """What `scale` would do. Changes nothing; raises what `scale` raises."""
        if not (math.isfinite(factor) and factor > 0):
            raise CommandRefused("invalid_factor", f"LR factor {factor!r}: expected a finite number above 0")
        if conservative and factor > 1:
            raise CommandRefused("lr_increase_conservative", f"LR factor {factor:g}: no increase in conservative mode")
        names = [name for name in self._groups if fnmatchcase(name, pattern)]
        if not names:
            raise CommandRefused(
                "unknown_group", f"no LR group matches {pattern!r}; there are {', '.join(self._groups)}"
            )
        return [self._plan_one(name, factor) for name in names]

    def scale(self, pattern: str, factor: float, *, conservative: bool) -> list[LRChange]:
        """Multiply the rates of all groups whose name matches the shell pattern, from the next step on.

        All or none: raises CommandRefused, with nothing changed, when the factor is no finite positive number
        ("invalid_factor"), nothing matches ("unknown_group"), a group's total factor would leave
        [min_scale, max_scale] ("lr_out_of_bounds"), or it is an increase in conservative mode
        ("lr_increase_conservative").
        """
        changes = self.plan_scale(pattern, factor, conservative=conservative)
        for change in changes:
            self._groups[change.group].scale = change.scale
        self._history.extend(changes)
        return changes

    def state_dict(self) -> dict[str, Any]:
        """All that `lr_at` and `apply` depend on besides the arguments given to the constructor; JSON-able."""
        return {
            "groups": {name: asdict(group) for name, group in self._groups.items()},
            "violations": self._violations,
            "next_step": self._next_step,
            "rewarm": list(self._rewarm),
            "base_lr": None if self._base_lr == self._configured_lr else self._base_lr,
            "history": [list(change) for change in self._history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises CheckpointMismatch, with nothing changed, when it is not that."""
        try:
            groups = {str(name): _Group(**fields) for name, fields in state["groups"].items()}
            history = [LRChange(*entry) for entry in state["history"]]
            violations, next_step = int(state["violations"]), int(state["next_step"])
            rewarm_start, rewarm_steps = map(int, state["rewarm"])
            base_lr = self._configured_lr if state["base_lr"] is None else checked_rate(float(state["base_lr"]))
            sound = all(self._is_sound(group) for group in groups.values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointMismatch(f"saved learning-rate state is malformed: {error!r}") from error
        if not sound:
            raise CheckpointMismatch(f"saved learning-rate state holds a value out of its range: {groups}")
        self._groups = groups
        self._base_lr = base_lr
        self._written = {}
        self._history = deque(history, maxlen=HISTORY_LENGTH)
        self._violations, self._next_step = violations, next_step
        self._rewarm = (rewarm_start, rewarm_steps)

    def _host_lr(self, step: int) -> float:
        start, steps = self._rewarm
        share = min(1.0, REWARM_START + (1.0 - REWARM_START) * max(0, step - start) / steps) if steps else 1.0
        return self._base_lr * host_share(self._config, step, self._total_steps) * share

    def _group(self, name: str) -> _Group:
        if name not in self._groups:
            raise KeyError(f"no learning-rate group {name!r}; there are {', '.join(self._groups) or 'none'}")
        return self._groups[name]

    def _rate(self, group: _Group, step: int, host_lr: float) -> float:
        if group.kind == "host":
            return host_lr * group.scale
        return host_lr * self._seed_share(group, step) * group.scale

    def _seed_share(self, group: _Group, step: int) -> float:
        ratio = self._config.seed_ratio
        match self._config.seed_policy:
            case "frozen":
                return 0.0
            case "seed_warmup":
                steps = self._config.seed_warmup_steps
                age = max(0, step - group.born_step)
                return ratio if age >= steps else ratio * (WARMUP_START + (1.0 - WARMUP_START) * age / steps)
            case "morpho_adaptive":
                start = min(ADAPTIVE_START, ratio)
                return start * (1.0 - group.progress) + ratio * group.progress

    def _plan_one(self, name: str, factor: float) -> LRChange:
        low, high = self._config.min_scale, self._config.max_scale
        old = self._groups[name]
        wanted = old.scale * factor
        scale = min(max(wanted, low), high)
        # Factors that lead back to a bound may miss it by rounding; that is no reason to refuse.
        if not math.isclose(wanted, scale, rel_tol=1e-9):
            raise CommandRefused(
                "lr_out_of_bounds",
                f"LR factor {factor:g} would bring the total factor of {name!r} from {old.scale:g} to {wanted:g}; "
                f"allowed: {low:g} to {high:g}",
            )
        host_lr = self._host_lr(self._next_step)
        new = _Group(old.kind, old.born_step, scale, old.progress)
        old_lr, new_lr = (self._rate(group, self._next_step, host_lr) for group in (old, new))
        return LRChange(self._next_step, name, "command", old_lr, new_lr, scale)

    def _record(self, name: str, cause: Cause, old_lr: float, new_lr: float, scale: float) -> None:
        self._history.append(LRChange(self._next_step, name, cause, old_lr, new_lr, scale))

    def _is_sound(self, group: _Group) -> bool:
        # A scale outside today's bounds is sound: the bounds may have been narrowed between two runs.
        return (
            group.kind in get_args(Kind)
            and type(group.born_step) is int and group.born_step >= 0
            and math.isfinite(group.scale) and group.scale > 0
            and 0.0 <= group.progress <= 1.0
        )  # fmt: skip


def _same_rate(found: float, expected: float) -> bool:
    """False for NaN too."""
    return abs(found - expected) <= max(RELATIVE_TOLERANCE * abs(expected), ABSOLUTE_TOLERANCE)
