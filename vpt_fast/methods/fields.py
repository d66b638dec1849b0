"""Checks of methods' fields; errors name the field and its value."""

from __future__ import annotations

from typing import Any


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
