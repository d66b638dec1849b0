"""The installed package has every package of the source tree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_installed() -> None:
    listed = set(
        re.findall(r'^        "(vpt_fast[\w.]*)",$', (ROOT / "setup.py").read_text(), re.M)
    )
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "vpt_fast").rglob("__init__.py")
    }
    assert listed == found | {"vpt_fast.kernels"}
