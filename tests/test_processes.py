"""How the suite's tests are spread over processes."""

from __future__ import annotations

import pytest


def test_one_process_runs_a_file(request: pytest.FixtureRequest) -> None:
    """Fixtures of a module are made once, and kernels are executed before any is compiled."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("only in a process of pytest-xdist, with --dist loadgroup")
    assert request.node.nodeid.endswith(f"@{request.path.stem}"), "tests are not grouped"
