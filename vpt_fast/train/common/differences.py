"""The first thing in which two records of settings differ."""

from __future__ import annotations

from typing import Any


def first_difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any]:
    """The name of what differs, through all objects around it, and its two values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                return first_difference(before.get(key), now.get(key), f"{where} {key}".strip())
    return where, before, now


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list | range) else value
