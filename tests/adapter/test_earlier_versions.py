"""Adapters that version 0.1.0 wrote before its modules moved load and compute the same.

`version_0_1_0` holds one adapter of each method, and the logits that the tuned models gave.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from vpt_fast import load_adapter, save_adapter
from vpt_fast.methods import METHODS

WRITTEN = Path(__file__).parent / "version_0_1_0"
LOGITS = json.loads((WRITTEN / "logits.json").read_text(encoding="utf-8"))
SIZES = {"vit": 32, "swin": 64}
WRITTEN_BY = ("vpt_fast.methods.baselines", "vpt_fast.methods.prompts")
"""Modules of the methods that version 0.1.0 had."""


def plain(family: str) -> Any:
    """Return the backbone that the adapters were trained on."""
    torch.manual_seed(0)
    if family == "vit":
        return timm.create_model(
            "test_vit", img_size=32, num_classes=3, embed_dim=16, num_heads=2, depth=4
        )
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=8,
        depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=3,
    )  # fmt: skip


def test_there_is_one_of_each_method() -> None:
    found = {
        json.loads(path.read_text(encoding="utf-8"))["method"]["name"]
        for path in WRITTEN.glob("*/adapter_config.json")
    }
    ours = {name for name, cls in METHODS.items() if cls.__module__ in WRITTEN_BY}
    assert found == ours and len(LOGITS) == 14


@pytest.mark.parametrize("name", LOGITS)
def test_it_loads_and_computes_the_same(name: str, tmp_path: Path) -> None:
    family = name.partition("-")[0]
    model = load_adapter(plain(family), WRITTEN / name)
    size = SIZES[family]
    images = torch.linspace(-40, 40, 2 * 3 * size * size).view(2, 3, size, size).sin()
    save_adapter(model, tmp_path / "again")
    again = load_adapter(plain(family), tmp_path / "again")
    for loaded in (model, again):
        with torch.no_grad():
            logits = loaded.eval().double()(images.double())
        expected = torch.tensor(LOGITS[name], dtype=torch.float64)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
