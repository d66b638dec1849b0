"""VAPT's expert update alone, forward and backward, by all providers in interleaved rounds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from bench.compare.recorded import Recorder
from bench.providers.experts import PROVIDERS, ExpertCase, check_and_time

CASES = [ExpertCase(10), ExpertCase(50, providers=PROVIDERS), ExpertCase(100)]
PAIRS = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.providers]


@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_experts(case: ExpertCase, provider: str, results_of: Any, record: Recorder) -> None:
    """Record the times of a provider."""
    facts = {"bench": "experts", "method": "vapt", "dtype": "float32", **asdict(case)}
    record(results_of(case, check_and_time)[provider], str(case), facts)
