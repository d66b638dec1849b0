"""Inference with a tuned model, by all providers in interleaved rounds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bench.compare.cases import Case
from bench.compare.recorded import Recorder


def test_inference(case: Case, provider: str, results_of: Any, record: Recorder) -> None:
    """Record the times of a provider."""
    record(results_of(case)[provider], str(case), {"bench": case.work, **asdict(case)})
