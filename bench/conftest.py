"""Options and fixtures of the benchmarks.

    python -m pytest bench --benchmark-enable [--rounds 5] [-k EXPRESSION]

The default cases are `bench.compare.cases.cpu_cases`. Any of the options below replaces them by the
product of the options' values.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from bench.compare.cases import DTYPES, INFERENCE, METHODS, STEP, Case, cpu_cases
from bench.compare.facts import facts
from bench.compare.recorded import record
from bench.compare.rounds import ProviderResult, check_and_time
from bench.providers.models import EAGER, PROVIDERS

__all__ = ["record"]

_OPTIONS: dict[str, dict[str, Any]] = {
    "--models": {"help": "model names in timm"},
    "--methods": {"choices": METHODS},
    "--batches": {"type": int, "help": "images per step"},
    "--prompts": {"type": int, "help": "prompts per block"},
    "--dropouts": {"type": float},
    "--dtypes": {"choices": tuple(DTYPES)},
    "--image-sizes": {"type": int, "help": "in pixels"},
}
_FIELDS = ("model", "method", "batch", "prompts", "dropout", "dtype", "image_size")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that select cases, providers and rounds."""
    group = parser.getgroup("vpt_fast")
    for name, options in _OPTIONS.items():
        group.addoption(name, nargs="+", **options)
    group.addoption("--providers", nargs="+", choices=PROVIDERS)
    group.addoption("--rounds", type=int, default=5, help="rounds per provider (default 5)")


def chosen(config: pytest.Config, work: str) -> list[Case]:
    """Return the cases of a kind of work that the options select."""
    names = [name.lstrip("-").replace("-", "_") for name in _OPTIONS]
    given = [config.getoption(name) for name in names]
    providers = config.getoption("providers")
    if not any(given) and not providers:
        return [case for case in cpu_cases() if case.work == work]
    default = Case(work)
    values = [v or [getattr(default, f)] for v, f in zip(given, _FIELDS, strict=True)]
    return [
        Case(work, providers=tuple(providers or EAGER), **dict(zip(_FIELDS, point, strict=True)))
        for point in product(*values)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Split tests of a whole model by case and provider."""
    if metafunc.definition.get_closest_marker("parametrize"):
        return  # parametrized by its own cases
    work = INFERENCE if "inference" in metafunc.module.__name__ else STEP
    pairs = [
        pytest.param(case, name, id=f"{case}-{name}")
        for case in chosen(metafunc.config, work)
        for name in case.providers
    ]
    metafunc.parametrize(("case", "provider"), pairs)


class _LatestCase:
    """Results of the latest case, kept because its providers' tests follow one another."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._case: Any = None
        self._results: dict[str, ProviderResult] = {}

    def __call__(
        self, case: Any, measure: Callable[[Any, int], dict[str, ProviderResult]] = check_and_time
    ) -> dict[str, ProviderResult]:
        if case != self._case:
            self._results = measure(case, self._rounds)
            self._case = case
        return self._results


@pytest.fixture(scope="session")
def results_of(request: pytest.FixtureRequest) -> _LatestCase:
    """Return a function of (case, measure) that gives the results of all providers of a case.

    `measure(case, rounds)` is called once per case.
    """
    return _LatestCase(request.config.getoption("rounds"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """Add the machine and the versions that the results depend on."""
    machine_info["vpt_fast"] = facts()
