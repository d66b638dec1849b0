"""Attention alone, forward and backward, of every provider in turns; shapes of ViT-S/16."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from bench.attention_ways import AttentionCase, checks, functions
from bench.providers import EAGER
from bench.recorded import Recorder
from bench.turns import Turn, timed

_SOME = AttentionCase(providers=EAGER)
CASES = [AttentionCase(), *(replace(_SOME, prompts=p) for p in (10, 100, 200))]
PAIRS = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.providers]


@pytest.fixture(scope="module")
def turn_of(request: pytest.FixtureRequest) -> dict[AttentionCase, dict[str, Turn]]:
    """Turns by case, filled as they are asked for."""
    return {}


@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_attention(
    case: AttentionCase,
    provider: str,
    turn_of: dict[AttentionCase, dict[str, Turn]],
    record: Recorder,
    request: pytest.FixtureRequest,
) -> None:
    if case not in turn_of:
        rounds = 4 * request.config.getoption("rounds")
        kind = torch.float32
        turn_of[case] = timed(checks(case, kind), functions(case, kind), rounds)
    facts = {"bench": "attention", "dtype": "float32", **asdict(case)}
    record(turn_of[case][provider], str(case), facts)
