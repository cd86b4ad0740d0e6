"""The policies that come with Tolaria, and how one is named: heuristic | noop | script:FILE | package.module:Class."""

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tolaria.errors import ConfigError
from tolaria.leyline.limits import clip_text
from tolaria.leyline.types import Command, EmergencySignal, FieldReport, SystemState
from tolaria.tamiyo.policies.heuristic import HeuristicPolicy
from tolaria.tamiyo.policies.noop import NoopPolicy
from tolaria.tamiyo.policies.script import ScriptPolicy
from tolaria.tamiyo.policy import Policy

FORMS = "heuristic, noop, script:FILE or package.module:Class"

_BUILT_IN: dict[str, type[Policy]] = {"heuristic": HeuristicPolicy, "noop": NoopPolicy}


def load_policy(spec: str, args: Mapping[str, Any]) -> Policy:
    """A new policy of the kind that ``spec`` names, made with ``args`` as keyword arguments.

    For ``package.module:Class`` the module is imported; the class needs no base class, only a method
    ``decide(state, reports)``; ``emergency()`` is used if it has one. Raises ConfigError that says what is wrong with
    the name, the file or the arguments; what the user's module or constructor raises comes out as ConfigError with its
    cause.
    """
    return load_raw(spec, args)[0]


def load_raw(spec: str, args: Mapping[str, Any]) -> tuple[Policy, Any]:
    """As `load_policy`; and what the policy calls its version, as it stands there."""
    if spec.startswith("script:"):
        made = _make(ScriptPolicy, spec, {"file": spec.removeprefix("script:"), **args})
    else:
        made = _make(_BUILT_IN.get(spec) or _import_class(spec), spec, args)
    policy = made if isinstance(made, Policy) else _Adapted(made, spec)
    version: Any = made.version if hasattr(made, "version") else ""
    policy.version = clip_text(str(policy.version)) or clip_text(spec)
    return policy, version


def read_args(pairs: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from NAME=VALUE texts; a value is JSON where it can be read as such. Raises ConfigError."""
    args: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise ConfigError(f"--arg={pair!r}: expected NAME=VALUE")
        try:
            args[name] = json.loads(text)
        except json.JSONDecodeError:
            args[name] = text
    return args


def check_policy(spec: str, args: Mapping[str, Any]) -> None:
    """Raise ConfigError for a policy that cannot work, as far as that shows without importing the user's code."""
    if ":" in spec and not spec.startswith("script:"):
        _split(spec)
    else:
        load_policy(spec, args)


class _Adapted(Policy):
    """A user's class that is not a `Policy`."""

    def __init__(self, made: Any, spec: str) -> None:
        if not callable(getattr(made, "decide", None)):
            raise ConfigError(f"tamiyo.policy={spec!r}: {type(made).__name__} has no method decide(state, reports)")
        self._made = made
        self._ask_emergency = made.emergency if callable(getattr(made, "emergency", None)) else None
        self.version = str(made.version) if hasattr(made, "version") else ""

    def decide(self, state: SystemState, reports: Sequence[FieldReport]) -> list[Command]:
        commands: list[Command] = self._made.decide(state, reports)
        return commands

    def emergency(self) -> EmergencySignal | None:
        if self._ask_emergency is None:
            return None
        raised: EmergencySignal | None = self._ask_emergency()
        return raised


def _split(spec: str) -> tuple[str, str]:
    module, colon, name = spec.partition(":")
    if not (colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ConfigError(f"tamiyo.policy={spec!r}: expected {FORMS}")
    return module, name


def _import_class(spec: str) -> Any:
    module_name, name = _split(spec)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code: anything may come out of it, and it ends the start
        raise ConfigError(
            f"tamiyo.policy={spec!r}: cannot import {module_name} ({type(error).__name__}: {error})"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"tamiyo.policy={spec!r}: module {module_name} has no {name!r}")
    return getattr(module, name)


def _make(kind: Any, spec: str, args: Mapping[str, Any]) -> Any:
    if not callable(kind):
        raise ConfigError(f"tamiyo.policy={spec!r}: expected a class, found {type(kind).__name__}")
    signature = inspect.signature(kind)
    try:
        signature.bind(**args)
    except TypeError as error:
        raise ConfigError(f"tamiyo.args for {spec!r}: {error}; accepted: {signature}") from error
    try:
        return kind(**args)
    except ConfigError:
        raise
    except Exception as error:  # the user's code: anything may come out of it, and it ends the start
        raise ConfigError(f"tamiyo.policy={spec!r} raised {type(error).__name__}: {error}") from error
