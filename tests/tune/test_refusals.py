"""Models that cannot be tuned are refused by class, attribute and value, and stay unchanged."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.unchanged import assert_unchanged, snapshot
from timm.layers import Attention
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from vpt_fast import VPTDeep, VPTShallow, prompt_tune

SIZES: dict[str, Any] = {
    "img_size": 24,
    "patch_size": 8,
    "embed_dim": 64,
    "num_heads": 2,
    "depth": 3,
    "num_classes": 5,
}


class OwnAttention(Attention):
    """Attention that timm does not have."""


class OwnBlock(Block):
    """Block that timm does not have."""


class OwnTransformer(VisionTransformer):
    """Model with a forward pass of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class LowRankLinear(nn.Linear):
    """Linear with a learned low-rank update beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.zeros(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def _swin_v2() -> nn.Module:
    return timm.create_model("swinv2_tiny_window8_256", embed_dim=32, depths=(1, 1, 1, 1))


def _eva(entry: str, **arguments: Any) -> Callable[[], nn.Module]:
    sizes = {"img_size": 28, "embed_dim": 64, "num_heads": 2, "depth": 2}
    return lambda: timm.create_model(entry, **{**sizes, **arguments})


def _unfused_eva() -> nn.Module:
    model = _eva("eva02_tiny_patch14_224")()
    model.blocks[-1].attn.fused_attn = False
    return model


def _own_rope() -> nn.Module:
    model = _eva("eva02_tiny_patch14_224")()

    class OwnRope(type(model.rope)):
        pass

    model.rope.__class__ = OwnRope
    return model


def _scaled_swin() -> nn.Module:
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=32, depths=(1, 1, 1, 1))
    attn = model.layers[1].blocks[0].attn
    attn.fused_attn, attn.scale = True, 0.5
    return model


def _shared_rope() -> nn.Module:
    first = prompt_tune(_eva("eva02_tiny_patch14_224")(), VPTDeep(2))
    model = _eva("eva02_tiny_patch14_224")()
    model.rope = first.rope
    return model


def _other_prefix() -> nn.Module:
    model = _eva("vit_small_patch16_dinov3", img_size=32)()
    model.blocks[-1].attn.num_prefix_tokens = 1
    return model


def _resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=5)


def _last(change: Callable[[nn.Module], Any], **arguments: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a ViT with a changed last block.

    A careless loop would have patched the other blocks by then.
    """

    def build() -> nn.Module:
        model = VisionTransformer(**{**SIZES, **arguments})
        change(model.blocks[-1])
        return model

    return build


def _set(path: str, value: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    parent, _, name = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(parent), name, value(block))


def _gated(_block: nn.Module) -> nn.Module:
    return Attention(64, num_heads=2, qkv_bias=True, gated=True)


def _own_attention(_block: nn.Module) -> nn.Module:
    return OwnAttention(64, num_heads=2, qkv_bias=True)


def _bound_forward(block: nn.Module) -> None:
    block.forward = types.MethodType(lambda self, x, **_: x, block)


def _low_rank(path: str) -> Callable[[nn.Module], Any]:
    return _set(path, lambda block: LowRankLinear(block.get_submodule(path)))


def _transformer(**arguments: Any) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(**{**SIZES, **arguments})


def _own_block(_: nn.Module) -> None:
    """Change nothing but the block's class."""


MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "parallel_scaling": (_transformer(block_fn=ParallelScalingBlock), ["ParallelScalingBlock"]),
    "parallel_things": (_transformer(block_fn=ParallelThingsBlock), ["ParallelThingsBlock"]),
    "res_post": (_transformer(block_fn=ResPostBlock), ["ResPostBlock"]),
    "own_block": (_last(_own_block, block_fn=OwnBlock), ["OwnBlock"]),
    "differential": (_transformer(attn_layer="diff"), ["DiffAttention"]),
    "own_attention": (_last(_set("attn", _own_attention)), ["OwnAttention"]),
    "attention_norm": (_transformer(scale_attn_norm=True), ["norm", "LayerNorm"]),
    "attention_gate": (_last(_set("attn", _gated)), ["gate", "Linear"]),
    "not_fused": (_last(_set("attn.fused_attn", lambda _: False)), ["fused_attn", "False"]),
    "low_rank_qkv": (_last(_low_rank("attn.qkv")), ["qkv", "LowRankLinear"]),
    "low_rank_proj": (_last(_low_rank("attn.proj")), ["proj", "LowRankLinear"]),
    "parametrised_qkv": (
        _last(lambda block: nn.utils.parametrizations.weight_norm(block.attn.qkv)),
        ["qkv", "ParametrizedLinear"],
    ),
    "bound_forward": (_last(_bound_forward), ["forward"]),
    "own_transformer": (lambda: OwnTransformer(**SIZES), ["OwnTransformer"]),
    "eva_post_norm": (
        _eva("eva02_enormous_patch14_clip_224"),
        ["blocks.0", "EvaBlockPostNorm", "norms come"],
    ),
    "eva_grouped": (
        _eva("vit_large_patch16_sapiens2", img_size=32, num_kv_heads=(2, 1)),
        ["blocks.1.attn.num_kv_heads", "grouped-query"],
    ),
    "eva_fused_attn": (_unfused_eva, ["blocks.1.attn.fused_attn"]),
    "eva_own_rope": (_own_rope, ["rope", "OwnRope", "RotaryEmbeddingCat"]),
    "eva_shared_rope": (_shared_rope, ["rope", "another tuned model", "deepcopy"]),
    "other_scale": (
        _last(_set("attn.scale", lambda _: 0.5)),
        ["blocks.2.attn.scale", "0.5", "0.176777"],
    ),
    "swin_other_scale": (_scaled_swin, ["layers.1.blocks.0.attn.scale", "0.5"]),
    "eva_other_prefix": (_other_prefix, ["blocks.1.attn.num_prefix_tokens", "5"]),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", depth=1), ["Beit", "scores"]),
    "hiera": (lambda: timm.create_model("hiera_tiny_224"), ["Hiera", "pool tokens"]),
    "naflex": (
        lambda: timm.create_model("naflexvit_base_patch16_gap", depth=1),
        ["NaFlexVit", "mask"],
    ),
    "swin_v2": (_swin_v2, ["SwinTransformerV2", "cosine attention"]),
    "resnet": (_resnet, ["ResNet"]),
    "plain_module": (lambda: nn.Sequential(nn.Linear(2, 2)), ["Sequential"]),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("method", [VPTDeep(2), VPTShallow(2)], ids=["deep", "shallow"])
def test_models(case: str, method: Any) -> None:
    build, named = MODELS[case]
    model = build()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError)) as refusal:
        prompt_tune(model, method)
    for word in named:
        assert word in str(refusal.value), f"{word!r} is not in {str(refusal.value)!r}"
    assert_unchanged(model, before)


def test_the_block_is_named() -> None:
    model = _last(_set("attn.fused_attn", lambda _: False))()
    with pytest.raises((TypeError, ValueError), match=r"blocks\.2|block 2|blocks\[2\]"):
        prompt_tune(model, VPTDeep(2))


@pytest.mark.filterwarnings("ignore")
def test_scripted_models() -> None:
    scripted = torch.jit.trace(families.create(TOKEN), torch.zeros(1, 3, 24, 24))
    with pytest.raises((TypeError, ValueError), match="(?i)TopLevelTracedModule|script"):
        prompt_tune(scripted, VPTDeep(2))


@pytest.mark.filterwarnings("ignore")
def test_tuned_models_cannot_be_scripted() -> None:
    """Silently exporting the model without its prompts would be worse than an error."""
    tuned = prompt_tune(families.create(TOKEN), VPTDeep(2))
    with pytest.raises(Exception) as refusal:
        torch.jit.script(tuned)
    assert "bake(model)" in str(refusal.value)


@pytest.mark.parametrize("model", [None, 42, "vit_base_patch16_224", VisionTransformer])
def test_objects_that_are_no_models(model: Any) -> None:
    with pytest.raises(TypeError):
        prompt_tune(model, VPTDeep(2))


METHODS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "negative": (lambda: VPTDeep(-1), ["num_prompts", "-1"]),
    "negative_shallow": (lambda: VPTShallow(-3), ["num_prompts", "-3"]),
    "half": (lambda: VPTDeep(1.5), ["num_prompts", "1.5"]),
    "text": (lambda: VPTShallow("10"), ["num_prompts", "10"]),
    "nothing": (lambda: VPTDeep(None), ["num_prompts", "None"]),
    "dropout_one": (lambda: VPTDeep(2, dropout=1.0), ["dropout", "1.0"]),
    "dropout_above": (lambda: VPTShallow(2, dropout=1.5), ["dropout", "1.5"]),
    "dropout_below": (lambda: VPTDeep(2, dropout=-0.1), ["dropout", "-0.1"]),
    "dropout_nan": (lambda: VPTDeep(2, dropout=float("nan")), ["dropout", "nan"]),
    "dropout_text": (lambda: VPTDeep(2, dropout="0.1"), ["dropout", "0.1"]),
    "projection_zero": (lambda: VPTDeep(2, project_dim=0), ["project_dim", "0"]),
    "projection_negative": (lambda: VPTShallow(2, project_dim=-4), ["project_dim", "-4"]),
    "projection_half": (lambda: VPTDeep(2, project_dim=2.5), ["project_dim", "2.5"]),
    "block_after": (lambda: VPTDeep(2, blocks=[0, 4]), ["blocks", "4"]),
    "block_far": (lambda: VPTDeep(2, blocks=range(12)), ["blocks", "4"]),
    "block_before": (lambda: VPTDeep(2, blocks=[-5, 0]), ["blocks", "-5"]),
    "block_twice": (lambda: VPTDeep(2, blocks=[1, 2, 1]), ["blocks", "1"]),
    "no_block": (lambda: VPTDeep(2, blocks=[]), ["blocks"]),
    "empty_range": (lambda: VPTDeep(2, blocks=range(3, 1)), ["blocks"]),
    "block_half": (lambda: VPTDeep(2, blocks=[0.5]), ["blocks", "0.5"]),
    "block_text": (lambda: VPTDeep(2, blocks=["0"]), ["blocks", "0"]),
    "block_number": (lambda: VPTDeep(2, blocks=2), ["blocks", "2"]),
    "pooling_tokens": (lambda: VPTDeep(2, pool_prompts=True), ["pool_prompts", "token"]),
    "pooling_shallow": (lambda: VPTShallow(2, pool_prompts=True), ["pool_prompts", "token"]),
    "name": (lambda: "vpt-deep", ["vpt-deep", "VPTDeep"]),
    "class": (lambda: VPTDeep, ["VPTDeep"]),
    "none": (lambda: None, ["None"]),
    "mapping": (lambda: {"num_prompts": 2}, ["num_prompts"]),
}


@pytest.mark.parametrize("case", METHODS)
def test_methods(case: str) -> None:
    build, named = METHODS[case]
    model = families.build(TOKEN)
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError)) as refusal:
        prompt_tune(model, build())
    for word in named:
        assert word in str(refusal.value), f"{word!r} is not in {str(refusal.value)!r}"
    assert_unchanged(model, before)


def test_bounds_are_accepted() -> None:
    """The values next to the refused ones are accepted."""
    for method in (VPTDeep(0), VPTDeep(1, dropout=0.99), VPTDeep(1, project_dim=1, blocks=[3])):
        prompt_tune(families.build(TOKEN), method)
    prompt_tune(families.build(AVERAGE), VPTDeep(2, pool_prompts=True))
    prompt_tune(families.build("headless"), VPTShallow(1))


@pytest.mark.parametrize("memory", ["", "fast", None, 1])
def test_unknown_memory(memory: Any) -> None:
    model = families.build(TOKEN)
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="memory") as refusal:
        prompt_tune(model, VPTDeep(2), memory=memory)
    assert repr(memory) in str(refusal.value)
    assert_unchanged(model, before)


def test_a_pooling_that_is_set_later() -> None:
    """`pool_prompts` checks the pooling again when the head is replaced."""
    tuned = prompt_tune(families.build(AVERAGE), VPTDeep(2, pool_prompts=True))
    with pytest.raises((TypeError, ValueError), match="pool_prompts"):
        tuned.reset_classifier(5, "token")
        tuned(families.images(AVERAGE))
