"""Hooks in blocks and replaced `forward`s run, and their results are used.

Compared with prompts concatenated into timm's own blocks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.changes import blocks_of, changed, changing
from support.formulations import plain_swin
from support.formulations.families import build, depth, images
from support.formulations.plain import VARIANTS, assert_same, distance, pair, redraw_prompts
from torch import nn

from vpt_fast import VAPT, VPTDeep, prompt_tune

SWIN = "tiny"

HOOKED = (
    "norm1", "attn", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.attn_drop",
    "attn.proj", "attn.proj_drop", "ls1", "drop_path1", "norm2", "mlp", "mlp.fc1", "mlp.act",
    "mlp.fc2", "ls2", "drop_path2",
)  # fmt: skip


@pytest.mark.parametrize("name", ["norm1", "attn.qkv", "attn.k_norm", "attn", "attn.norm", "mlp"])
def test_a_hook_fires_once(name: str) -> None:
    tuned, _ = pair(build("vit"), VPTDeep(3))
    seen: list[int] = []
    tuned.blocks[1].get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    tuned(images("vit"))
    assert seen == [1]


IN_WINDOWS = (
    "norm1", "attn.qkv", "attn.softmax", "attn.attn_drop", "attn.proj", "attn.proj_drop",
    "drop_path1", "norm2", "mlp", "mlp.act", "mlp.fc2", "drop_path2",
)  # fmt: skip


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["before", "after"])
@pytest.mark.parametrize("name", IN_WINDOWS)
@pytest.mark.parametrize("variant", ["linear", "shallow", "deep", "first"])
def test_hooks_in_windows(variant: str, name: str, kind: str) -> None:
    """This model's attention is not fused, so timm's softmax module is called."""
    tuned, plain = plain_swin.pair(plain_swin.build(SWIN), VARIANTS[variant](3))
    given = plain_swin.images(SWIN)
    before, calls = plain(given), []
    handles = [
        changing(kind)(block.get_submodule(name))
        for model in (tuned, plain.model)
        for block in blocks_of(model)
    ]
    parts = [block.get_submodule(name) for block in blocks_of(tuned)]
    handles += [part.register_forward_hook(lambda m, *_: calls.append(m)) for part in parts]
    expected = plain(given)
    assert distance(expected, before) > 1e-3
    assert_same(tuned, plain, tuned(given), expected)
    assert calls == parts
    for handle in handles:
        handle.remove()
    assert_same(tuned, plain, tuned(given), before)


@pytest.mark.parametrize("name", ["norm", "reduction"])
def test_hooks_that_would_see_prompts_merged(name: str) -> None:
    tuned, plain = plain_swin.pair(plain_swin.build(SWIN), VARIANTS["shallow"](3))
    given = plain_swin.images(SWIN)
    handle = changing("after")(tuned.layers[1].downsample.get_submodule(name))
    with pytest.raises(ValueError, match=rf"downsample\.{name} .* hook the downsample"):
        tuned(given)
    handle.remove()
    assert_same(tuned, plain, tuned(given), plain(given))


@pytest.mark.parametrize("swin", [False, True])
@pytest.mark.parametrize("name", ["norm1", "attn.qkv"])
def test_hooks_from_before_tuning_run(name: str, swin: bool) -> None:
    base = plain_swin.build(SWIN) if swin else build("vit")
    handles = [changing("after")(block.get_submodule(name)) for block in blocks_of(base)]
    tuned, plain = (plain_swin.pair if swin else pair)(base, VPTDeep(3))
    given = plain_swin.images(SWIN) if swin else images("vit")
    assert handles and all(b.get_submodule(name)._forward_hooks for b in blocks_of(plain.model))
    assert_same(tuned, plain, tuned(given), plain(given))


@pytest.mark.parametrize("memory", ["speed", "minimal"])
@pytest.mark.parametrize("method", [VPTDeep(2), VAPT(2, projector_dropout=0, channel_dropout=0)])
@pytest.mark.parametrize("family", ["vit", "tiny"])
def test_hooks_on_prompts(family: str, method: Any, memory: str) -> None:
    """They run once and may change the prompts; hooks on parts of experts are refused."""
    base = plain_swin.build(family) if family == SWIN else build(family)
    tuned = prompt_tune(base, method, memory).eval()
    redraw_prompts(tuned)
    given = plain_swin.images(SWIN) if family == SWIN else images(family)
    before, calls = tuned(given), []
    prompt = blocks_of(tuned)[1].prompt
    handle = prompt.register_forward_hook(lambda *_: calls.append(1))
    assert distance(tuned(given), before) <= 1e-12 and calls == [1]
    handle.remove()
    handle = prompt.register_forward_hook(lambda m, args, out: changed(out))
    assert distance(tuned(given), before) > 1e-4
    handle.remove()
    projectors = [m for n, m in tuned.named_modules() if n.endswith("prompt_projector")]
    for part in [*prompt.children(), *projectors, *(p.up for p in projectors)]:
        handle = part.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="a part of the prompt experts .* hook `prompt`"):
            tuned(given)
        handle.remove()
    assert torch.equal(tuned(given), before)


def pooled_row(model: Any) -> Any:
    return lambda x, *args, **more: x[:, 1:].sin().mean(1)


def head_of_all(model: Any) -> Any:
    return lambda x, pre_logits=False: model.head(x.sin().mean(1))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "make"), [("pool", pooled_row), ("forward_head", head_of_all)])
def test_a_replaced_pooling_or_head_gets_all_rows(name: str, make: Any, when: str) -> None:
    base = build("vit")
    if when == "before":
        setattr(base, name, make(base))
    tuned = prompt_tune(base, VPTDeep(3))
    redraw_prompts(tuned)
    given = images("vit")
    if when == "after":
        tuned(given)
        setattr(tuned, name, make(tuned))
    rows = tuned.forward_features(given)
    assert rows.shape[1] == 10
    want = tuned.head(make(tuned)(rows)) if name == "pool" else make(tuned)(rows)
    assert distance(tuned(given), want) <= 1e-12


@pytest.mark.parametrize("family", ["vit", "mae", "siglip_map"])
@pytest.mark.parametrize("variant", ["shallow", "deep"])
def test_removed_blocks(variant: str, family: str) -> None:
    tuned, plain = pair(build(family), VARIANTS[variant](depth(family)))
    tuned.blocks, plain.model.blocks = tuned.blocks[:2], plain.model.blocks[:2]
    plain.blocks = [index for index in plain.blocks if index < 2]
    given = images(family)
    expected = plain(given)
    assert distance(tuned(given), expected) <= 1e-10
    tuned.blocks.register_forward_hook(lambda *_: None)
    assert distance(tuned(given), expected) <= 1e-10


def test_a_block_in_two_places_is_refused() -> None:
    model = build("vit")
    first, second = model.blocks[0], model.blocks[1]
    model.blocks = nn.Sequential(first, second, first)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"blocks\.2 is blocks\.0 again; give each place a copy"):
        prompt_tune(model, VPTDeep(3))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("value", ["no", "yes", 1, None])
def test_cuda_graphs_must_be_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match="cuda_graphs is .*; use True or False"):
        prompt_tune(build("vit"), VPTDeep(3), cuda_graphs=value)
