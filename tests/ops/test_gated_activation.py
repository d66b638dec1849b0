"""Gated activation as operators: on the CPU, against timm's modules and autograd in fp64."""

from __future__ import annotations

import pytest
import torch
from timm.layers import GluMlp
from torch import Tensor, nn

from vpt_fast.ops.rowwise.activation import KINDS
from vpt_fast.ops.rowwise.gated_activation import gated, gated_backward

OPS = torch.ops.vpt_fast
LAYERS = {
    "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "silu": nn.SiLU,
}  # fmt: skip


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_result_and_gradient_are_those_of_timms_mlp(kind: str, last: bool, biased: bool) -> None:
    mlp = GluMlp(5, 14, act_layer=LAYERS[kind], gate_last=last).double()
    mlp.fc1 = mlp.fc2 = nn.Identity()
    h = rand(2, 5, 14)
    biases = (rand(7, seed=1), rand(7, seed=2)) if biased else (None, None)
    leaf = h.clone().requires_grad_()
    shifted = leaf
    if biased:
        shifted = leaf + torch.cat(biases[::-1] if last else biases)
    expected = mlp(shifted)
    assert torch.allclose(gated(h, *biases, kind, last), expected, atol=1e-12)
    grad = rand(2, 5, 7, seed=3)
    (right,) = torch.autograd.grad(expected, leaf, grad)
    before = h.clone(), grad.clone()
    assert torch.allclose(gated_backward(h, *biases, grad, kind, last), right, atol=1e-12)
    assert torch.equal(h, before[0]) and torch.equal(grad, before[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(kind: str, dtype: torch.dtype, biased: bool) -> None:
    h, grad = rand(2, 5, 14, dtype=dtype), rand(2, 5, 7, seed=3, dtype=dtype)
    bias = (rand(7, seed=1, dtype=dtype), rand(7, seed=2)) if biased else (None, None)
    torch.library.opcheck(OPS.gated, (h, *bias, kind, False))
    torch.library.opcheck(OPS.gated_backward, (h, *bias, grad, kind, True))
    assert gated(h, *bias, kind, False).dtype == dtype


def test_another_kind_is_refused() -> None:
    h = rand(2, 14)
    with pytest.raises(ValueError, match="'relu': use one of gelu, "):
        gated(h, None, None, "relu", False)
    with pytest.raises(ValueError, match="'relu': use one of gelu, "):
        gated_backward(h, None, None, rand(2, 7), "relu", False)
