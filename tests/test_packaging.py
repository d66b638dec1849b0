"""The installed package has every package of the source tree."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parent.parent


def test_every_folder_is_a_package() -> None:
    """`setup.py` finds packages, and a folder without `__init__.py` is none."""
    found = find_packages(str(ROOT), include=["vpt_fast", "vpt_fast.*"])
    folders = {
        ".".join(path.relative_to(ROOT).parts[:-1])
        for top in (ROOT / "vpt_fast", ROOT / "vpt_fast" / "kernels")
        for path in top.rglob("*.py")
    }
    assert set(found) == folders
    assert {"vpt_fast.kernels", "vpt_fast.ops"} <= folders
