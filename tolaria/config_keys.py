"""What each key of the configuration accepts, read off the dataclasses of `tolaria.config`.

Values are checked by pydantic, key by key, so that an error names the key, its value and what is accepted.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tolaria.config import Config
from tolaria.errors import ConfigError

_SHOWN_CHARACTERS = 60
_TYPE_NAMES: dict[Any, tuple[str, str]] = {
    # type -> (what --help shows in place of a value, what an error says is accepted)
    bool: ("true|false", "true or false"),
    int: ("INT", "a whole number"),
    float: ("NUMBER", "a finite number"),
    str: ("TEXT", "text"),
}


@dataclass(frozen=True)
class Key:
    """One key of the configuration; ``hint`` is the type that its dataclass declares."""

    section: str
    name: str
    hint: Any
    text: str
    default: Any

    @property
    def path(self) -> str:
        """``section.name``, as errors and flags write it."""
        return f"{self.section}.{self.name}"

    @property
    def is_mapping(self) -> bool:
        """True for a table with entries of the user's own, as task.args."""
        return get_origin(self.hint) is Mapping

    @property
    def metavar(self) -> str:
        """What ``--help`` shows in place of a value."""
        if self.is_mapping:
            return "VALUE"
        choices = get_args(self.hint)
        return "|".join(choices) if choices else _TYPE_NAMES[self.hint][0]

    @property
    def accepted(self) -> str:
        """What errors say is accepted; for a mapping: as the value of one entry."""
        if self.is_mapping:
            return "text" if self.holds_text else "true, false, a finite number or text"
        choices = get_args(self.hint)
        return f"one of {', '.join(choices)}" if choices else _TYPE_NAMES[self.hint][1]

    @property
    def holds_text(self) -> bool:
        """True for a mapping whose values are all text, as kasmina.slots."""
        return get_args(self.hint)[1:] == (str,)

    @property
    def help(self) -> str:
        """Help text with the default in brackets, escaped for argparse."""
        if self.is_mapping:
            shown = "none"
        elif isinstance(self.default, bool):
            shown = str(self.default).lower()
        else:
            shown = str(self.default) or "empty"
        return f"{self.text} [{shown}]".replace("%", "%%")

    def check(self, value: Any, *, from_text: bool) -> Any:
        """``value`` as this key's type. Text from a flag is converted; a TOML value must have the type already.

        Raises ConfigError that names key, value and what is accepted.
        """
        adapter: TypeAdapter[Any] = TypeAdapter(self.hint, config=ConfigDict(allow_inf_nan=False))
        try:
            if from_text and not self.is_mapping:
                return adapter.validate_strings(value)
            return adapter.validate_python(value, strict=True)
        except ValidationError as error:
            entry = error.errors()[0]["loc"][:1] if self.is_mapping else ()
            wrong, table = (value[entry[0]], "") if entry else (value, "a table of " if self.is_mapping else "")
            path = ".".join([self.path, *map(str, entry)])
            raise ConfigError(f"{path}={shown(wrong)}: expected {table}{self.accepted}") from error


@cache
def known_keys() -> dict[str, Key]:
    """Every key of the configuration by its path, in the order of `tolaria.config`."""
    found = {}
    for section, section_type in get_type_hints(Config).items():
        hints = get_type_hints(section_type)
        for item in fields(section_type):
            default = item.default_factory() if callable(item.default_factory) else item.default
            key = Key(section, item.name, hints[item.name], item.metadata["help"], default)
            found[key.path] = key
    return found


def shown(value: Any) -> str:
    """``value`` for an error message: one line, cut when long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def unknown_key(name: str, value: Any) -> ConfigError:
    """The error for a key that does not exist, with the closest ones that do."""
    keys = known_keys()
    if name in keys:
        return ConfigError(f"{name}={shown(value)}: expected an entry, --{name}.NAME VALUE")
    section, _, leaf = name.partition(".")
    siblings = [key.name for key in keys.values() if key.section == section]
    close = [path for path, key in keys.items() if key.name == (leaf or section).replace("-", "_")]
    if not close and siblings:
        close = [f"{section}.{sibling}" for sibling in difflib.get_close_matches(leaf, siblings, n=1)]
    elif not close:
        close = difflib.get_close_matches(name, keys, n=1)
    if close:
        accepted = f"did you mean {' or '.join(close)}?"
    elif siblings:
        accepted = f"[{section}] accepts {', '.join(siblings)}"
    else:
        accepted = f"the sections are {', '.join(get_type_hints(Config))}"
    return ConfigError(f"{name}={shown(value)}: no such key; {accepted}")
