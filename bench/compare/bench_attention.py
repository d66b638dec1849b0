"""Attention alone, forward and backward, by all providers in interleaved rounds."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from bench.compare.recorded import Recorder
from bench.providers.attention import AttentionCase, check_and_time
from bench.providers.models import EAGER

_SOME = AttentionCase(providers=EAGER)
CASES = [AttentionCase(), *(replace(_SOME, prompts=p) for p in (10, 100, 200))]
PAIRS = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.providers]


@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_attention(case: AttentionCase, provider: str, results_of: Any, record: Recorder) -> None:
    """Record the times of a provider."""
    facts = {"bench": "attention", "dtype": "float32", **asdict(case)}
    record(results_of(case, check_and_time)[provider], str(case), facts)
