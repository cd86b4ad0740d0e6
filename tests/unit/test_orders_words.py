"""Orders and outcomes on the wire: what is written is read, and nothing else is."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.errors import MessageRejected
from tolaria.leyline.limits import MAX_COMMAND_BYTES, MAX_ORDER_BYTES
from tolaria.orders.words import (
    ACTIONS,
    COMMAND,
    VERSION,
    Order,
    Outcome,
    decode_order,
    decode_outcome,
    encode_order,
    encode_outcome,
)

texts = st.text(max_size=128).filter(str.isprintable)
values = st.one_of(
    st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), texts
)  # fmt: skip


@st.composite
def orders(draw: st.DrawFn) -> Order:
    action = draw(st.sampled_from(sorted(ACTIONS)))
    return Order(
        action=action, operator=draw(texts), reason=draw(texts), dry_run=draw(st.booleans()),
        command=draw(st.binary(min_size=1, max_size=200)) if action == COMMAND else b"",
        arguments=draw(st.dictionaries(texts, values, max_size=16)),
    )  # fmt: skip


@given(orders())
def test_an_order_comes_back_as_it_was_given(order: Order) -> None:
    assert decode_order(encode_order(order)) == order


@given(
    st.sampled_from(["applied", "refused", "checked"]), st.integers(0, 2**31), st.text(max_size=300),
    st.dictionaries(st.text(max_size=9), values, max_size=5),
)  # fmt: skip
def test_an_outcome_comes_back_as_it_was_given(state: Any, number: int, reason: str, details: dict[str, Any]) -> None:
    outcome = Outcome(order_id="0" * 32, state=state, act=number, step=number, ranks=2, reason=reason, details=details)
    assert decode_outcome(encode_outcome(outcome)) == outcome


@given(st.binary(max_size=300))
def test_garbage_is_rejected_and_nothing_else_happens(raw: bytes) -> None:
    for decode in (decode_order, decode_outcome):
        with pytest.raises(MessageRejected):
            decode(raw)


@given(orders(), st.data())
def test_an_order_with_one_byte_changed_is_an_order_or_is_rejected(order: Order, data: st.DataObject) -> None:
    raw = bytearray(encode_order(order))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(MessageRejected):
        assert decode_order(bytes(raw)).action in ACTIONS


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)


@given(st.data())
def test_a_field_of_another_type_or_missing_is_rejected_or_read(data: st.DataObject) -> None:
    body = json.loads(encode_order(Order(action="pause")))
    key = data.draw(st.sampled_from(sorted(body)))
    if data.draw(st.booleans()):
        del body[key]
    else:
        body[key] = data.draw(json_values)
    with suppress(MessageRejected):
        assert decode_order(json.dumps(body).encode()).action in ACTIONS


def spoiled(**changes: Any) -> bytes:
    return json.dumps({**json.loads(encode_order(Order(action="emergency"))), **changes}).encode()


@pytest.mark.parametrize(("changes", "code"), [
    ({"version": VERSION + 1}, "version"), ({"version": True}, "version"), ({"version": None}, "version"),
    ({"action": "format_disk"}, "text"), ({"order_id": "A" * 32}, "text"), ({"order_id": "0" * 31}, "text"),
    ({"command": "00"}, "payload"), ({"command": "0"}, "type"), ({"command": "zz"}, "type"),
    ({"action": "command"}, "payload"), ({"action": "command", "command": "00" * (MAX_COMMAND_BYTES + 1)}, "size"),
    ({"reason": "a\x1b[2J"}, "text"), ({"operator": "\ud800"}, "text"), ({"reason": "x" * 129}, "text"),
    ({"arguments": {"level": [1]}}, "type"), ({"arguments": {"level": None}}, "type"), ({"arguments": []}, "type"),
    ({"arguments": {"level": float("nan")}}, "parse"), ({"arguments": {"level": float("inf")}}, "parse"),
    ({"arguments": {str(n): n for n in range(17)}}, "count"), ({"arguments": {"a\n": 1}}, "text"),
    ({"dry_run": 0}, "type"),
])  # fmt: skip
def test_what_no_order_says_is_rejected_with_its_code(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(MessageRejected) as error:
        decode_order(spoiled(**changes))
    assert error.value.code == code


def test_json_that_is_none_or_too_deep_is_rejected() -> None:
    for raw in (b"[]", b"1", b"", b"[" * 20_000, b'{"version":1' + b"0" * 5000 + b"}"):
        with pytest.raises(MessageRejected):
            decode_order(raw)


def test_what_would_be_refused_is_not_written() -> None:
    with pytest.raises(MessageRejected, match="expected one of"):
        encode_order(Order(action="dance"))
    with pytest.raises(MessageRejected, match="at most"):
        encode_outcome(Outcome(order_id="0" * 32, state="applied", reason="x" * MAX_ORDER_BYTES))
