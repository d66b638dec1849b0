"""First difference of two records of settings."""

from __future__ import annotations

from typing import Any


def first_difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any]:
    """Return the path to the first value that differs, as words, and its two values.

    Args:
        before: Earlier record.
        now: Current record.
        where: Path to both, within the records that the caller compares.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                return first_difference(before.get(key), now.get(key), f"{where} {key}".strip())
    return where, before, now


def plain(value: Any) -> Any:
    """Return a value as it reads after a round trip through JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list | range) else value
