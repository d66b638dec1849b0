"""Which cases of a test's grid run by default."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, TypeVar

import pytest

Key = TypeVar("Key")


def mark_the_rest_full(items: Iterable[pytest.Item]) -> None:
    """Mark what the cases of tests marked `covering` leave out as full."""
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("covering") and isinstance(item, pytest.Function):
            grids[item.path, item.originalname].append(item)
    for cases in grids.values():
        chosen = covering(
            [tuple((name, repr(v)) for name, v in case.callspec.params.items()) for case in cases]
        )
        for number, case in enumerate(cases):
            if number not in chosen:
                case.add_marker(pytest.mark.full)


def covering(cases: Sequence[tuple[tuple[str, Any], ...]]) -> set[int]:
    """Return numbers of few cases in which all pairs of values occur that occur in `cases`.

    Args:
        cases: Arguments of each case, by name. Where there are only two, each value occurs twice
            (or as often as in `cases`), with different partners.
    """
    few = max((len(case) for case in cases), default=0) <= 2
    size = 1 if few else 2
    parts = [set(itertools.combinations(case, size)) for case in cases]
    chosen = cover(dict(enumerate(parts)))
    if few:
        chosen += cover({n: part for n, part in enumerate(parts) if n not in chosen})
    return set(chosen)


def cover(parts: Mapping[Key, Set[Any]], cost: Callable[[Key], float] = lambda key: 1) -> list[Key]:
    """Return few cheap keys whose parts together are all parts, the most useful key first."""
    missing: set[Any] = set().union(*parts.values())
    chosen = []
    while missing:
        best = max(parts, key=lambda key: len(parts[key] & missing) / cost(key))
        chosen.append(best)
        missing -= parts[best]
    return chosen
