"""VAPT's expert update alone, forward and backward, of every provider in turns."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from bench.compare.recorded import Recorder
from bench.providers.experts import PROVIDERS, ExpertCase, take_turns

CASES = [ExpertCase(10), ExpertCase(50, providers=PROVIDERS), ExpertCase(100)]
PAIRS = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.providers]


@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_experts(case: ExpertCase, provider: str, turns: Any, record: Recorder) -> None:
    facts = {"bench": "experts", "method": "vapt", "dtype": "float32", **asdict(case)}
    record(turns(case, take_turns)[provider], str(case), facts)
