"""What is to be tried, as a person types it, and the commands that it comes to. Pure.

lr*=0.5                     a factor on the rates of all groups
lr=1e-3                     the rates themselves
host.lr*=0.5                of the group "host"; any shell pattern of group names stands before the last point
seed/late.lr*=2
weight_decay=0.05, momentum=0.9                several at once, with commas between
"""

import re

from tolaria.errors import ConfigError
from tolaria.leyline.limits import MAX_STRING_CHARS
from tolaria.leyline.types import HYPERPARAMETERS, LR, LR_SCALE, UNDO, Command
from tolaria.tamiyo import policy as do

SETTINGS = tuple(name for name in HYPERPARAMETERS if name not in (UNDO, LR_SCALE))
_PART = re.compile(r"(?:(?P<group>[^=]+)\.)?(?P<key>[a-z_0-9]+)\s*(?P<op>\*?=)\s*(?P<value>[^=\s]+)", re.ASCII)
_FORM = "expected such as lr*=0.5, host.lr=1e-3 or weight_decay=0.05"


def parse_change(text: str) -> list[Command]:
    """One command for each group that is named, in the order of the text; none has an id yet.

    Raises ConfigError that names what cannot be read and what is accepted.
    """
    if len(text) > MAX_STRING_CHARS or not text.isprintable():
        raise ConfigError(f"the change has {len(text)} characters: expected at most {MAX_STRING_CHARS} printable ones")
    groups: dict[str, dict[str, float]] = {}
    for part in text.split(","):
        group, key, value = _read(part.strip())
        wanted = groups.setdefault(group, {})
        if key in wanted:
            raise ConfigError(f"{part.strip()!r}: {key} of {group!r} is changed twice")
        wanted[key] = value
    return [do.set_optimizer(group, reason="", **wanted) for group, wanted in groups.items()]


def _read(part: str) -> tuple[str, str, float]:
    match = _PART.fullmatch(part)
    if match is None:
        raise ConfigError(f"{part!r}: cannot be read as a change; {_FORM}")
    key = match["key"]
    if key not in SETTINGS:
        raise ConfigError(f"{part!r}: no setting {key!r}; there are {', '.join(SETTINGS)}")
    if match["op"] == "*=" and key != LR:
        raise ConfigError(f"{part!r}: only lr takes *=; give {key} its new value, such as {key}=0.1")
    try:
        value = float(match["value"])
    except ValueError as error:
        raise ConfigError(f"{part!r}: {match['value']!r} is no number; {_FORM}") from error
    return match["group"] or "*", LR_SCALE if match["op"] == "*=" else key, value
