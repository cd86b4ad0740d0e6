"""An operator's order and what became of it: JSON in signed frames. Pure.

An order carries either a Leyline command, the same that a policy sends, or one of Tolaria's own words. Decoding trusts
nothing; every fault is a MessageRejected with a stable code.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from tolaria.errors import MessageRejected
from tolaria.leyline.limits import MAX_COMMAND_BYTES, MAX_ORDER_BYTES, check_text

VERSION = 1
COMMAND, UNDO, PAUSE, RESUME, CHECKPOINT, STOP, EMERGENCY, TRY, HELLO = (
    "command", "undo", "pause", "resume", "checkpoint", "stop", "emergency", "try", "hello",
)  # fmt: skip
ACTIONS = frozenset({COMMAND, UNDO, PAUSE, RESUME, CHECKPOINT, STOP, EMERGENCY, TRY, HELLO})
"""hello asks whether the run is there and where it is; it changes nothing and needs no rank but the first."""

State: TypeAlias = Literal["applied", "refused", "checked"]
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_MAX_ARGUMENTS = 16


@dataclass(frozen=True, kw_only=True)
class Order:
    """What an operator asks for.

    order_id: 32 hex digits; an id is carried out once in the life of a run. command: a serialized AdaptationCommand,
    for the action "command" only. arguments: plain values, by action: undo has "weights", emergency "level",
    try "change" and "steps".
    dry_run: the ranks check it, and nothing happens.
    """

    action: str
    order_id: str = field(default_factory=lambda: secrets.token_hex(16))
    command: bytes = b""
    operator: str = ""
    reason: str = ""
    arguments: Mapping[str, float | int | bool | str] = field(default_factory=dict)
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an order on all ranks.

    state: applied; refused, with a stable ``code`` and the ``reason`` in words; checked, of a dry run that would have
    been applied. act: the number under which it is in the log, 0 if it is not. step: after which all ranks did it.
    digest: of what it led to, equal on all ``ranks``, in hex. details: what else there is to say, by action.
    """

    order_id: str
    state: State
    act: int = 0
    step: int = 0
    ranks: int = 0
    code: str = ""
    reason: str = ""
    digest: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def encode_order(order: Order) -> bytes:
    """The payload of an ORDER frame. Raises MessageRejected for what the run would refuse to read."""
    _check(order)
    return _encode({**asdict(order), "command": order.command.hex(), "version": VERSION})


def decode_order(raw: bytes) -> Order:
    """The order of a verified frame; whether it can be carried out is for the run to say."""
    body = _decode(raw)
    try:
        order = Order(
            action=_typed(body, "action", str), order_id=_typed(body, "order_id", str),
            command=bytes.fromhex(_typed(body, "command", str)), operator=_typed(body, "operator", str),
            reason=_typed(body, "reason", str), arguments=_typed(body, "arguments", dict),
            dry_run=_typed(body, "dry_run", bool),
        )  # fmt: skip
    except ValueError as error:  # of bytes.fromhex
        raise MessageRejected("type", f"order.command: {error}") from error
    _check(order)
    return order


def encode_outcome(outcome: Outcome) -> bytes:
    """The payload of an OUTCOME frame."""
    return _encode({**asdict(outcome), "version": VERSION})


def decode_outcome(raw: bytes) -> Outcome:
    """The outcome of a verified frame."""
    body = _decode(raw)
    state = _typed(body, "state", str)
    if state not in ("applied", "refused", "checked"):
        raise MessageRejected("text", f"outcome.state={state!r:.40}: not a known one")
    return Outcome(
        order_id=_typed(body, "order_id", str), state=state, act=_typed(body, "act", int),
        step=_typed(body, "step", int), ranks=_typed(body, "ranks", int), code=_typed(body, "code", str),
        reason=_typed(body, "reason", str), digest=_typed(body, "digest", str), details=_typed(body, "details", dict),
    )  # fmt: skip


def _check(order: Order) -> None:
    if order.action not in ACTIONS:
        raise MessageRejected(
            "text", f"order.action={order.action!r:.40}: expected one of {', '.join(sorted(ACTIONS))}"
        )
    if not _ID.fullmatch(order.order_id):
        raise MessageRejected("text", "order.order_id: expected 32 hex digits")
    if bool(order.command) != (order.action == COMMAND):
        raise MessageRejected(
            "payload", f"an order to {order.action} {'with' if order.command else 'without'} a command"
        )
    if len(order.command) > MAX_COMMAND_BYTES:
        raise MessageRejected("size", f"order.command of {len(order.command)} bytes, at most {MAX_COMMAND_BYTES}")
    check_text("order.operator", order.operator)
    check_text("order.reason", order.reason)
    if len(order.arguments) > _MAX_ARGUMENTS:
        raise MessageRejected("count", f"order.arguments: {len(order.arguments)}, at most {_MAX_ARGUMENTS}")
    for name, value in order.arguments.items():
        check_text("order.arguments", name)
        if not isinstance(value, (bool, int, float, str)):
            raise MessageRejected("type", f"order.arguments[{name!r:.40}]: expected a plain value")
        if isinstance(value, str):
            check_text(f"order.arguments[{name}]", value)


def _typed(body: Mapping[str, Any], key: str, kind: type) -> Any:
    value = body.get(key)
    if type(value) is not kind:
        raise MessageRejected("type", f"{key}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _encode(body: Mapping[str, Any]) -> bytes:
    raw = json.dumps(body, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    if len(raw) > MAX_ORDER_BYTES:
        raise MessageRejected("size", f"{len(raw)} bytes, at most {MAX_ORDER_BYTES}")
    return raw


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MessageRejected("parse", f"not JSON ({type(error).__name__})") from error
    if not isinstance(body, dict):
        raise MessageRejected("parse", "expected a JSON object")
    if type(body.get("version")) is not int or body["version"] != VERSION:
        raise MessageRejected("version", f"version {body.get('version')!r:.20}, only {VERSION} is understood")
    return body
