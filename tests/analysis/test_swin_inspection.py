"""Attention shares and mixing maps of a tuned SwinTransformer, and functions that refuse it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.formulations.plain_swin import PlainSwin, build, images, pair
from torch import Tensor

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow, fold_backbone, prompt_tune
from vpt_fast.analysis.shares import (
    attention_shares,
    mixing_maps,
    query_name,
    uniform_share,
)
from vpt_fast.reports.memory import report_memory
from vpt_fast.train.loop.prefix_cache import frozen_blocks


class Recording(PlainSwin):
    """A plain formulation that records the prompts' part of every softmax, without padding."""

    shares: list[Tensor]

    def attention(self, attn: Any, x: Tensor, count: int, mask: Any, batch: int) -> Tensor:
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = attn.scale * q @ k.transpose(-2, -1)
        tokens = scores[..., count:, count:]  # rows and columns of tokens
        tokens += attn._get_rel_pos_bias()
        if mask is not None:
            tokens += mask.repeat(batch, 1, 1).unsqueeze(1)
        found = scores.softmax(-1)[:, :, count:, :count]  # (B * windows, h, area, p)
        self.shares.append(found.unflatten(0, (batch, -1)).mean((1, 3)))
        return super().attention(attn, x, count, mask, batch)


@pytest.mark.parametrize(
    "method", [VPTDeep(5), VPTShallow(3), VPTDeep(2, blocks=[1, 4]), VAPT(4)], ids=str
)
@pytest.mark.parametrize("name", ["window7", "window4"])
def test_shares_are_those_of_the_softmax(name: str, method: Any) -> None:
    tuned, plain = pair(build(name), method)
    plain.__class__ = Recording
    plain.shares = []
    with torch.no_grad():
        plain(images(name))
    tuned.train()
    found = attention_shares(tuned, images(name))
    assert tuned.training
    assert len(found) == len(plain.shares)
    for record, want in zip(found, plain.shares, strict=True):
        assert record.prompts.shape == want.shape
        assert (record.prompts - want).abs().max() < 1e-12
        assert torch.allclose(record.tokens, 1 - want.sum(-1))
    assert query_name(tuned) == "patch queries"


def test_the_uniform_share_is_that_of_a_window() -> None:
    tuned = prompt_tune(build("window7"), VPTDeep(5))
    assert uniform_share(tuned) == pytest.approx(5 / (5 + 49))


def test_mixing_maps_have_the_grid_of_their_stage() -> None:
    tuned = prompt_tune(build("window7"), VAPT(4))
    grids = {index: tuple(maps.shape) for index, maps in mixing_maps(tuned).items()}
    assert grids == {1: (4, 14, 14), 2: (4, 7, 7), 3: (4, 7, 7), 4: (4, 4, 4), 5: (4, 4, 4)}


def test_functions_that_do_not_take_swin_refuse_it() -> None:
    tuned = prompt_tune(build("window7"), VPTDeep(5))
    with pytest.raises(ValueError, match="PromptedSwinTransformer cannot be folded"):
        fold_backbone(tuned)
    assert frozen_blocks(prompt_tune(build("window7"), LinearProbe())) == 0


@pytest.mark.parametrize(
    "method",
    [VAPT(2), pytest.param(VPTDeep(2), marks=pytest.mark.full)],
    ids=lambda method: method.name,
)
def test_a_memory_profile(method: Any, tmp_path: Any) -> None:
    messages: list[str] = []
    report_memory(
        "swin_tiny_patch4_window7_224", method, tmp_path / "memory", num_prompts=2, prompts=[0, 2],
        batch_size=1, img_size=None, dtype="bfloat16", progress=False, log=messages.append,
    )  # fmt: skip
    text = "\n".join(messages)
    assert ("eager is left out" in text) == isinstance(method, VAPT)
    assert "timm's model without prompts" in text
    assert (tmp_path / "memory" / "memory.png").is_file()
