"""VAPT's expert update alone, forward and backward, of every provider in turns."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from bench.expert_ways import PROVIDERS, ExpertCase, checks, functions
from bench.recorded import Recorder
from bench.turns import Turn, timed

CASES = [ExpertCase(10), ExpertCase(50, providers=PROVIDERS), ExpertCase(100)]
PAIRS = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.providers]


@pytest.fixture(scope="module")
def turn_of() -> dict[ExpertCase, dict[str, Turn]]:
    """Turns by case, filled as they are asked for."""
    return {}


@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_experts(
    case: ExpertCase,
    provider: str,
    turn_of: dict[ExpertCase, dict[str, Turn]],
    record: Recorder,
    request: pytest.FixtureRequest,
) -> None:
    if case not in turn_of:
        rounds = 4 * request.config.getoption("rounds")
        kind = torch.float32
        turn_of[case] = timed(checks(case, kind), functions(case, kind), rounds)
    facts = {"bench": "experts", "method": "vapt", "dtype": "float32", **asdict(case)}
    record(turn_of[case][provider], str(case), facts)
