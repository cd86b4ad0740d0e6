"""How large, how many and how wild a Leyline message may be, and the checks of single values against that.

Both directions use the same rules: what Tolaria would refuse to read it also refuses to write. Every check
raises MessageRejected with a stable code: "size", "count", "text", "range", "not_finite", "type", "version".
"""

import math
import re
import struct
from collections.abc import Mapping
from enum import IntEnum

from tolaria.errors import MessageRejected

MESSAGE_VERSION = 1

# A reply must fit a decision, and a decision the fixed frame that rank 0 broadcasts, so each bound is below the next.
MAX_COMMAND_BYTES = 8 * 1024
# Two texts of 128 characters, four bytes each, and room for the parts of Esper's message that Tolaria does not read.
MAX_SIGNAL_BYTES = 4 * 1024
MAX_ORDER_BYTES = 32 * 1024
MAX_REPLY_BYTES = 60 * 1024
MAX_DECISION_BYTES = 64_000
MAX_REQUEST_BYTES = 1024 * 1024
# Telemetry of a boundary of a thousand ranks, which tells each one's time.
MAX_TELEMETRY_BYTES = 1024 * 1024

MAX_DEPTH = 8
# More than any message within the counts below has; bounds what parsing a small message can make of it.
MAX_FIELDS = 65_536

MAX_COMMANDS = 64
MAX_SEEDS = 256
MAX_FIELD_REPORTS = 256
MAX_TRAINING_METRICS = 256
MAX_SEED_METRICS = 32
MAX_PARAMETERS = 32
MAX_ANNOTATIONS = 16
MAX_METRIC_POINTS = 8192
MAX_TELEMETRY_EVENTS = 64
MAX_SPANS = 64
MAX_ATTRIBUTES = 64

MAX_STRING_CHARS = 128
# Reasons and errors are told in full sentences.
MAX_TELEMETRY_CHARS = 1024
MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1
MAX_TIME_NS = 2**63 - 1
# Measurements may be far off when training goes wrong; a command that asks for such values is a mistake. Both bounds
# are 32-bit floats, as the wire's numbers are: a value at the bound must not come out beyond it on the other side.
MAX_MEASUREMENT = 1.0000000150474662e30
MAX_COMMAND_VALUE = 1e9

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@+-]{0,127}")
_PATTERN = re.compile(r"[A-Za-z0-9_.:/@+*?\[\]!-]{1,128}")


def is_name(value: str) -> bool:
    """Whether ``value`` can be an id on the wire: 1 to 128 of ``A-Za-z0-9_.:/@+-``, not starting with ``.:/@+-``."""
    return _NAME.fullmatch(value) is not None


def clip_text(text: str, *, most: int = MAX_STRING_CHARS) -> str:
    """``text`` made fit for a text field: unprintable characters become spaces, longer text ends in '...'."""
    printable = text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
    return printable if len(printable) <= most else printable[: most - 3] + "..."


def clip_measurement(value: float) -> float:
    """``value`` made fit to be sent as a measurement; NaN, which the wire does not carry, becomes the largest one."""
    return MAX_MEASUREMENT if math.isnan(value) else max(-MAX_MEASUREMENT, min(MAX_MEASUREMENT, value))


def as_written(value: float) -> float:
    """The number that somebody wrote and the wire made a 32-bit float of: its shortest decimal, 0.1 for 0.100000001.

    Raises OverflowError for what no 32-bit float can hold.
    """
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", short))[0] == value:
            return short
    return value


def check_name(where: str, value: str, *, optional: bool = False) -> None:
    """Refuse anything but an id; the empty string only if ``optional``."""
    _check_type(where, value, str)
    if not (value == "" and optional) and _NAME.fullmatch(value) is None:
        raise MessageRejected("text", f"{where}={_shown(value)}: expected 1 to 128 letters, digits or _.:/@+-")


def check_pattern(where: str, value: str) -> None:
    """Refuse anything but an id or a shell pattern of ids."""
    _check_type(where, value, str)
    if _PATTERN.fullmatch(value) is None:
        raise MessageRejected("text", f"{where}={_shown(value)}: expected a name or a shell pattern of at most 128")


def check_text(where: str, value: str, *, most: int = MAX_STRING_CHARS) -> None:
    """Refuse text for people that is longer than ``most`` or could steer a terminal."""
    _check_type(where, value, str)
    if len(value) > most or not value.isprintable():
        raise MessageRejected("text", f"{where}={_shown(value)}: expected at most {most} printable characters")


def check_number(where: str, value: object, bound: float) -> None:
    """Refuse NaN, infinities and magnitudes above ``bound``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise MessageRejected("type", f"{where}: expected a number, not {type(value).__name__}")
    if not -bound <= value <= bound:
        code = "range" if isinstance(value, int) or math.isfinite(value) else "not_finite"
        raise MessageRejected(code, f"{where}={_shown_number(value)}: expected a finite number up to +-{bound:g}")


def check_integer(where: str, value: object, most: int) -> None:
    """Refuse anything but an integer from 0 to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise MessageRejected("type", f"{where}: expected an integer, not {type(value).__name__}")
    if not 0 <= value <= most:
        raise MessageRejected("range", f"{where}={_shown_number(value)}: expected 0 to {most}")


def check_enum(where: str, value: object, kind: type[IntEnum]) -> None:
    """Refuse anything but a member of ``kind``; a bare number is none."""
    _check_type(where, value, kind)


def check_mapping(where: str, values: object) -> None:
    """Refuse anything but a mapping."""
    _check_type(where, values, Mapping)


def check_numbers(where: str, values: Mapping[str, float], *, most: int, bound: float) -> None:
    """Check a map of named numbers: at most ``most`` entries, names as keys, magnitudes up to ``bound``."""
    check_mapping(where, values)
    check_count(where, len(values), most)
    for key, value in values.items():
        check_name(f"key of {where}", key)
        check_number(f"{where}[{key}]", value, bound)


def check_count(where: str, count: int, most: int) -> None:
    """Refuse a collection with more than ``most`` elements."""
    if count > most:
        raise MessageRejected("count", f"{where}: {count} elements, at most {most} are accepted")


def check_size(where: str, raw: bytes, most: int) -> None:
    """Refuse a message of more than ``most`` bytes."""
    if len(raw) > most:
        raise MessageRejected("size", f"{where}: {len(raw)} bytes, at most {most} are accepted")


def check_version(where: str, version: int) -> None:
    """Refuse a message of another major version."""
    if version != MESSAGE_VERSION:
        raise MessageRejected("version", f"{where}: message version {version}, only {MESSAGE_VERSION} is understood")


def _check_type(where: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise MessageRejected("type", f"{where}: expected {expected.__name__}, not {type(value).__name__}")


def _shown(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:40] + "...")


def _shown_number(value: int | float) -> str:
    # Python refuses to print integers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return str(value)
