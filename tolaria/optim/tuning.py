"""Commands to the optimizer: planned within bounds, carried out as a whole, taken back bit for bit.

plan      pure: what a command would change, as (group, key, old, new), or which bound forbids it
commit    the changes, in the LR controller and in the optimizer's groups; remembered for as long as they can be undone

Every method is local; ranks that make the same calls hold the same.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.optim import Optimizer

from tolaria.config_tuning import LRConfig, TuningConfig
from tolaria.errors import CheckpointMismatch, CommandRefused
from tolaria.leyline.limits import as_written
from tolaria.leyline.types import (
    BETA1,
    BETA2,
    CLIP_NORM,
    FREEZE,
    HYPERPARAMETERS,
    LR,
    LR_SCALE,
    MOMENTUM,
    UNDO,
    WEIGHT_DECAY,
    OptimizerCommand,
)
from tolaria.optim.lr import Cause, LRController
from tolaria.optim.tuning_limits import check_change, check_scale


class Change(NamedTuple):
    """One thing of one group. ``key``: a hyperparameter's name; "lr_scale" is the group's total factor."""

    group: str
    key: str
    old: float
    new: float


@dataclass(frozen=True)
class Tuning:
    """What a command will change. ``undoes``: the command whose changes these take back, empty for any other."""

    command_id: str
    changes: tuple[Change, ...]
    undoes: str = ""

    @property
    def touched(self) -> set[str]:
        """What of which group, for people: "lr of host"."""
        return {f"{LR if c.key == LR_SCALE else c.key} of {c.group}" for c in self.changes}


class Tuner:
    """Plans and carries out optimizer commands. Remembers the newest ones, so that they can be undone.

    ``bounds``: how far commands may go, also those that other parts carry out.
    """

    def __init__(self, config: TuningConfig, lr_config: LRConfig) -> None:
        self.bounds = config
        self._lr_config = lr_config
        self._done: list[tuple[str, tuple[Change, ...]]] = []

    def plan(
        self,
        command_id: str,
        payload: OptimizerCommand,
        optimizer: Optimizer,
        lr: LRController,
        *,
        step: int,
        conservative: bool,
    ) -> Tuning:
        """What the command would change from ``step`` on. Pure.

        Raises CommandRefused for a group, a name or a value that there is not ("unknown_group", "unknown_parameter",
        "bad_parameter", "invalid_factor"), for one outside its bounds ("lr_out_of_bounds", "out_of_bounds") or too far
        for one boundary ("rate_limited"), for a rate or a thaw of none but groups that the configuration freezes
        ("frozen_by_policy"), for faster learning in conservative mode ("lr_increase_conservative",
        "thaw_conservative", "faster_conservative") and for an undo of nothing ("nothing_to_undo").
        """
        values = {name: as_written(value) for name, value in payload.hyperparameters.items()}
        _check_names(values)
        names = lr.matching(payload.optimizer_id or "*")
        groups = {str(group["name"]): group for group in optimizer.param_groups}
        if UNDO in values:
            tuning = self._plan_undo(command_id, names, groups, lr)
        else:
            taken = {key: _takers(key, values[key], names, lr) for key in HYPERPARAMETERS if key in values}
            changes = (
                self._plan_one(groups[name], key, values[key], lr, step)
                for name in names for key, takers in taken.items() if name in takers
            )  # fmt: skip
            tuning = Tuning(command_id, tuple(changes))
        if conservative:
            _check_conservative(tuning.changes)
        return tuning

    def commit(self, tuning: Tuning, optimizer: Optimizer, lr: LRController, step: int) -> None:
        """Make the planned changes, from ``step`` on; the groups are those that it was planned for."""
        groups = {str(group["name"]): group for group in optimizer.param_groups}
        for change in tuning.changes:
            _put(groups[change.group], lr, change, step, "undo" if tuning.undoes else "command")
        if tuning.undoes:
            self._taken_back(tuning)
            return
        made = tuple(change for change in tuning.changes if change.new != change.old)
        if made:
            self._done = [*self._done, (tuning.command_id, made)][-self.bounds.undo_depth :]

    def newest(self, groups: Iterable[str]) -> str | None:
        """Id of the newest command on any of these groups that can be undone, None for none."""
        wanted = set(groups)
        mine = (command_id for command_id, changes in reversed(self._done) if any(c.group in wanted for c in changes))
        return next(mine, None)

    def forget(self, group: str) -> None:
        """A group is gone: nothing of it can be undone any more."""
        kept = ((command_id, tuple(c for c in changes if c.group != group)) for command_id, changes in self._done)
        self._done = [(command_id, changes) for command_id, changes in kept if changes]

    def class_changed(self) -> None:
        """The optimizer is another one, with rates of its own size: nothing from before can be undone any more."""
        self._done = []

    def state_dict(self) -> dict[str, Any]:
        """What can be undone, oldest first, as JSON."""
        return {"done": [[command_id, [list(c) for c in changes]] for command_id, changes in self._done]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises CheckpointMismatch, with nothing changed, when it is not that."""
        try:
            done = [(str(command_id), tuple(Change(*c) for c in changes)) for command_id, changes in state["done"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointMismatch(f"saved optimizer commands are malformed: {error!r}") from error
        self._done = done

    def _plan_one(self, group: Mapping[str, Any], key: str, value: float, lr: LRController, step: int) -> Change:
        name = str(group["name"])
        if key in (LR, LR_SCALE):
            old = lr.scale_of(name)
            settled = lr.settled_lr_at(name, step)
            new = check_scale(self.bounds, self._lr_config, name, key, value, old=old, settled=settled)
            return Change(name, LR_SCALE, old, new)
        if key == FREEZE:
            return Change(name, FREEZE, float(lr.is_frozen(name)), value)
        old = read_option(group, key)
        check_change(self.bounds, name, key, old, value)
        return Change(name, key, old, value)

    def _plan_undo(self, command_id: str, names: Iterable[str], groups: Mapping[str, Any], lr: LRController) -> Tuning:
        wanted = set(names)
        for undoes, changes in reversed(self._done):
            mine = [change for change in changes if change.group in wanted]
            if mine:
                back = (Change(c.group, c.key, _read(groups[c.group], lr, c.key), c.old) for c in mine)
                return Tuning(command_id, tuple(back), undoes)
        raise CommandRefused("nothing_to_undo", f"no command on {', '.join(sorted(wanted))} is left to undo")

    def _taken_back(self, tuning: Tuning) -> None:
        back = {(change.group, change.key) for change in tuning.changes}
        at = max(at for at, (command_id, _) in enumerate(self._done) if command_id == tuning.undoes)
        left = tuple(change for change in self._done[at][1] if (change.group, change.key) not in back)
        self._done[at : at + 1] = [(tuning.undoes, left)] if left else []


def _takers(key: str, value: float, names: list[str], lr: LRController) -> list[str]:
    """The groups on which this would have an effect: a policy of the schedule that freezes a group keeps its rate."""
    if key not in (LR, LR_SCALE) and not (key == FREEZE and value == 0):
        return names
    takers = [name for name in names if not lr.frozen_by(name)]
    if not takers:
        by = lr.frozen_by(names[0])
        raise CommandRefused("frozen_by_policy", f"{key} of {names[0]!r}: its policy is frozen ({by})")
    return takers


def options_there(group: Mapping[str, Any]) -> list[str]:
    """Names of the hyperparameters that the optimizer's class has, beside those of the learning rate."""
    return [key for key in (WEIGHT_DECAY, BETA1, BETA2, MOMENTUM, CLIP_NORM) if _place(group, key) is not None]


def read_option(group: Mapping[str, Any], key: str) -> float:
    """The value of a hyperparameter in an optimizer's group. Raises CommandRefused when its class has none."""
    place = _place(group, key)
    if place is None:
        has = ", ".join([LR, LR_SCALE, FREEZE, *options_there(group)])
        raise CommandRefused("unknown_parameter", f"this optimizer has no {key}; it has {has}")
    option, index = place
    return float(group[option] if index is None else group[option][index])


def _place(group: Mapping[str, Any], key: str) -> tuple[str, int | None] | None:
    """Where a hyperparameter lies in a group: option, and index if that is a tuple."""
    if key in (BETA1, BETA2) and "betas" in group:
        return "betas", (BETA1, BETA2).index(key)
    if key == BETA2:
        # RMSprop's smoothing; other classes have an "alpha" that means something else.
        return ("alpha", None) if "alpha" in group and "centered" in group else None
    return (key, None) if key in (WEIGHT_DECAY, MOMENTUM, CLIP_NORM) and key in group else None


def _read(group: Mapping[str, Any], lr: LRController, key: str) -> float:
    name = str(group["name"])
    if key == LR_SCALE:
        return lr.scale_of(name)
    return float(lr.is_frozen(name)) if key == FREEZE else read_option(group, key)


def _put(group: dict[str, Any], lr: LRController, change: Change, step: int, cause: Cause) -> None:
    if change.key == LR_SCALE:
        lr.set_scale(change.group, change.new, step, cause)
    elif change.key == FREEZE:
        lr.set_frozen(change.group, bool(change.new), step, cause)
    else:
        place = _place(group, change.key)
        assert place is not None, change  # noqa: S101 - planned with this very group
        option, index = place
        if index is None:
            group[option] = change.new
        else:
            group[option] = tuple(change.new if at == index else old for at, old in enumerate(group[option]))


def _check_names(values: Mapping[str, float]) -> None:
    unknown = sorted(values.keys() - set(HYPERPARAMETERS))
    if unknown:
        raise CommandRefused(
            "unknown_parameter", f"no hyperparameter {', '.join(unknown)}; there are {', '.join(HYPERPARAMETERS)}"
        )
    if not values:
        raise CommandRefused("bad_parameter", "the command names no hyperparameter")
    if UNDO in values and values != {UNDO: 1.0}:
        raise CommandRefused("bad_parameter", "undo is 1 and comes alone")
    if LR in values and LR_SCALE in values:
        raise CommandRefused("bad_parameter", "lr and lr_scale: one of them")
    if values.get(FREEZE, 1.0) not in (0.0, 1.0):
        raise CommandRefused("bad_parameter", f"freeze={values[FREEZE]:g}: expected 1, or 0 to thaw")
    wrong = sorted(name for name, value in values.items() if not math.isfinite(value))
    if wrong:
        raise CommandRefused("bad_parameter", f"{', '.join(wrong)}: expected a finite number")


def _check_conservative(changes: Iterable[Change]) -> None:
    for change in changes:
        if change.key == LR_SCALE and change.new > change.old:
            raise CommandRefused(
                "lr_increase_conservative",
                f"lr of {change.group!r} x{change.new / change.old:g}: no increase in conservative mode",
            )
        if change.key == FREEZE and change.new < change.old:
            raise CommandRefused("thaw_conservative", f"{change.group!r} stays frozen in conservative mode")
        if _enlarges_steps(change):
            raise CommandRefused(
                "faster_conservative",
                f"{change.key} of {change.group!r} {change.old:g} -> {change.new:g}: larger steps in conservative mode",
            )


def _enlarges_steps(change: Change) -> bool:
    """Whether steps may be larger by another option than the rate. A clip norm of 0 clips nothing.

    Of the betas by Adam's bias correction, m / (1 - beta1^t) over the root of v / (1 - beta2^t): with a larger beta1 or
    a smaller beta2 it takes averages that are nearly complete for ones that have just begun, and enlarges them again.
    """
    if change.key == CLIP_NORM:
        return change.old > 0 and (change.new == 0 or change.new > change.old)
    if change.key == BETA2:
        return change.new < change.old
    return change.key in (MOMENTUM, BETA1) and change.new > change.old
