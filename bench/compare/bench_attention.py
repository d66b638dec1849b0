"""Attention alone, forward and backward, of every provider in turns; shapes of ViT-S/16."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from bench.compare.recorded import Recorder
from bench.providers.attention import AttentionCase, take_turns
from bench.providers.models import EAGER

_SOME = AttentionCase(providers=EAGER)
CASES = [AttentionCase(), *(replace(_SOME, prompts=p) for p in (10, 100, 200))]
PAIRS = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.providers]


@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_attention(case: AttentionCase, provider: str, turns: Any, record: Recorder) -> None:
    facts = {"bench": "attention", "dtype": "float32", **asdict(case)}
    record(turns(case, take_turns)[provider], str(case), facts)
