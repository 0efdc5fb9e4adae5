"""Configurations are dataclasses; here they become YAML and come back."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gradsurgery.errors import InputError

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
            raise InputError(f"{name} is not an option; there are {', '.join(known)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise InputError(f"{name} must be a section of options, got {value!r}")
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
            raise InputError(f"{name} must be a number, got {value!r}")


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotation wants it, or an error that names the option."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        return _convert(value, next(c for c in choices if c is not type(None)), name)
    if origin is Literal:
        if value in choices:
            return value
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, choices[0], name) for item in items)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3, which has no dot, as a string
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise InputError(f"{name} must be of type {hint.__name__}, got {value!r}")


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """A YAML file's top-level mapping; `InputError` naming `option` where there is none."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{option}: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{option}: {path} is not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{option}: {path} must hold options as `name: value` lines")
    return content


def to_yaml(config: Any) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Every option two nested dictionaries disagree on, as "name: old, new"."""
    found = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key} was {a}, is {b}")
    return found
