"""The rehearsal: two arms from the present state over the same data, then back to it, all ranks together.

    keep      a copy of the whole state in host memory                          tolaria/rehearsal/kept.py
    control   N steps as they would come, then validation        -> back
    changed   the change, the same N steps, validation           -> back
    compare   step by step, sample by sample                                    tolaria/rehearsal/effect.py

An arm has no boundary, policy, checkpoint or snapshot, and its events are marked. Where an epoch ends in it, the next
one begins, as in training. What would make the run go back ends the arm and is told; it does not reach the run.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor

from tolaria.alarm import ELEVATED
from tolaria.coordinator.decision import OPERATOR
from tolaria.coordinator.plan import Plan, make_plan
from tolaria.errors import CommandRefused, ConfigError
from tolaria.leyline.codec import encode_command
from tolaria.leyline.types import Decision
from tolaria.leyline.words import describe
from tolaria.measure import standard_error
from tolaria.parts import Parts
from tolaria.recovery.autopilot import SpikeWatch, StepFact
from tolaria.recovery.page import Phase
from tolaria.rehearsal.change import parse_change
from tolaria.rehearsal.effect import Arm, Effect, compared, mean
from tolaria.rehearsal.kept import Kept
from tolaria.tamiyo.policy import with_identity

MAX_STEPS = 100_000


class Interrupted(Exception):
    """The run is needed: somebody wants it to stop, or an emergency was raised. The state is put back already."""


class Rehearsal:
    """Tries changes on a run between two of its steps. Every method is collective, and all ranks call it alike.

    ``needed``: why this rank wants the run back at once, "" as long as it does not; asked at every step.
    """

    def __init__(self, parts: Parts, needed: Callable[[], str] = lambda: "") -> None:
        self.parts = parts
        self.state = parts.state
        self._needed = needed

    def run(self, change: str, steps: int, name: str) -> Effect:
        """What ``change`` (see `parse_change`) does within ``steps`` steps; afterwards the state is as it was.

        ``name``: for the ids of its commands. Blocks for twice the steps and validations. Raises on all ranks alike:
        CommandRefused, with nothing done, for what a command would be refused for, a wrong change or number of steps,
        and where there is no memory for a copy; Interrupted, with the state put back. Raises PeerLost, CheckpointError
        (see `Kept.put_back`), and what training raises.
        """
        plan = self._plan(change, steps, name)
        at_step, kept = self.state.step, self._keep()
        with self.parts.events.marked(rehearsal=name):
            control, losses = self._arm(kept, steps, None)
            changed, others = self._arm(kept, steps, plan)
        both = min(len(control.losses), len(changed.losses))
        train_steps, train_difference, train_error = compared(control.losses, changed.losses)
        found = Effect(
            what="; ".join(describe(command) for command in plan.accepted), at_step=at_step, steps=both,
            control=control, changed=changed, train_steps=train_steps, train_difference=train_difference,
            train_error=train_error, digest=kept.digest,
        )  # fmt: skip
        return found if losses is None or others is None else self._validated(found, losses, others)

    # Before it

    def _plan(self, change: str, steps: int, name: str) -> Plan:
        config, state = self.parts.config, self.state
        if not 1 <= steps <= MAX_STEPS:
            raise CommandRefused("bad_steps", f"{steps} steps: expected 1 to {MAX_STEPS:,}")
        if self._over():
            raise CommandRefused("at_the_end", "the run is at its end; there are no steps to rehearse")
        try:
            commands = [
                with_identity(command, f"{name}-{at}", issued_by=OPERATOR, issued_at_ns=1)
                for at, command in enumerate(parse_change(change))
            ]
        except ConfigError as error:
            raise CommandRefused("bad_change", str(error)) from error
        decision = Decision(
            boundary=state.boundary, step_effective=state.step, source=OPERATOR, reason=OPERATOR,
            conservative=state.mode.conservative, commands=tuple(map(encode_command, commands)),
        )  # fmt: skip
        plan = make_plan(decision, state, config.tamiyo.healthy_boundaries)
        if len(set(self.parts.world.peers.gather_digests(plan.digest()))) > 1:
            raise CommandRefused("vote", "the ranks do not plan the same change")
        if plan.refused:
            raise CommandRefused(plan.refused[0].code, plan.refused[0].reason)
        return plan

    def _keep(self) -> Kept:
        parts, kept = self.parts, None
        parts.step.replica.synchronise_buffers()
        reason = "another rank has no room for a copy of its state"
        try:
            kept = Kept(self.state, parts.step.replica, parts.world)
        except (MemoryError, RuntimeError) as error:
            reason = f"no room for a copy of the state: {error}"
        if not parts.world.peers.agree(kept is not None) or kept is None:
            raise CommandRefused("no_room", reason)
        return kept

    # One arm

    def _arm(self, kept: Kept, steps: int, plan: Plan | None) -> tuple[Arm, "_Validated | None"]:
        """Train, validate, put back. The losses of this rank's validation samples; None for an arm that failed."""
        started, state = perf_counter(), self.state
        for tuning in plan.tunings if plan is not None else ():
            state.tuner.commit(tuning, state.optimizer, state.lr, state.step)
        validated = None
        try:
            arm = self._train(steps)
        except Interrupted:
            kept.put_back()
            raise
        if not arm.ended:
            kept.put_back_streams()
            self.parts.alarm.page.enter(Phase.BOUNDARY, state.step)
            validated = self.parts.evaluator.losses()
        kept.put_back()
        return replace(arm, seconds=perf_counter() - started), validated

    def _train(self, steps: int) -> Arm:
        parts, state = self.parts, self.state
        watch = SpikeWatch(parts.config.recovery)
        watch.load_state_dict(parts.guard.state_dict()["watch"])
        sampler, losses = state.sampler, list[float]()
        while len(losses) < steps and not self._over():
            batches = parts.loader.batches(parts.task.train, sampler.remaining(), seed=sampler.loader_seed)
            while len(losses) < steps and (window := sampler.window) is not None:
                parts.alarm.page.enter(Phase.STEP, state.step)
                result = parts.step(list(islice(batches, sampler.accumulation)), lambda: None)
                epoch_ended = state.after_step(taken=result.taken)
                loss = self._together(result.loss)
                losses.append(loss)
                scaler = state.scaler
                searching = not result.taken and scaler.is_enabled() and scaler.get_scale() > 1.0
                incident = watch.add(StepFact(state.step, window, result.taken or searching, loss))
                if incident is not None:
                    return Arm(losses=losses, ended=incident.reason)
                if epoch_ended or self._over():
                    break
        return Arm(losses=losses)

    def _together(self, loss: float) -> float:
        """The step's loss over all ranks. Raises Interrupted on all of them when the run is needed on any."""
        # Whole numbers are what ranks gather; the bits of a float are one.
        bits = struct.unpack("<q", struct.pack("<d", loss))[0]
        reason = self._reason()
        rows = self.parts.world.peers.gather([bits, int(bool(reason))])
        if any(row[1] for row in rows):
            raise Interrupted(reason or "another rank wants the run back")
        return mean([float(struct.unpack("<d", struct.pack("<q", row[0]))[0]) for row in rows])

    def _reason(self) -> str:
        stop = self.parts.stop.signal_name
        if stop is not None:
            return f"{stop}: the run is to stop"
        level = self.parts.alarm.level()
        return f"an emergency of level {level}" if level >= ELEVATED else self._needed()

    def _over(self) -> bool:
        config, state = self.parts.config.train, self.state
        return state.sampler.epoch >= config.epochs or 0 < config.max_steps <= state.step

    # What it says

    def _validated(self, effect: Effect, control: "_Validated", changed: "_Validated") -> Effect:
        size = self.parts.evaluator.size
        (a, hits_a), (b, hits_b) = control, changed
        difference = b - a
        sums = torch.stack([
            a.sum(), a.square().sum(), b.sum(), b.square().sum(), difference.sum(), difference.square().sum(),
            hits_a, hits_b,
        ]).cpu()  # fmt: skip
        total = self.parts.world.peers.sum(sums).tolist()

        def arm(which: Arm, at: int, hits: float) -> Arm:
            noise = standard_error(total[at], total[at + 1], size)
            return replace(which, val_loss=total[at] / size, val_noise=noise, accuracy=hits / size)

        error = standard_error(total[4], total[5], size)
        return replace(
            effect, control=arm(effect.control, 0, total[6]), changed=arm(effect.changed, 2, total[7]),
            val_difference=total[4] / size, val_error=error if math.isfinite(error) else None,
        )  # fmt: skip


_Validated = tuple[Tensor, Tensor]
"""Losses of this rank's validation samples, (n,), and the sum of their accuracies, 0-D; both float64."""
