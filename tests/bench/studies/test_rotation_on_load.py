"""The study of rotation on load compiles both kernels; rotation on load issues far more."""

from __future__ import annotations

import pytest
from support.kernels.slower import JUDGED_VERSION

from bench.studies.rotation_on_load import TARGETS, attention_figures, main

pytestmark = JUDGED_VERSION


def test_rotation_on_load_issues_far_more(capsys: pytest.CaptureFixture[str]) -> None:
    for target in TARGETS:
        plain, rotated = (attention_figures(rotates, target) for rotates in (False, True))
        assert plain.spills == rotated.spills == 0
        assert 1.4 < rotated.issue / plain.issue < 2.5
        assert rotated.shared > plain.shared
    assert main() == 0
    printed = capsys.readouterr().out
    assert printed.count("rotated on load") == len(TARGETS) and "static" in printed
