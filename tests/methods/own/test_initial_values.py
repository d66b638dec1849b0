"""Initial values from images: SPT's, VIPAMIN's and BPT's, against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.formulations import families, plain_swin
from support.formulations.plain import distance
from torch import Tensor

from vpt_fast import BPT, VPTDeep, initialise, prompt_tune
from vpt_fast.methods import INITS
from vpt_fast.modules import initial_values


def started(method: Any, family: str = "dinov2_registers") -> tuple[Any, list[Tensor], Any]:
    """Return an initialised model, inputs (images, N, D) of its blocks and the prompts before."""
    base: Any = families.build(family)
    inputs: list[Tensor] = []
    images = families.images(family, batch=4)
    handles = [b.register_forward_pre_hook(lambda m, a: inputs.append(a[0])) for b in base.blocks]
    with torch.no_grad():
        base(images)
    for handle in handles:
        handle.remove()
    tuned: Any = prompt_tune(base, method)
    before = [{k: t.clone() for k, t in b.prompt.state_dict().items()} for b in tuned.blocks]
    torch.manual_seed(0)
    assert initialise(tuned, [images[:3], images[3:]]) == 4
    return tuned, inputs, before


@pytest.mark.parametrize("init", ["spt-random", "spt-mean", "spt-max"])
def test_spt(init: str) -> None:
    """Rows of the block's own patches; windows of them, in the images' order."""
    tuned, inputs, _ = started(VPTDeep(5, init=init))
    prefix = tuned.num_prefix_tokens
    assert prefix == 5
    for block, x in zip(tuned.blocks, inputs, strict=True):
        rows, found = x[:, prefix:].flatten(0, 1), block.prompt.tokens
        if init == "spt-random":
            nearest = torch.cdist(found, rows).min(1)
            assert nearest.values.max() <= 1e-6 and len(set(nearest.indices.tolist())) == 5
            continue
        sizes = [len(rows) // 5 + (i < len(rows) % 5) for i in range(5)]
        for prompt, window in zip(found, rows.split(sizes), strict=True):
            want = window.mean(0) if init == "spt-mean" else window.max(0).values
            assert distance(prompt, want) <= 1e-12


def test_vipamin() -> None:
    tuned, inputs, before = started(VPTDeep(3, init="vipamin"))
    for block, x, was in zip(tuned.blocks, inputs, before, strict=True):
        rows, tokens = x[:, tuned.num_prefix_tokens :].flatten(0, 1), was["tokens"]
        attn, width = block.attn, x.shape[-1]
        with torch.no_grad():
            keys, own = (attn.qkv(block.norm1(t))[:, width : 2 * width] for t in (rows, tokens))
        written = attn.proj.weight @ attn.qkv.weight[2 * width :]
        values, vectors = torch.linalg.eigh(written @ written.T)
        values, vectors = values.flip(0), vectors.flip(1)
        count = next(i for i in range(1, width + 1) if values[:i].sum() >= 0.9 * values.sum())
        span = vectors[:, :count]
        for found, token, key in zip(block.prompt.tokens, tokens, own, strict=True):
            cosines = torch.cosine_similarity(keys, key[None])
            matched = rows[cosines.argsort(descending=True)[:32]].mean(0)
            outside = token - span @ (span.T @ token)
            outside = outside / outside.norm() * matched.norm()
            assert distance(found, 0.5 * matched + 0.5 * outside) <= 1e-6


def test_bpt_starts_white() -> None:
    """B whitens W_q W_k^T X^T: what it maps to has the identity as covariance, times a factor."""
    tuned, inputs, before = started(BPT(4, rank=6))
    for block, x, was in zip(tuned.blocks, inputs, before, strict=True):
        width = x.shape[-1]
        with torch.no_grad():
            y = block.norm1(x).flatten(0, 1)
            w_q, w_k = (block.attn.qkv.weight[i * width : (i + 1) * width].T for i in (0, 1))
            interaction = w_q @ w_k.T @ y.T  # (D, rows)
            covariance = torch.cov(block.prompt.b @ interaction)
        factor = covariance.diagonal().mean()
        assert distance(covariance / factor, torch.eye(6, dtype=x.dtype)) <= 1e-6
        assert torch.equal(block.prompt.a, was["a"])
        assert (
            distance(block.prompt.b.square().sum(0).mean(), torch.ones((), dtype=x.dtype)) <= 1e-9
        )
        # The directions of the largest variances.
        largest = torch.linalg.eigh(torch.cov(interaction)).eigenvectors[:, -6:]
        inside = block.prompt.b @ largest @ largest.T
        assert distance(inside, block.prompt.b) <= 1e-6


def test_more_prompts_than_tokens_are_refused() -> None:
    tuned = prompt_tune(families.build("vit"), VPTDeep(20, init="spt-mean"))
    with pytest.raises(ValueError, match="20 prompts need at least as many tokens"):
        initialise(tuned, [families.images("vit")])


@pytest.mark.parametrize("init", INITS)
def test_every_name_and_swin(init: str) -> None:
    assert set(INITS) == {"uniform", *initial_values.INITIAL_VALUES}
    tuned: Any = prompt_tune(plain_swin.build("tiny"), VPTDeep(2, init=init))
    before = {n: p.clone() for n, p in tuned.named_parameters() if "prompt" in n}
    count = initialise(tuned, [plain_swin.images("tiny")])
    changed = [n for n, p in tuned.named_parameters() if n in before and not p.equal(before[n])]
    assert (count, changed) == ((0, []) if init == "uniform" else (2, [*before]))


def test_settings() -> None:
    with pytest.raises(ValueError, match="init must be one of uniform, .*; got 'kmeans'"):
        VPTDeep(3, init="kmeans")
    for fields in ({"shared": True}, {"project_dim": 4}):
        with pytest.raises(ValueError, match="init='spt-max' sets each block's own prompts"):
            VPTDeep(3, init="spt-max", **fields)  # type: ignore[arg-type]
