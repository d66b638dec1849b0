"""The cases of a grid that run by default cover it."""

from __future__ import annotations

import itertools

from support.grids import covering


def grid(**axes: range) -> list[tuple[tuple[str, int], ...]]:
    return [tuple(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def test_every_pair_of_values_occurs() -> None:
    cases = grid(family=range(6), method=range(5), memory=range(4))
    chosen = [cases[number] for number in covering(cases)]
    pairs = {pair for case in cases for pair in itertools.combinations(case, 2)}
    assert {pair for case in chosen for pair in itertools.combinations(case, 2)} == pairs
    assert 30 <= len(chosen) <= 40


def test_of_two_arguments_every_value_occurs_twice() -> None:
    cases = grid(family=range(7), method=range(4))
    chosen = [cases[number] for number in covering(cases)]
    counts = [sum(value in case for case in chosen) for value in {v for c in cases for v in c}]
    assert min(counts) >= 2 and 14 <= len(chosen) <= 18
    assert covering(cases[:1]) == {0} and covering([]) == set()
