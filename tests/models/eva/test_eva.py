"""A tuned Eva computes the same function as prompts concatenated into timm's blocks, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.formulations import eva_families as families
from support.formulations.plain import distance, gradients, tuned_gradients
from support.formulations.plain_eva import pair
from torch import Tensor

from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
    VPTDeep,
    VPTShallow,
)
from vpt_fast.models.fusion.fusible import can_fuse
from vpt_fast.ops.memory_modes import MEMORY_MODES

_STILL = {"projector_dropout": 0.0, "channel_dropout": 0.0}
METHODS: dict[str, Any] = {
    "deep": VPTDeep(3),
    "first": VPTDeep(3, blocks=[0]),
    "shared_projected": VPTDeep(2, shared=True, project_dim=6),
    "shallow": VPTShallow(3),
    "shallow_many": VPTShallow(20),
    "vapt": VAPT(3, **_STILL),
    "vapt_paper": VAPT(3, variant="paper", **_STILL),
    "linear": LinearProbe(),
    "adapter": AdapterTuning(4),
    "bias": BiasTuning(),
    "partial": PartialTuning(1),
    "full": FullTuning(),
    "mlp": MLPHead(2),
}
POOLED = VPTDeep(3, pool_prompts=True)
DEEP_IN_EVERY_BLOCK = ("dinov3", "eva02_glu", "pe_core", "rope_mixed")


def method_of(family: str, name: str) -> Any:
    """Return a method; of VAPT, with a kernel that fits the family's patches."""
    method = METHODS[name]
    if isinstance(method, VAPT) and family == "one_patch":
        return replace(method, kernel_size=1)
    return method


def assert_same(tuned: Any, plain: Any, output: Tensor, expected: Tensor) -> None:
    """Assert equal logits, the same trained names and equal gradients, to 1e-10.

    A gradient that is 0 but for rounding is compared with the largest of all.
    """
    assert distance(output, expected) <= 1e-10
    ours, theirs = tuned_gradients(tuned, output), gradients(expected, plain.trained)
    assert set(ours) == set(theirs)
    largest = max(float(right.abs().max()) for right in theirs.values())
    for name, right in theirs.items():
        if right.abs().max() > 1e-9 * largest:
            assert distance(ours[name], right) <= 1e-10, name
        else:
            assert (ours[name] - right).abs().max() <= 1e-12 * largest, name


@pytest.mark.covering
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_logits_and_gradients(family: str, method: str) -> None:
    tuned, plain = pair(families.build(family), method_of(family, method))
    image = families.images(family)
    expected = plain(image)
    tuned.train()
    assert_same(tuned, plain, tuned(image), expected)
    tuned.eval()
    with torch.no_grad():
        assert distance(tuned(image), expected) <= 1e-10
    with torch.inference_mode():
        assert distance(tuned(image), expected) <= 1e-10


@pytest.mark.covering
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("method", ["deep", "shallow", "vapt", "linear", "adapter"])
@pytest.mark.parametrize("family", ["dinov3", "eva02_glu", "eva02_clip", "pe_core", "rope_mixed"])
def test_memory_modes(family: str, method: str, memory: str) -> None:
    tuned, plain = pair(families.build(family), METHODS[method], memory)
    image = families.images(family)
    assert_same(tuned.train(), plain, tuned(image), plain(image))


@pytest.mark.parametrize("family", ["dinov3", "dinov3_qkvb", "eva02_glu", "pe_core", "max_pool"])
def test_pooled_prompts(family: str) -> None:
    tuned, plain = pair(families.build(family), POOLED)
    image = families.images(family)
    assert_same(tuned, plain, tuned(image), plain(image))


@pytest.mark.parametrize("family", DEEP_IN_EVERY_BLOCK)
def test_an_image_of_another_size(family: str) -> None:
    tuned, plain = pair(families.build(family, dynamic_img_size=True), VPTDeep(3))
    for size in ((16, 40), (40, 16), (24, 24)):
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        assert_same(tuned, plain, tuned(image), plain(image))


@pytest.mark.parametrize("family", DEEP_IN_EVERY_BLOCK)
@pytest.mark.parametrize("method", [VPTDeep(3, blocks=[0, 2]), VPTShallow(2)], ids=str)
def test_masks(family: str, method: Any) -> None:
    tuned, plain = pair(families.build(family, depth=3), method)
    image = families.images(family)
    rows = tuned.num_prefix_tokens + 9
    mask = torch.rand(rows, rows, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[:, 0] = True
    found = tuned(image, attn_mask=mask)
    assert_same(tuned, plain, found, plain(image, mask))
    assert distance(found, plain(image)) > 1e-3


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("family", DEEP_IN_EVERY_BLOCK)
@pytest.mark.parametrize("method", [VPTDeep(3, blocks=[0]), VPTShallow(2), VPTDeep(2)], ids=str)
def test_intermediates(family: str, method: Any, output_fmt: str) -> None:
    tuned, plain = pair(families.build(family), method)
    image = families.images(family)
    with torch.no_grad():
        outputs = plain.block_outputs(image)
        features, found = tuned.forward_intermediates(
            image, return_prefix_tokens=True, norm=True, output_fmt=output_fmt
        )
        assert distance(features, plain.features(image)) <= 1e-10
        only = tuned.forward_intermediates(image, intermediates_only=True, output_fmt="NLC")
    assert len(found) == len(only) == len(outputs)
    prefix = tuned.num_prefix_tokens
    for (patches, tokens), plain_only, rows in zip(found, only, outputs, strict=True):
        if output_fmt == "NCHW":
            patches = patches.flatten(2).transpose(1, 2)
        normed = plain.model.norm(rows)
        assert distance(tokens, normed[:, :prefix]) <= 1e-10
        assert distance(patches, normed[:, prefix:]) <= 1e-10
        assert distance(plain_only, rows[:, prefix:]) <= 1e-10


@pytest.mark.parametrize("return_prefix", [False, True])
def test_intermediates_without_prefix_tokens(return_prefix: bool) -> None:
    tuned, plain = pair(families.build("pe_core_gigantic"), VPTDeep(3, blocks=[0]))
    image = families.images("pe_core_gigantic")
    with torch.no_grad():
        features, found = tuned.forward_intermediates(
            image, return_prefix_tokens=return_prefix, output_fmt="NLC"
        )
        assert distance(features, plain.features(image)) <= 1e-10
        for patches, rows in zip(found, plain.block_outputs(image), strict=True):
            assert distance(patches, rows) <= 1e-10


@pytest.mark.parametrize("memory", ["speed", "minimal"])
@pytest.mark.parametrize("mlp", [{}, {"swiglu_mlp": True}, {"swiglu_mlp": True, "scale_mlp": True}])
def test_an_empty_batch(mlp: dict[str, Any], memory: str) -> None:
    """With AttentionRope, whose own forward takes one as well."""
    tuned, _ = pair(families.build("rope", **mlp), VPTDeep(3), memory)
    output = tuned.train()(families.images("rope", batch=0))
    assert output.shape == (0, families.CLASSES)
    output.sum().backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("family", DEEP_IN_EVERY_BLOCK)
def test_checkpointing_and_a_hook_on_a_block(family: str) -> None:
    tuned, plain = pair(families.build(family), VPTDeep(3))
    image, seen = families.images(family), []
    tuned.set_grad_checkpointing()
    tuned.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_same(tuned, plain, tuned(image), plain(image))
    assert distance(seen[0], plain.block_outputs(image)[1]) <= 1e-10


@pytest.mark.parametrize("family", DEEP_IN_EVERY_BLOCK)
def test_a_hook_on_attention_sees_what_timm_computes(family: str) -> None:
    tuned, plain = pair(families.build(family), VPTDeep(3))
    image, seen = families.images(family), []
    for model in (tuned, plain.model):
        model.blocks[1].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert_same(tuned, plain, tuned(image), plain(image))
    assert distance(seen[0], seen[1]) <= 1e-10


def test_a_gated_mlp_with_one_bias_is_not_fused() -> None:
    """The kernel adds both biases or none."""
    base = families.build("dinov3_swiglu")
    for block in base.blocks:
        block.mlp.fc1_x.bias = None
    tuned, plain = pair(base, VPTDeep(3))
    assert not any(map(can_fuse, tuned.blocks))
    image = families.images("dinov3_swiglu")
    assert_same(tuned, plain, tuned(image), plain(image))
