"""Bias and activation as operators: on the CPU, against timm's modules and autograd in fp64."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from vpt_fast.ops.rowwise.activation import KINDS, activation, activation_backward

OPS = torch.ops.vpt_fast
MODULES = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "quick_gelu": timm.layers.QuickGELU(),
    "silu": nn.SiLU(),
}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def test_every_kind_has_a_module_here() -> None:
    assert set(MODULES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
def test_result_and_gradient_are_those_of_the_module(kind: str, biased: bool) -> None:
    h = torch.cat([rand(2, 5, 7), torch.linspace(-30, 30, 70).double().view(2, 5, 7)])
    bias = rand(7, seed=1) if biased else None
    leaf = h.clone().requires_grad_()
    expected = MODULES[kind](leaf if bias is None else leaf + bias)
    assert torch.allclose(activation(h, bias, kind), expected, atol=1e-12)
    grad = rand(*h.shape, seed=2)
    (right,) = torch.autograd.grad(expected, leaf, grad)
    before = h.clone()
    assert activation_backward(h, bias, grad, kind) is None
    assert torch.allclose(grad, right, atol=1e-12)
    assert torch.equal(h, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(kind: str, dtype: torch.dtype, biased: bool) -> None:
    h, bias = rand(2, 5, 7, dtype=dtype), rand(7, seed=1, dtype=dtype) if biased else None
    torch.library.opcheck(OPS.activation, (h, bias, kind))
    grad = rand(2, 5, 7, seed=2, dtype=dtype)
    torch.library.opcheck(OPS.activation_backward, (h, bias, grad, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_within_their_rounding(kind: str, dtype: torch.dtype) -> None:
    h, grad = rand(3, 70, dtype=dtype), rand(3, 70, seed=2, dtype=dtype)
    wide, wide_grad = h.double(), grad.double()
    out, right = activation(h, None, kind), activation(wide, None, kind)
    activation_backward(h, None, grad, kind)
    activation_backward(wide, None, wide_grad, kind)
    # Eager's QuickGELU rounds after each of its operations.
    bound = 8 * torch.finfo(dtype).eps
    for have, want in ((out, right), (grad, wide_grad)):
        assert have.dtype == dtype
        assert ((have.double() - want).abs() / want.abs().clamp_min(1)).max() < bound


def test_another_kind_is_refused() -> None:
    h = rand(2, 7)
    with pytest.raises(ValueError, match="'relu': use one of gelu, gelu_tanh, quick_gelu, silu"):
        activation(h, None, "relu")
    with pytest.raises(ValueError, match="'relu': use one of gelu, "):
        activation_backward(h, None, h.clone(), "relu")


@pytest.mark.parametrize("kind", KINDS)
def test_an_fp32_bias_leaves_a_narrow_hidden_layer_narrow(kind: str) -> None:
    h, bias = rand(2, 7, dtype=torch.bfloat16), rand(7, seed=1, dtype=torch.float32)
    grad = torch.ones_like(h)
    torch.library.opcheck(OPS.activation, (h, bias, kind))
    activation_backward(h, bias, grad, kind)
    assert grad.dtype == torch.bfloat16 and grad.isfinite().all()
