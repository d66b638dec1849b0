"""Logits of a tuned model, of every provider in turns."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bench.compare.cases import Case
from bench.compare.recorded import Recorder


def test_inference(case: Case, provider: str, turns: Any, record: Recorder) -> None:
    record(turns(case)[provider], str(case), {"bench": case.work, **asdict(case)})
