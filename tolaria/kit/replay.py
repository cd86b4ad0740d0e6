"""`tolaria policy replay`: the recorded questions of a run put to another policy, and how far the two agree.

The states are those of the run as it went. From the first boundary on at which the two differ, the other policy would
have led the run elsewhere, and its later answers are those to states that it would not have seen.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tolaria.errors import PolicyUnavailable, RunDirError
from tolaria.kit.subject import Subject, started
from tolaria.leyline.framing import KeyRing
from tolaria.leyline.words import agree, in_words
from tolaria.view.frames import Exchange, read_exchanges


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One recorded boundary. ``commanded``: None when the run's policy did not answer; ``would``: None, with
    ``failure``, when the other one did not. ``agrees``: None where there is nothing to compare."""

    boundary: int
    step: int
    commanded: list[str] | None
    would: list[str] | None
    agrees: bool | None
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The whole. ``first_difference``: a boundary, None if there was none."""

    boundaries: int
    compared: int
    agreed: int
    commanded: int
    would_command: int
    failures: int
    first_difference: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def replay(
    run: Path, keys: KeyRing | None, spec: str, args: Mapping[str, Any], *, deadline_ms: float
) -> Iterator[Compared]:
    """Each recorded boundary in order, put to the policy ``spec`` in a process of its own.

    A restart of the run makes a new instance of the policy, as it did then. Ends after a boundary without an answer.
    Raises RunDirError where nothing was recorded, ConfigError for a policy that cannot be loaded.
    """
    recorded = read_exchanges(run, keys)
    first = next(recorded, None)
    if first is None:
        raise RunDirError(f"{run}: holds no record of its policy (tamiyo.record, policy_frames.bin)")
    with started(spec, args, deadline_ms=deadline_ms, probed=False) as subject:
        for exchange in (first, *recorded):
            compared = _compare(exchange, subject)
            yield compared
            if compared.failure:
                return


def summarise(found: Iterable[Compared]) -> Agreement:
    """Count. Pure."""
    rows = list(found)
    return Agreement(
        boundaries=len(rows),
        compared=sum(row.agrees is not None for row in rows),
        agreed=sum(row.agrees is True for row in rows),
        commanded=sum(bool(row.commanded) for row in rows),
        would_command=sum(bool(row.would) for row in rows),
        failures=sum(bool(row.failure) for row in rows),
        first_difference=next((row.boundary for row in rows if row.agrees is False), None),
    )


def _compare(exchange: Exchange, subject: Subject) -> Compared:
    answered = exchange.answer
    commanded = None if answered is None else [*map(in_words, answered.commands)]
    step = exchange.request.state.global_step
    try:
        answer = subject.ask(
            f"start-{exchange.question.header.generation}", exchange.boundary, exchange.question.payload
        )
    except PolicyUnavailable as error:
        return Compared(
            boundary=exchange.boundary, step=step, commanded=commanded, would=None, agrees=None, failure=str(error)
        )
    version = answer.reply.policy_version
    return Compared(
        boundary=exchange.boundary, step=step, commanded=commanded, would=[*map(in_words, answer.reply.commands)],
        agrees=None if answered is None else agree(answered.commands, answer.reply.commands),
        failure=f"the policy raised {version.removeprefix('error:')}" if version.startswith("error:") else "",
    )  # fmt: skip
