"""Checks of methods' fields; errors name the field and its value."""

from __future__ import annotations

import json
from dataclasses import Field, fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_count(name: str, value: Any, least: int) -> None:
    """Raise TypeError unless `value` is an int, ValueError unless it is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_dropout(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_share(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def constructor_fields(cls: Any) -> list[Field[Any]]:
    """Return the fields that a dataclass's constructor takes."""
    return [field for field in fields(cls) if field.init]


def as_json(value: Any) -> Any:
    """Return a field's value as JSON has it: tuples are lists."""
    return [*map(as_json, value)] if isinstance(value, tuple) else value


def check_values(method: Any) -> None:
    """Raise TypeError unless fields of a dataclass have their types, and JSON can hold them."""
    try:
        hints = get_type_hints(type(method))
    except NameError:  # a class in a function, with types of that function
        hints = {}
    for field in constructor_fields(type(method)):
        value, kind = getattr(method, field.name), hints.get(field.name, Any)
        try:
            hash(value)
            restored = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            restored = None
        if as_json(value) != restored:
            raise TypeError(
                f"{type(method).__name__}.{field.name} is {value!r}, which no adapter can hold; "
                "use a number, a string, a bool, None, or a tuple of these"
            )
        if not _is_of(value, kind):
            needed = kind.__name__ if isinstance(kind, type) else str(kind)
            raise TypeError(f"{field.name} must be {needed}, got {value!r}")


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, where this can be told."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is tuple and isinstance(value, tuple):
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        return len(parts) == len(value) and all(map(_is_of, value, parts))
    if kind is float:
        return type(value) in (float, int)
    if kind in (int, bool, str, type(None)):
        return type(value) is kind
    return not isinstance(origin or kind, type) or isinstance(value, origin or kind)
