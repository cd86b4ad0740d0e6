"""A strict reading of the protobuf wire format, done before the lenient parser sees a message.

The parser keeps unknown fields, lets the last of several values win, cuts integers to their width and nests up
to a hundred levels. Each of these would let two readers understand one signed message differently, so `check_wire`
refuses them. It reads the structure only; values are checked after parsing.
"""

from dataclasses import dataclass
from functools import cache
from typing import cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tolaria.errors import MessageRejected
from tolaria.leyline.limits import MAX_DEPTH, MAX_FIELDS, MAX_UINT32

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_VARINT_MOST = {
    FieldDescriptor.TYPE_BOOL: 1,
    FieldDescriptor.TYPE_ENUM: 2**31 - 1,
    FieldDescriptor.TYPE_UINT32: MAX_UINT32,
    FieldDescriptor.TYPE_INT32: 2**31 - 1,
    FieldDescriptor.TYPE_UINT64: 2**64 - 1,
    FieldDescriptor.TYPE_INT64: 2**63 - 1,
}
_FIXED = {FieldDescriptor.TYPE_FLOAT: _FIXED32, FieldDescriptor.TYPE_DOUBLE: _FIXED64}


@dataclass(frozen=True, slots=True)
class _Field:
    """What the wire may hold for one field. ``slot`` is the number that may occur once (a oneof's first)."""

    path: str
    wire_type: int
    most: int
    repeated: bool
    slot: int
    child: Descriptor | None
    is_map: bool


def check_wire(raw: bytes, kind: type[Message]) -> None:
    """Refuse bytes that are not one unambiguous message of type ``kind``.

    Raises MessageRejected: "parse" (not wire format, or a field of another type), "unknown_field", "duplicate" (a
    single value, oneof or map key set twice), "range" (an integer wider than its field), "depth", "count".
    """
    _Reader(raw).message(0, len(raw), cast(Descriptor, kind.DESCRIPTOR), depth=1)


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._fields_left = MAX_FIELDS

    def message(self, start: int, end: int, descriptor: Descriptor, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise MessageRejected("depth", f"messages nested deeper than {MAX_DEPTH}")
        known = _fields(descriptor)
        seen: set[int | tuple[int, bytes]] = set()
        at = start
        while at < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise MessageRejected("count", f"more than {MAX_FIELDS} fields in one message")
            tag, at = self._varint(at, end)
            found = known.get(tag >> 3)
            if found is None:
                raise MessageRejected("unknown_field", f"{descriptor.full_name} has no field {tag >> 3}")
            if tag & 7 != found.wire_type:
                raise MessageRejected("parse", f"{found.path}: wire type {tag & 7}, expected {found.wire_type}")
            begin, at = self._value(at, end, found)
            if found.child is not None:
                self.message(begin, at, found.child, depth + 1)
            if not found.repeated:
                _once(seen, found.slot, found)
            elif found.is_map:
                _once(seen, (found.slot, self._map_key(begin, at)), found)

    def _value(self, at: int, end: int, found: _Field) -> tuple[int, int]:
        """Start and end of the value's content."""
        if found.wire_type == _VARINT:
            value, after = self._varint(at, end)
            if value > found.most:
                raise MessageRejected("range", f"{found.path}={value}: at most {found.most} is accepted")
            return at, after
        if found.wire_type == _LENGTH:
            length, at = self._varint(at, end)
        else:
            length = 4 if found.wire_type == _FIXED32 else 8
        if length > end - at:
            raise MessageRejected("parse", f"{found.path}: {length} bytes announced, {end - at} there")
        return at, at + length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end:
            byte = self._raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 2**64:
                    break
                return value, at
            shift += 7
            if shift > 63:
                break
        raise MessageRejected("parse", "cut off or overlong integer")

    def _map_key(self, at: int, end: int) -> bytes:
        # The entry was checked already: field 1, if there, occurs once and is a string.
        while at < end:
            tag, at = self._varint(at, end)
            if tag == 1 << 3 | _LENGTH:
                length, at = self._varint(at, end)
                return self._raw[at : at + length]
            if tag & 7 == _LENGTH:
                length, at = self._varint(at, end)
                at += length
            elif tag & 7 == _VARINT:
                _, at = self._varint(at, end)
            else:
                at += 4 if tag & 7 == _FIXED32 else 8
        return b""


def _once(seen: set[int | tuple[int, bytes]], slot: int | tuple[int, bytes], found: _Field) -> None:
    if slot in seen:
        raise MessageRejected("duplicate", f"{found.path} is set twice, or two members of its oneof are")
    seen.add(slot)


@cache
def _fields(descriptor: Descriptor) -> dict[int, _Field]:
    return {f.number: _field(f) for f in descriptor.fields}


def _field(f: FieldDescriptor) -> _Field:
    child = f.message_type
    return _Field(
        path=f.full_name,
        wire_type=_VARINT if f.type in _VARINT_MOST else _FIXED.get(f.type, _LENGTH),
        most=_VARINT_MOST.get(f.type, 0),
        repeated=f.is_repeated,
        slot=f.containing_oneof.fields[0].number if f.containing_oneof else f.number,
        child=child,
        is_map=child is not None and child.GetOptions().map_entry,
    )
