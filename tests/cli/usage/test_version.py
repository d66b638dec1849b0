"""The version is defined once, and the same everywhere."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from typer.testing import CliRunner

import vpt_fast
from vpt_fast.cli.app import app
from vpt_fast.version import __version__

ROOT = Path(__file__).parents[3]


def stdout_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_version_is_the_same_everywhere() -> None:
    assert vpt_fast.__version__ == __version__ == metadata.version("vpt-fast")
    assert stdout_of("-m", "vpt_fast", "--version") == f"vpt-fast {__version__}"
    assert CliRunner().invoke(app, ["--version"]).stdout == f"vpt-fast {__version__}\n"


def test_the_version_is_known_without_pytorch() -> None:
    """`setup.py` runs before anything is installed."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py')"
    )
    assert stdout_of("-c", code).splitlines()[-1] == __version__
    tree = ast.parse((ROOT / "vpt_fast" / "version.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
