"""The policy under test, inside its own process: every call is noted before it is made and after it has returned.

{"version": ..., "is_text": ...}                           once for each instance
{"enter": "decide" | "emergency"}  then  {"left": ..., "ms": ..., "error": ..., "where": ..., "bad": [...]}
"""

import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tolaria.errors import MessageRejected
from tolaria.leyline.codec import encode_command, encode_signal
from tolaria.leyline.types import Command, EmergencySignal, FieldReport, SystemState
from tolaria.tamiyo.policies import load_raw
from tolaria.tamiyo.policy import Policy, with_identity

_PACKAGE = Path(__file__).resolve().parents[1]


class Probed(Policy):
    """Passes every call on to the policy ``spec``; ``args``: its keyword arguments as JSON; ``notes``: the file."""

    def __init__(self, *, spec: str, args: str, notes: str) -> None:
        self._notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._policy, version = load_raw(spec, json.loads(args))
        self.version = self._policy.version
        self._note(version=str(version), is_text=isinstance(version, str))

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        """As the policy does."""
        start = self._enter("decide")
        try:
            commands = self._policy.decide(state, reports)
            bad = [fault for number, command in enumerate(commands) if (fault := _unsendable(command, number))]
        except Exception as error:
            self._left("decide", start, error=f"{type(error).__name__}: {error}", where=_where(error))
            raise
        self._left("decide", start, bad=bad)
        return commands

    def emergency(self) -> EmergencySignal | None:
        """As the policy does."""
        start = self._enter("emergency")
        try:
            signal = self._policy.emergency()
            if signal is not None:
                encode_signal(signal)
        except Exception as error:
            self._left("emergency", start, error=f"{type(error).__name__}: {error}", where=_where(error))
            raise
        self._left("emergency", start)
        return signal

    def _enter(self, call: str) -> float:
        self._note(enter=call)
        return time.monotonic()

    def _left(self, call: str, start: float, **found: Any) -> None:
        self._note(left=call, ms=(time.monotonic() - start) * 1000, **found)

    def _note(self, **fields: Any) -> None:
        os.write(self._notes, json.dumps(fields).encode() + b"\n")


def _unsendable(command: Any, number: int) -> str:
    """Why a command cannot be sent; empty if it can."""
    if not isinstance(command, Command):
        return f"{type(command).__name__} {command!r:.60} is no Command"
    try:
        encode_command(with_identity(command, f"probe-{number}", issued_by="probe", issued_at_ns=1))
    except MessageRejected as error:
        return str(error)
    return ""


def _where(error: BaseException) -> str:
    """File and line of the policy's own code in which an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if os.path.isfile(frame.filename) and _PACKAGE not in Path(frame.filename).parents]
    frame = (own or frames)[-1]
    return f"{os.path.basename(frame.filename)}:{frame.lineno}"
