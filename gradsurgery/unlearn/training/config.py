"""Configurations are dataclasses; here they are changed, checked, compared and made plain."""

from __future__ import annotations

import dataclasses
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show

T = TypeVar("T")


def _names(config: Any) -> list[str]:
    """Options in field order, sections of options after all others."""
    names = [field.name for field in dataclasses.fields(config)]
    return sorted(names, key=lambda name: dataclasses.is_dataclass(getattr(config, name)))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, tuples as lists, ready for YAML and JSON; sections come last."""
    plain = {}
    for name in _names(config):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if isinstance(value, Path):
            value = str(value)
        plain[name] = list(value) if isinstance(value, tuple) else value
    return plain


def update(config: T, changes: dict[str, Any], where: str = "") -> T:
    """A copy of a dataclass with the values of a nested dictionary.

    Raises:
        InputError: naming the key that is unknown or whose value has the wrong type.
    """
    hints = get_type_hints(type(config))
    changed = {}
    for key, value in changes.items():
        name = f"{where}{key}"
        known = _names(config)
        if key not in known:
            raise InputError(f"{show(name, 80)} is not an option; there are {', '.join(known)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise InputError(f"{name} must be a section of options, got {brief(value)}")
            changed[key] = update(current, value, f"{name}.")
        else:
            changed[key] = _convert(value, hints[key], name)
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def check_types(config: Any, where: str) -> None:
    """Raise `InputError` naming an option, `where` before it, whose value is none it can have."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name.replace('_', '-')}"
        if isinstance(_convert(value, hints[field.name], name), float) and isinstance(value, str):
            raise InputError(f"{name} must be a number, got {brief(value)}")


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotation wants it, or an error that names the option."""
    origin, parts = get_origin(hint), get_args(hint)
    if type(None) in parts and value is not None:
        hint = reduce(or_, (part for part in parts if part is not type(None)))
        return _convert(value, hint, name)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, parts[0], name) for item in items)
    try:
        return _plain(value, hint)
    except (ValueError, OverflowError):  # float's own, of a text or of an integer too large
        kind = getattr(hint, "__name__", hint)
        wanted = f"one of {', '.join(map(str, parts))}" if origin is Literal else f"of type {kind}"
        raise InputError(f"{name} must be {wanted}, got {brief(value)}") from None


def _plain(value: Any, hint: Any) -> Any:
    """`value` as an annotation without parts wants it; `ValueError` where it is none of its kind.

    An integer is a number, as is a text that reads as one: YAML 1.1 takes 1e-3, which has no dot,
    for a string. True and False are neither.
    """
    if get_origin(hint) is Literal:
        for allowed in get_args(hint):
            if isinstance(value, type(allowed)) and value == allowed:
                return allowed
    elif hint is Any:
        return value
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif isinstance(value, bool) != (hint is bool):
        raise ValueError
    elif hint is float and isinstance(value, (float, int, str)):
        return float(value)
    elif isinstance(value, hint):
        return value
    raise ValueError


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Every option two nested dictionaries disagree on, as "name: old, new"."""
    found = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{show(where)}{show(key, 80)} was {_short(a)}, is {_short(b)}")
    return found


def _short(value: Any) -> str:
    """As a message shows a value: text without quotes, lists and tables short."""
    return brief(value) if isinstance(value, (dict, list, int)) else show(value, 80)
