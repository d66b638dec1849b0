"""Attention with changed attributes, and wrappers around tuned modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.changes import blocks_of
from support.formulations import plain_swin
from support.formulations.families import build, images
from support.formulations.plain import assert_same, pair, redraw_prompts
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vpt_fast import VPTDeep, VPTShallow, fold_backbone, prompt_tune, remove_prompts

SWIN = "tiny"


def tuned(family: str, method: Any) -> tuple[Any, Tensor]:
    swin = family == SWIN
    model = prompt_tune(plain_swin.build(family) if swin else build(family), method)
    redraw_prompts(model)
    return model, plain_swin.images(family) if swin else images(family)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("family", ["vit", "qk_norm", SWIN])
def test_a_scale_that_timm_would_ignore_is_refused(family: str, first: bool) -> None:
    model, given = tuned(family, VPTDeep(2))
    before = None if first else model(given)
    attn = blocks_of(model)[1].attn
    scale, attn.fused_attn = attn.scale, True
    attn.scale = 0.7
    with pytest.raises(ValueError, match=r"attention with scale 0\.7 .* scales by 0\.\d+; put"):
        model(given)
    attn.scale = scale
    assert before is None or torch.allclose(model(given), before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [VPTDeep(2), VPTShallow(2)])
def test_explicit_softmax_uses_its_scale(method: Any) -> None:
    """As timm's attention does where it is not fused, with and without qk-norm."""
    for family in ("vit", "qk_norm"):
        model, plain = pair(build(family), method)
        given = images(family)
        model(given)
        for block in (*model.blocks, *plain.model.blocks):
            block.attn.fused_attn, block.attn.scale = False, 0.7
        assert_same(model, plain, model(given), plain(given))


def test_a_folded_scale_is_accepted() -> None:
    model, given = tuned("vit", VPTDeep(2))
    before = model(given)
    fold_backbone(model)
    for found in (model(given), copy.deepcopy(model)(given)):
        assert torch.allclose(found, before, rtol=1e-9)
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)
    assert torch.allclose(model(given), before, rtol=1e-9)
    remove_prompts(model)
    assert not hasattr(model.blocks[0].attn, "folded_scale")


@pytest.mark.parametrize("family", ["vit", SWIN])
def test_dropout_by_timms_own_mode_is_refused(family: str) -> None:
    """timm's fused attention uses its own mode, not that of its dropout module."""
    model, given = tuned(family, VPTDeep(2))
    model(given)
    attn = blocks_of(model)[0].attn
    attn.attn_drop.p, attn.training = 0.3, True
    with pytest.raises(ValueError, match="attention dropout 0.3 is active"):
        model(given)


class Around(nn.Module):
    """Wrapper around a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(x, *args, **kwargs)


@pytest.mark.parametrize("family", ["vit", SWIN])
def test_prompts_are_removed_below_wrappers(family: str) -> None:
    model, given = tuned(family, VPTDeep(2))
    before = model(given)
    block = blocks_of(model)[1]
    block.attn = Around(block.attn)
    assert torch.allclose(model(given), before, rtol=1e-9)
    if family == "vit":
        model.blocks[2] = Around(model.blocks[2])
        assert torch.allclose(model(given), before, rtol=1e-9)
    else:
        model.layers[0].blocks[0] = Around(model.layers[0].blocks[0])
        with pytest.raises(ValueError, match="Around stands in the place of a tuned block"):
            model(given)
    remove_prompts(model)
    kinds = {type(module) for module in model.modules()}
    assert kinds & {Attention, WindowAttention} and kinds & {Block, SwinTransformerBlock}
    assert not any(kind.__module__.startswith("vpt_fast") for kind in kinds)
    assert type(block.attn) is Around
