"""Config sections become objects: a component's constructor is its config schema.

A section names its class (`_target_: otcrl.rewards.otc.OTCReward`, or a user's `my_pkg.MyReward`) and
lists the constructor's parameters. Parts that the config cannot hold (a tokenizer, the task's
`correct`) are wired in by name: `construct(cfg["reward"], "reward", correct=task.correct)`. A class
says which of its parameters those are, so that a test can hold its yaml to all the others:

    wired: ClassVar[frozenset[str]] = frozenset({"correct"})

A part is offered to the section and to every section nested in it; who has no such parameter goes without.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from otcrl.errors import ConfigError, nearest

T = TypeVar("T")
Constructor = Callable[..., T]


def construct(node: Mapping[str, object], where: str, /, **wired: object) -> Any:  # only the yaml knows the type
    """The object that the section `where` describes. Raises ConfigError naming the setting that is wrong."""
    check_section(node, where)
    if "_target_" not in node:
        raise ConfigError(f"{where} needs _target_, the class that it builds")
    settings = {key: value for key, value in node.items() if key != "_target_"}
    return construct_as(locate(node["_target_"], f"{where}._target_"), settings, where, **wired)


def check_part(part: object, protocol: type, where: str) -> None:
    """Raises ConfigError naming what otcrl asks of such a part and it does not have."""
    asked = [name for name in vars(protocol) if not name.startswith("_") or name == "__call__"]
    if missing := [name for name in asked if not hasattr(part, name)]:
        raise ConfigError(
            f"{where}: {type(part).__name__} has no {', '.join(missing)}, which every {protocol.__name__} has "
            "(otcrl/protocols.py)"
        )


def construct_as(cls: Constructor[T], node: Mapping[str, object], where: str, /, **wired: object) -> T:
    """The same for a section whose class the code knows, e.g. `construct_as(Rollout, cfg["rollout"], "rollout")`."""
    check_section(node, where)
    parameters = settings_of(cls)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    parts = {name: part for name, part in wired.items() if name in named}
    free = named.keys() - parts.keys() - wired_parts(cls)
    for key in node:
        if key in parts:
            raise ConfigError(f"{where}.{key} is wired by otcrl, not a setting")
        if key not in free and not takes_any:
            raise ConfigError(f"{where}.{key} is not a setting of {cls.__name__}.{nearest(str(key), free)}")
    arguments = {key: setting(cls, named.get(key), value, f"{where}.{key}", wired) for key, value in node.items()}
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in arguments and name not in parts:
            what = "a part that otcrl does not wire here" if name in wired_parts(cls) else "missing"
            raise ConfigError(f"{where}.{name} is {what}; {cls.__name__} needs it")
    try:
        return cls(**arguments, **parts)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_section(node: object, where: str) -> None:
    """Raises ConfigError for what is not settings by name: `sft=5`, `sft=null`."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where} must be a section of settings, got {node!r}")


def settings_of(cls: Constructor[object]) -> Mapping[str, inspect.Parameter]:
    """The constructor's parameters by name, wired parts included."""
    return inspect.signature(cls).parameters


def wired_parts(cls: Constructor[object]) -> frozenset[str]:
    """Parameters that `build` fills, so no yaml may."""
    return getattr(cls, "wired", frozenset())


def locate(target: object, where: str) -> Constructor[Any]:
    """The class or function at a dotted path."""
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{where} must be a dotted path such as my_pkg.MyReward, got {target!r}")
    module_name, _, attribute = target.rpartition(".")
    module = load_module(module_name, where)
    found = getattr(module, attribute, None)
    if callable(found):
        return found
    own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    raise ConfigError(f"{where}: {module_name} has nothing called {attribute!r}.{nearest(attribute, own)}")


def load_module(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing != name and not name.startswith(f"{missing}."):
            raise ConfigError(f"{where}: {name} needs the package {missing!r}, which is not installed") from error
        parent, _, child = missing.rpartition(".")
        siblings = getattr(sys.modules.get(parent), "__path__", None) if parent else []
        hint = nearest(child, [m.name for m in pkgutil.iter_modules(siblings)]) if siblings else ""
        raise ConfigError(f"{where}: no module named {missing!r}.{hint}") from error


def setting(
    cls: Constructor[object],
    parameter: inspect.Parameter | None,
    value: object,
    where: str,
    wired: Mapping[str, object],
) -> object:
    """The value to pass on: nested sections constructed, plain values checked against the annotation."""
    if contains_target(value):  # checked by the constructors inside it
        return nested(value, where, wired)
    if parameter is None or parameter.annotation is parameter.empty:
        return value
    hint = resolve(cls, parameter)
    if isinstance(hint, type) and is_dataclass(hint):
        return construct_as(hint, value, where, **wired)  # pyright: ignore[reportArgumentType]  it checks the value
    return checked(value, hint, where)


def contains_target(value: object) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(contains_target(v) for v in value.values())
    return isinstance(value, list) and any(contains_target(v) for v in value)


def nested(value: object, where: str, wired: Mapping[str, object]) -> object:
    """`value` with every section that has a `_target_` replaced by its object."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return construct(value, where, **wired)
        return {key: nested(inner, f"{where}.{key}", wired) for key, inner in value.items()}
    if isinstance(value, list):
        return [nested(inner, f"{where}[{i}]", wired) for i, inner in enumerate(value)]
    return value


def resolve(cls: Constructor[object], parameter: inspect.Parameter) -> Any:
    """The parameter's type. One at a time: a wired part's type may be importable by type checkers only.

    A parameter may be inherited, so the modules of all the class's bases are asked what its type's name means.
    """
    owners = reversed(getattr(cls, "__mro__", (cls,)))
    namespace = {name: value for owner in owners for name, value in vars(sys.modules[owner.__module__]).items()}
    holder = SimpleNamespace(__annotations__={"it": parameter.annotation})
    return get_type_hints(holder, globalns=namespace)["it"]


def checked(value: object, hint: Any, where: str) -> object:
    """`value` as `hint` describes it. Strict JSON rules: a list may fill a tuple and an int a float, but no
    string is a number and no bool is an int."""
    if value is None and type(None) in get_args(hint):
        return None
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, extra="forbid"))
    except SchemaError:  # a protocol: only an object can be one
        raise ConfigError(f"{where} must be a section with a _target_, got {value!r}") from None
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError:
        why = f"{where} must be {readable(hint)}, got {value!r}.{close(value, hint)}".rstrip(".")
        raise ConfigError(why + in_brackets(value, adapter)) from None


def in_brackets(value: object, adapter: TypeAdapter[Any]) -> str:
    """What to write where one of a list was given without the list."""
    if not isinstance(value, str):
        return ""
    try:
        adapter.validate_json(json.dumps([value]), strict=True)
    except ValidationError:
        return ""
    return f": write [{value}]"


def readable(hint: object) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("collections.abc.", "").replace("typing.", "").replace("pathlib.", "")


def close(value: object, hint: object) -> str:
    if get_origin(hint) is not Literal or not isinstance(value, str):
        return ""
    return nearest(value, [str(choice) for choice in get_args(hint)])
