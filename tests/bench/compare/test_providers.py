"""All providers compute the same function: the same logits, and the same gradients by name."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.providers.models import (
    COMPILED,
    CUDNN,
    CUDNN_FIRST,
    EAGER,
    GPU_PROVIDERS,
    OURS,
    PROVIDERS,
    PUBLISHED,
    WITHOUT,
    gradients,
    provide,
    set_values,
    trained,
    values,
)  # fmt: skip
from vpt_fast import VAPT, VPTDeep
from vpt_fast.models.tuned import blocks_of

METHODS = {
    "vpt-deep": VPTDeep(3),
    "vapt": VAPT(3, projector_dropout=0.0, channel_dropout=0.0),
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=5).to(dtype)


def step(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    logits = module(IMAGES.to(dtype))
    F.cross_entropy(logits, torch.arange(3)).backward()
    return logits.detach(), gradients(module)


def compare(name: str, method: Any, dtype: torch.dtype, tolerance: float) -> None:
    truth = provide("concat", vit(), method)
    module = provide(name, vit(dtype), method)
    set_values(module, values(truth))
    logits, found = step(module, dtype)
    wanted_logits, wanted = step(truth, torch.float64)
    assert set(found) == set(wanted)
    torch.testing.assert_close(logits.double(), wanted_logits, rtol=tolerance, atol=tolerance)
    for key, gradient in wanted.items():
        error = (found[key].double() - gradient).norm() / gradient.norm()
        assert error < tolerance, key


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["keys_concat", OURS])
def test_equal_in_fp64(name: str, method: str) -> None:
    compare(name, METHODS[method], torch.float64, 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_the_published_formulation_is_fp32_with_an_explicit_softmax(method: str) -> None:
    module: Any = provide(PUBLISHED, vit(torch.bfloat16), METHODS[method])
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not any(block.attn.fused_attn for block in module.model.blocks)
    compare(PUBLISHED, METHODS[method], torch.float32, 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("name", ["concat_compiled", "keys_concat_compiled"])
def test_compiled_providers_are_equal_too(name: str) -> None:
    compare(name, METHODS["vpt-deep"], torch.float64, 1e-10)


def test_without_prompts_the_gradient_flows_through_every_block() -> None:
    module = provide(WITHOUT, vit(), VPTDeep(3))
    assert set(trained(module)) == {
        "blocks.0.norm1.weight", "blocks.0.norm1.bias", "head.weight", "head.bias",
    }  # fmt: skip
    _, found = step(module, torch.float64)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("name", EAGER)
def test_with_no_prompts_the_gradient_flows_through_every_block(name: str) -> None:
    wanted_logits, wanted = step(provide(WITHOUT, vit(), VPTDeep(0)), torch.float64)
    logits, found = step(provide(name, vit(torch.float32), VPTDeep(0)), torch.float32)
    torch.testing.assert_close(logits.double(), wanted_logits, rtol=1e-4, atol=1e-5)
    assert set(found) == set(wanted)
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() < 1e-4 * gradient.norm(), key


def test_prompt_dropout_draws_a_mask_per_image() -> None:
    module: Any = provide("keys_concat", vit(), VPTDeep(3, dropout=0.5))
    rows = module.source.rows()(0, torch.empty(2, 1, 64))
    assert rows.shape == (2, 3, 64) and not torch.equal(rows[0], rows[1])
    assert module.eval().source.rows()(0, torch.empty(2, 1, 64)).shape == (1, 3, 64)


@pytest.mark.parametrize("name", [PUBLISHED, OURS])
def test_swin_in_fp64(name: str) -> None:
    def swin() -> Any:
        torch.manual_seed(0)
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, num_classes=5, embed_dim=32,
            depths=(1, 2), num_heads=(2, 4), window_size=3,
        )  # fmt: skip
        return model.double()

    truth, module = (provide(n, swin(), VPTDeep(3)) for n in ("concat", name))
    assert {block.attn.fused_attn for block in blocks_of(truth.model)} == {True}
    module = module.double()
    set_values(module, values(truth))
    logits, found = step(module, torch.float64)
    wanted_logits, wanted = step(truth, torch.float64)
    assert set(found) == set(wanted) and "layers.1.blocks.1.prompt.tokens" in found
    assert torch.allclose(logits, wanted_logits, rtol=1e-10)
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() < 1e-10 * gradient.norm(), key
    with pytest.raises(ValueError, match="keys_concat is for models without stages"):
        provide("keys_concat", swin(), VPTDeep(3))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"'ours'; choose one of published"):
        provide("ours", vit(), VPTDeep(3))
    with pytest.raises(ValueError, match=r"leave out `blocks`"):
        provide("keys_concat", vit(), VPTDeep(3, blocks=range(2)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CUDNN)
def test_providers_that_prefer_cudnn_are_equal_too(name: str, method: str) -> None:
    compare(name, METHODS[method], torch.float64, 1e-10)


def test_cudnn_is_preferred_inside_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    attention = F.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(_order())
        return attention(*args, **kwargs)

    before = _order()
    module = provide("concat_cudnn", vit(), METHODS["vpt-deep"])
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    module(IMAGES.double())
    wanted = [_number(kernel) for kernel in CUDNN_FIRST]
    assert seen and all(order[: len(wanted)] == wanted for order in seen)
    assert _order() == before and before[0] != wanted[0]


def _order() -> list[int]:
    """Return PyTorch's order of kernels for attention, the first choice first."""
    return [int(kernel) for kernel in torch._C._get_sdp_priority_order()]


def _number(kernel: Any) -> int:
    return int(kernel.value if hasattr(kernel, "value") else kernel)


def test_a_memory_mode_applies_to_ours() -> None:
    module: Any = provide(OURS, vit(), VPTDeep(3), memory="lean")
    assert {block.memory for block in module.blocks} == {"lean"}


def test_every_name_is_provided() -> None:
    assert len(set(PROVIDERS)) == 7 and set(EAGER) < set(PROVIDERS)
    assert set(GPU_PROVIDERS) == {*PROVIDERS, *CUDNN, *COMPILED} and len(GPU_PROVIDERS) == 11
