"""Options of the benchmarks, and what they share.

    python -m pytest bench --benchmark-enable [--rounds 5] [-k EXPRESSION]

By default `bench.compare.cases.cpu_cases`. Any of the options below replaces them by their product.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from bench.compare.cases import DTYPES, INFERENCE, METHODS, STEP, Case, cpu_cases
from bench.compare.facts import facts
from bench.compare.recorded import record
from bench.compare.rounds import Turn, take_turns
from bench.providers.models import EAGER, PROVIDERS

__all__ = ["record"]

_OPTIONS: dict[str, dict[str, Any]] = {
    "--models": {"help": "timm's names"},
    "--methods": {"choices": METHODS},
    "--batches": {"type": int, "help": "images of a step"},
    "--prompts": {"type": int, "help": "prompts of each block"},
    "--dropouts": {"type": float},
    "--dtypes": {"choices": tuple(DTYPES)},
    "--image-sizes": {"type": int, "help": "in pixels"},
}
_FIELDS = ("model", "method", "batch", "prompts", "dropout", "dtype", "image_size")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vpt_fast")
    for name, options in _OPTIONS.items():
        group.addoption(name, nargs="+", **options)
    group.addoption("--providers", nargs="+", choices=PROVIDERS)
    group.addoption("--rounds", type=int, default=5, help="of each provider (default 5)")


def chosen(config: pytest.Config, work: str) -> list[Case]:
    """The cases of a kind of work that the options ask for."""
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
    """A test per case and provider, for tests of a whole model."""
    if metafunc.definition.get_closest_marker("parametrize"):
        return  # it brings its own cases
    work = INFERENCE if "inference" in metafunc.module.__name__ else STEP
    pairs = [
        pytest.param(case, name, id=f"{case}-{name}")
        for case in chosen(metafunc.config, work)
        for name in case.providers
    ]
    metafunc.parametrize(("case", "provider"), pairs)


class _Latest:
    """The turns of the case that was taken last: its providers' tests follow each other."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._case: Any = None
        self._turns: dict[str, Turn] = {}

    def __call__(
        self, case: Any, take: Callable[[Any, int], dict[str, Turn]] = take_turns
    ) -> dict[str, Turn]:
        if case != self._case:
            self._turns = take(case, self._rounds)
            self._case = case
        return self._turns


@pytest.fixture(scope="session")
def turns(request: pytest.FixtureRequest) -> _Latest:
    """All providers' turns of a case, taken by `take(case, rounds)`: turns(case, take)."""
    return _Latest(request.config.getoption("rounds"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """What the results hang on."""
    machine_info["vpt_fast"] = facts()
