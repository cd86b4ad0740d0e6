"""The command line: a TOML file and typed flags become one `Config`, or one line that says what is wrong.

Every key of `tolaria.config` is a flag, ``--section.key VALUE``. Later sources win: defaults, then ``--config FILE``,
then flags. Nothing here imports torch, so a wrong flag is answered at once.
"""

import argparse
import json
import os
import string
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from tolaria.config import Config
from tolaria.config_fields import Scalar
from tolaria.config_keys import Key, known_keys, shown, unknown_key
from tolaria.errors import ConfigError

_BARE_KEY = frozenset(string.ascii_letters + string.digits + "_-")
_INTRODUCTION = """\
Trains a PyTorch model and lets a policy steer it, and grow it, while it trains.

Every key below can be set in a TOML file as well: "lr = 0.01" under [optim] is
the same as --optim.lr 0.01. A flag wins over the file, the file over the
default, which stands in brackets at the end of each line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _parser(mapping_flags: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m tolaria.launch", usage="%(prog)s [--config FILE] [--section.key VALUE ...]",
        description=_INTRODUCTION, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=6),
        conflict_handler="resolve",  # an entry may be called NAME, as the help text calls it
    )  # fmt: skip
    switch: dict[str, Any] = {"nargs": "?", "const": "true"}
    common = parser.add_argument_group("common")
    common.add_argument("-h", "--help", action="help", help="show this text and end")
    common.add_argument("--config", dest="config", metavar="FILE", help="TOML file with any of the keys below")
    common.add_argument("--task", dest="task.factory", metavar="MOD:FUNC", help="your task; same as --task.factory")
    common.add_argument("--resume", dest="run.resume", metavar="auto|PATH", help="same as --run.resume")
    debug = "same as --train.debug; turns compile.enabled off"
    common.add_argument("--debug", dest="train.debug", metavar="true|false", help=debug, **switch)
    traced = "same as --profile.enabled; see [profile] for which steps of which ranks"
    common.add_argument("--profile", dest="profile.enabled", metavar="true|false", help=traced, **switch)
    detail = common.add_mutually_exclusive_group()
    for name, text in (("quiet", "only start, problems and end"), ("verbose", "times and ranks at every boundary too")):
        detail.add_argument(f"--{name}", dest="log.detail", action="store_const", const=name,
                            help=f"{text}; same as --log.detail {name}")  # fmt: skip
    groups = {section: parser.add_argument_group(section) for section in get_type_hints(Config)}
    for path, key in known_keys().items():
        flag = f"--{path}.NAME" if key.is_mapping else f"--{path}"
        extra = switch if key.hint is bool else {}
        groups[key.section].add_argument(flag, dest=path, metavar=key.metavar, help=key.help, **extra)
    for name in mapping_flags:
        parser.add_argument(f"--{name}", dest=name, help=argparse.SUPPRESS)
    return parser


def _mapping_of(name: str) -> tuple[Key, str] | None:
    """The mapping that the flag ``name`` reaches into and the entry it names, or None."""
    for path, key in known_keys().items():
        if key.is_mapping and name.startswith(f"{path}.") and name != f"{path}.":
            return key, name.removeprefix(f"{path}.")
    return None


def _read_flags(argv: Sequence[str]) -> dict[str, str]:
    """Flag name (without dashes) -> its text, as given. Raises ConfigError on anything that is not a known flag."""
    for token in argv:
        if not token.isascii() and any(0xD800 <= ord(character) <= 0xDFFF for character in token):
            raise ConfigError(f"{token!a}: expected text in UTF-8")
    names = dict.fromkeys(token[2:].partition("=")[0] for token in argv if token.startswith("--"))
    known, unknown = _parser([name for name in names if _mapping_of(name)]).parse_known_args(argv)
    if unknown:
        name, equals, value = unknown[0].partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"{unknown[0]!r}: expected flags only, --section.key VALUE; see --help")
        if not equals and len(unknown) > 1 and not unknown[1].startswith("--"):
            value = unknown[1]
        raise unknown_key(name[2:], value)
    return dict(vars(known))


def _scalar(text: str) -> Scalar:
    """Text as a TOML boolean, integer or float if it is one, else as it is. ``"4"`` in quotes stays text."""
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    only = value["value"]
    return only if len(value) == 1 and isinstance(only, bool | int | float | str) else text


def _flag_values(flags: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in flags.items():
        reached = _mapping_of(name)
        if reached is None:
            values[name] = known_keys()[name].check(text, from_text=True)
            continue
        key, entry = reached
        value = text if key.holds_text else _scalar(text)
        values.setdefault(key.path, {})[entry] = value
        key.check(values[key.path], from_text=True)
    return values


def _file_values(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config={str(path)!r}: cannot read it ({error.strerror}); expected a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={str(path)!r}: not valid TOML ({error})") from error
    try:
        return dict(_table_values(tables))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _table_values(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    sections = get_type_hints(Config)
    for section, table in tables.items():
        if section not in sections:
            raise unknown_key(section, table)
        if not isinstance(table, dict):
            raise ConfigError(f"{section}={shown(table)}: expected a table, [{section}]")
        for name, value in table.items():
            path = f"{section}.{name}"
            if path not in known_keys():
                raise unknown_key(path, value)
            yield path, known_keys()[path].check(value, from_text=False)


def _build(values: Mapping[str, Any]) -> Config:
    by_section: dict[str, dict[str, Any]] = {section: {} for section in get_type_hints(Config)}
    for path, value in values.items():
        section, _, name = path.partition(".")
        by_section[section][name] = value
    try:
        return Config(**{name: get_type_hints(Config)[name](**given) for name, given in by_section.items()})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _apply_debug(values: dict[str, Any], flags: Mapping[str, Any], world_size: str) -> None:
    if not values.get("train.debug"):
        return
    # --debug is there to switch off what a file says; asked for in one breath, the two contradict each other.
    if (flags if "train.debug" in flags else values).get("compile.enabled"):
        raise ConfigError("compile.enabled=True: expected false together with train.debug, which runs eager")
    if world_size.isdigit() and int(world_size) > 1:
        raise ConfigError(f"train.debug=True: expected one process, but torchrun started WORLD_SIZE={world_size}")
    values["compile.enabled"] = False


def resolve(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration that defaults, ``--config FILE`` and the flags in ``argv`` give, in this order.

    ``train.debug`` turns ``compile.enabled`` off, and is refused when ``environment`` has a WORLD_SIZE above 1.
    Raises ConfigError whose text is one line with the key, the value and what is accepted. ``--help`` prints and
    raises SystemExit(0). Local; reads at most the one file.
    """
    flags = _read_flags(argv)
    file = flags.pop("config", None)
    values = _file_values(Path(file)) if file is not None else {}
    from_flags = _flag_values(flags)
    for path, value in from_flags.items():
        values[path] = {**values.get(path, {}), **value} if known_keys()[path].is_mapping else value
    _apply_debug(values, from_flags, environment.get("WORLD_SIZE", "1"))
    return _build(values)


def parse(argv: Sequence[str] | None = None) -> Config:
    """`resolve` for a program: what is wrong goes to stderr as one line, and the process exits 2.

    ``argv`` is without the program's name; None takes it from `sys.argv`.
    """
    try:
        return resolve(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"tolaria: {line}\n")
        raise SystemExit(ConfigError.exit_code) from error


def _toml_text(text: str) -> str:
    # JSON escapes as TOML's basic strings do, but leaves DEL, which TOML forbids.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_line(name: str, value: Scalar) -> str:
    key = name if name and _BARE_KEY.issuperset(name) else _toml_text(name)
    if isinstance(value, str):
        return f"{key} = {_toml_text(value)}"
    return f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"


def to_toml(config: Config) -> str:
    """Every key of ``config`` as TOML; ``--config`` of this text gives an equal Config."""
    tables: dict[str, dict[str, Scalar]] = {}
    for section, table in config.to_dict().items():
        tables[section] = {name: value for name, value in table.items() if not isinstance(value, dict)}
        tables |= {f"{section}.{name}": value for name, value in table.items() if isinstance(value, dict) and value}
    blocks = ("\n".join([f"[{path}]", *map(_toml_line, table, table.values())]) for path, table in tables.items())
    return "\n\n".join(blocks) + "\n"
