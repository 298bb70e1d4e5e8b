"""From a mapping (YAML, flags, a manifest) to a frozen dataclass of settings, with hints for what does not fit."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from llmopt.artifacts.outcome import Json
from llmopt.errors import SettingsError, nearest

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Make `cls` (a keyword-only dataclass) from `values`; `where` names the section in messages.

    An unknown key or a value of the wrong type is a `SettingsError`; ranges are checked by the class itself
    in `__post_init__`. An int is taken for a float, a list for a tuple, a mapping for a dataclass, and a list of pairs
    for a mapping, nothing else is converted.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise SettingsError(f"`{where}` has no setting `{key}`", hint=nearest(str(key), fields))
    hints = typing.get_type_hints(cls)
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        name = missing[0]
        raise SettingsError(f"`{where}` needs the setting `{name}`", hint=f"add `{name}: ...` under `{where}`")
    return cls(**{key: _convert(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def to_json(settings: object) -> dict[str, Json]:
    """The settings as plain JSON, every default spelled out: what goes into an action's key."""
    return {f.name: _plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}  # type: ignore[arg-type]


def _plain(value: Any) -> Json:
    """A mapping becomes pairs: the order of patterns counts, and canonical JSON sorts the keys of an object.

    Objects within it are `Json`, where order means nothing: they stay as they are, so that `build` reads them back.
    """
    if isinstance(value, Mapping):
        return [[key, item if isinstance(item, dict) else _plain(item)] for key, item in value.items()]
    if dataclasses.is_dataclass(value):
        return to_json(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if _is_json(hint):
        return _json(value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        return _first_that_fits(value, [a for a in typing.get_args(hint) if a is not type(None)], where)
    if origin is Literal:
        known = typing.get_args(hint)
        if value not in known or isinstance(value, bool) != isinstance(next(k for k in known if k == value), bool):
            raise SettingsError(f"`{where}` cannot be `{value}`", hint=nearest(str(value), [str(k) for k in known]))
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, typing.get_args(hint)[0], where) for item in items)
    if origin is collections.abc.Mapping:
        return _mapping(value, typing.get_args(hint)[1], where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast("type[Any]", hint), value, where=where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, hint):
        raise SettingsError(f"`{where}` must be {_name(hint)}, not `{value}`", hint=f"write it as {_example(hint)}")
    return value


def _is_json(hint: Any) -> bool:
    """Whether `hint` is `Json`: the only union here with a list of itself in it."""
    return any(
        typing.get_origin(part) is list and isinstance(typing.get_args(part)[0], typing.ForwardRef)
        for part in typing.get_args(hint)
    )


def _json(value: Any, where: str) -> Json:
    """`value` as it is; SettingsError where JSON could not hold it, such as a date that YAML has read."""
    if isinstance(value, dict):
        return {str(key): _json(value[key], f"{where}.{key}") for key in sorted(value, key=str)}
    if isinstance(value, list):
        return [_json(item, where) for item in value]
    if value is not None and not isinstance(value, bool | int | float | str):
        raise SettingsError(f"`{where}` cannot be `{value}`", hint="quote it if it is text")
    return value


def _first_that_fits(value: Any, hints: list[Any], where: str) -> Any:
    """`value` as the first of several types that takes it; the error of the last type where none does."""
    for hint in hints[:-1]:
        try:
            return _convert(value, hint, where)
        except SettingsError:
            continue
    return _convert(value, hints[-1], where)


def _mapping(value: Any, hint: Any, where: str) -> dict[str, Any]:
    """From a mapping, or from the pairs that `to_json` makes of it.

    In the order of their names: options of a program mean the same in any order, and so the same settings are the same
    key and the same bytes. Patterns, whose values are dataclasses, stay in the order they are given in.
    """
    try:
        items = dict(value)
    except (TypeError, ValueError):
        raise SettingsError(f"`{where}` must be a mapping, not `{value}`", hint="write `name: ...` below it") from None
    found = {str(key): _convert(item, hint, f"{where}.{key}") for key, item in items.items()}
    return found if dataclasses.is_dataclass(hint) else dict(sorted(found.items()))


def _name(hint: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, "a mapping" if dataclasses.is_dataclass(hint) else hint.__name__)


def _example(hint: type) -> str:
    if dataclasses.is_dataclass(hint):
        return f"`{{{next(iter(dataclasses.fields(hint))).name}: ...}}`"
    return {int: "`128`", float: "`0.01`", bool: "`true`", str: "`gptq`"}.get(hint, hint.__name__)
