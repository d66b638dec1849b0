"""The strict build of the site fails on dead links and on pages outside the navigation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.doc_pages import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed")


def _build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(config),
        "-d",
        str(site),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = _build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api" / "index.html").stat().st_size > 50_000
    assert list((tmp_path / "site" / "results").glob("*.png"))


def test_dead_links_and_stray_pages_stop_it(tmp_path: Path) -> None:
    """Checked on a site of two pages with the project's own settings."""
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "memory.md", docs / "stray.md")
    (docs / "index.md").write_text("# Home\n\n[a](none.md) [b](#none) [c](/absolute)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    validation = settings[settings.index("validation:") : settings.index("nav:\n  - Home")]
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: two\ntheme: material\nnav: [index.md]\n{validation}")
    done = _build(config, tmp_path / "site")
    assert done.returncode == 1
    for message in ("'none.md'", "'#none'", "'/absolute'", "stray.md"):
        assert message in done.stderr, done.stderr
