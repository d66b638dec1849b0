"""The residual sum and its LayerNorm as operators: on the CPU, against autograd in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.rowwise.residual_norm import residual_norm, residual_norm_backward

OPS = torch.ops.vpt_fast
EPS, EXPERT_EPS = 0.2, 0.1
SHAPE = (2, 5, 6)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def vectors(affine: str, scaled: bool, dtype: torch.dtype) -> list[Tensor | None]:
    """Return scale, weight and bias."""
    on = scaled, affine != "none", affine == "both"
    return [rand(6, seed=s, dtype=dtype) if on[s] else None for s in range(3)]


CASES = list(itertools.product(("both", "weight", "none"), (False, True), (False, True)))


@pytest.mark.parametrize(("affine", "scaled", "summed"), CASES)
def test_gradients_are_those_of_autograd(affine: str, scaled: bool, summed: bool) -> None:
    residual, branch = rand(*SHAPE).requires_grad_(), rand(*SHAPE, seed=1).requires_grad_()
    scale, weight, bias = vectors(affine, scaled, torch.float64)
    total = residual + (branch if scale is None else branch * scale)
    y = F.layer_norm(total, (6,), weight, bias, EPS)
    grad_y, grad_sum = rand(*SHAPE, seed=2), rand(*SHAPE, seed=3)
    roots, grads = ([y, total], [grad_y, grad_sum]) if summed else ([y], [grad_y])
    expected = torch.autograd.grad(roots, (residual, branch), grads)

    found, found_y, statistics = residual_norm(
        residual.detach(), branch.detach(), scale, weight, bias, EPS, EXPERT_EPS, torch.float64
    )
    assert torch.allclose(found, total, atol=1e-12)
    assert torch.allclose(found_y, y, atol=1e-12)
    variance = total.var(-1, correction=0)
    right = torch.stack([total.mean(-1), (variance + EPS).rsqrt(), (variance + EXPERT_EPS).rsqrt()])
    assert torch.allclose(statistics, right, atol=1e-12)
    found_grads = residual_norm_backward(
        found, statistics, weight, scale, grad_y, grad_sum if summed else None, torch.float64
    )
    for have, want in zip(found_grads, expected, strict=True):
        assert torch.allclose(have, want, atol=1e-12)
    (alone,) = residual_norm_backward(
        found, statistics, weight, scale, grad_y, grad_sum if summed else None, None
    )
    assert torch.equal(alone, found_grads[0])


def test_without_a_branch_the_residual_is_the_sum() -> None:
    x = rand(*SHAPE)
    total, y, statistics = residual_norm(x, None, None, None, None, EPS, None, torch.float64)
    assert total.numel() == 0 and statistics.shape == (2, 2, 5)
    assert torch.allclose(y, F.layer_norm(x, (6,), eps=EPS), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_fp32_and_those_of_the_rounded_sum(dtype: torch.dtype) -> None:
    residual, branch = 8 + rand(*SHAPE, dtype=dtype), rand(*SHAPE, seed=1, dtype=dtype)
    total, y, statistics = residual_norm(residual, branch, None, None, None, EPS, None, dtype)
    assert total.dtype == y.dtype == dtype and statistics.dtype == torch.float32
    assert torch.allclose(statistics[0], total.float().mean(-1), rtol=1e-6)


def test_an_fp32_residual_stays_fp32_beside_a_narrow_branch() -> None:
    residual, branch = rand(*SHAPE, dtype=torch.float32), rand(*SHAPE, dtype=torch.bfloat16)
    total, y, statistics = residual_norm(
        residual, branch, None, None, None, EPS, None, torch.bfloat16
    )
    assert total.dtype == torch.float32 and y.dtype == torch.bfloat16
    grad_x, grad_branch = residual_norm_backward(
        total, statistics, None, None, y, total, torch.bfloat16
    )
    assert grad_x.dtype == torch.float32 and grad_branch.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck_of_residual_norm(dtype: torch.dtype, branch: bool, full: bool) -> None:
    scale, weight, bias = vectors("both" if full else "none", full and branch, dtype)
    added = rand(*SHAPE, seed=1, dtype=dtype) if branch else None
    eps = EXPERT_EPS if full else None
    arguments = (rand(*SHAPE, dtype=dtype), added, scale, weight, bias, EPS, eps, dtype)
    torch.library.opcheck(OPS.residual_norm, arguments)
    torch.library.opcheck(OPS.residual_norm, (*arguments, False))


@pytest.mark.parametrize("stream", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("branch_dtype", [None, torch.float32, torch.bfloat16])
def test_opcheck_of_residual_norm_backward(
    stream: torch.dtype, full: bool, branch_dtype: torch.dtype | None
) -> None:
    scale, weight, _ = vectors("both" if full else "none", full, stream)
    x, grad_y = rand(*SHAPE, dtype=stream), rand(*SHAPE, seed=1, dtype=stream)
    statistics = residual_norm(x, None, None, None, None, EPS, None, stream)[2]
    grad_sum = rand(*SHAPE, seed=2, dtype=stream) if full else None
    arguments = (x, statistics, weight, scale, grad_y, grad_sum, branch_dtype)
    torch.library.opcheck(OPS.residual_norm_backward, arguments)
    torch.library.opcheck(OPS.residual_norm_backward, (*arguments, False))


def test_nothing_that_is_given_is_written_or_returned() -> None:
    x, grad_y, grad_sum = (rand(*SHAPE, seed=s, dtype=torch.float32) for s in range(3))
    before = [t.clone() for t in (x, grad_y, grad_sum)]
    _, _, statistics = residual_norm(x, None, None, None, None, EPS, None, torch.float32)
    results = residual_norm_backward(x, statistics, None, None, grad_y, grad_sum, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, grad_y, grad_sum), strict=True))
    assert len({t.data_ptr() for t in (x, grad_y, grad_sum, *results)}) == 5
