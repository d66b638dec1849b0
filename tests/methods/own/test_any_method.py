"""Prompt methods of every form against their plain formulation."""

from __future__ import annotations

from typing import Any

import pytest
from support.formulations.any_method import KINDS, AnyMethod, pair
from support.formulations.isotropic import built
from support.formulations.plain import assert_same
from support.formulations.plain_vapt import seeded

from vpt_fast.ops.memory_modes import MEMORY_MODES

EVA = ("dinov3", "eva02_swiglu_norm", "rope_mixed", "gated", "qk_norm")
VIT = ("vit", "deit_distilled", "deit3", "mae", "siglip_map", "qk_norm", "no_bias", "dinov2_swiglu")
BLOCKS = (None, (0,), (1, 2), (2,))


@pytest.mark.covering
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*VIT, *(f"{name} eva" for name in EVA)])
def test_equals_the_plain_formulation(family: str, kind: str, blocks: Any, memory: str) -> None:
    base, image = built(family)
    tuned, plain = pair(base, AnyMethod(3, kind=kind, blocks=blocks), memory)
    tuned.eval()
    assert_same(tuned, plain, tuned(image), plain(image))


@pytest.mark.covering
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["vit", "mae", "dinov3 eva"])
def test_dropout(family: str, kind: str, memory: str) -> None:
    base, image = built(family)
    tuned, plain = pair(base, AnyMethod(3, dropout=0.4, kind=kind), memory)
    tuned.train()
    plain.training = True
    expected, output = seeded(plain, image), seeded(tuned, image)
    assert_same(tuned, plain, output, expected)
