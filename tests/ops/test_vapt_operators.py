"""VAPT's three operators: their gradients, and what PyTorch demands of custom operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vpt_fast.ops.experts.operator import FeatureInputs, fold_convolution
from vpt_fast.ops.experts.reference import features

OPS = torch.ops.vpt_fast
DTYPES = [torch.float32, torch.float64]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_(more.get("grad", True))


@pytest.mark.parametrize(("grid", "size"), [((3, 3), 2), ((2, 4), 1), ((3, 5), 3), ((1, 1), 1)])
def test_fold_convolution(grid: tuple[int, int], size: int) -> None:
    """The mixing weight times a map is the projector of the convolved map."""
    positions = (grid[0] - size + 1) * (grid[1] - size + 1)
    weight, kernel = rand(2, positions), rand(1, 1, size, size, seed=1)
    mixing_weight, mixing_sum = fold_convolution(weight, kernel, grid)
    image = rand(4, 1, *grid, seed=2)
    expected = torch.conv2d(image, kernel).flatten(1) @ weight.T
    assert torch.allclose(
        image.flatten(1) @ mixing_weight[:, : grid[0] * grid[1]].T, expected, atol=1e-12
    )
    assert torch.allclose(mixing_sum, mixing_weight.sum(1), atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda weight, kernel: fold_convolution(weight, kernel, grid), (weight, kernel)
    )


class _NormAndMix(torch.autograd.Function):
    """A LayerNorm and the mixed patches of the same rows, with the operators' gradients."""

    @staticmethod
    def forward(ctx, x, mix, weight, bias, patches):  # type: ignore[no-untyped-def]
        _, y, statistics = OPS.residual_norm(x, None, None, weight, bias, 0.2, 0.1, x.dtype)
        ctx.save_for_backward(x, mix, weight, statistics)
        ctx.patches = patches
        return y, OPS.mix_tokens(x, mix, patches, statistics)

    @staticmethod
    def backward(ctx, grad_y, grad_mixed):  # type: ignore[no-untyped-def]
        x, mix, weight, statistics = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        found = iter(
            OPS.mix_tokens_backward(
                x, mix, ctx.patches, weight, statistics, grad_y, grad_mixed, None, *needs
            )
        )
        return *(next(found) if need else None for need in needs), None, None, None


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("patches", [1, 4, 5])
def test_gradcheck_of_mix_tokens(affine: str, patches: int) -> None:
    x, mixing_weight = rand(2, 5, 6), rand(3, patches, seed=1)
    weight = None if affine == "none" else rand(6, seed=2, grad=False)
    bias = rand(6, seed=3, grad=False) if affine == "both" else None

    def function(x: Tensor, mixing_weight: Tensor) -> tuple[Tensor, ...]:
        return _NormAndMix.apply(x, mixing_weight, weight, bias, patches)

    assert torch.autograd.gradcheck(function, (x, mixing_weight))
    assert torch.autograd.gradcheck(lambda x: function(x, mixing_weight.detach()), (x,))
    assert torch.autograd.gradcheck(
        lambda mixing_weight: function(x.detach(), mixing_weight), (mixing_weight,)
    )


def feature_inputs(dtype: torch.dtype, masks: bool, bias: bool) -> list[Any]:
    """Return the fields of `FeatureInputs`."""

    def mask(*shape: int) -> Tensor:
        return 1 + rand(*shape, seed=9, dtype=dtype, grad=False).tanh()

    return [
        rand(2, 3, 5, dtype=dtype),
        rand(3, seed=1, dtype=dtype),
        rand(5, seed=2, dtype=dtype),
        rand(5, seed=3, dtype=dtype),
        rand(3, seed=4, dtype=dtype) if bias else None,
        mask(2, 5) if masks else None,
        rand(4, 5, seed=5, dtype=dtype),
        rand(5, 4, seed=6, dtype=dtype),
        mask(2, 3, 4) if masks else None,
    ]


class _Features(torch.autograd.Function):
    """norm1(P), with the operators' gradients."""

    @staticmethod
    def forward(ctx, residual, norm1_weight, norm1_bias, *inputs):  # type: ignore[no-untyped-def]
        affine = norm1_weight, norm1_bias
        out, *statistics = OPS.project_features(*inputs, residual, *affine, 0.1, torch.float64)
        ctx.residual = residual
        ctx.save_for_backward(norm1_weight, *inputs, *statistics)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        norm1_weight, *inputs, mean, rstd = ctx.saved_tensors
        found = iter(
            OPS.project_features_backward(
                *inputs, ctx.residual, norm1_weight, mean, rstd, grad.contiguous()
            )
        )
        constant = FeatureInputs._fields.index("channel_mask"), len(inputs) - 1
        grads = [None if t is None or i in constant else next(found) for i, t in enumerate(inputs)]
        return None, None, None, *grads


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["affine", "plain", "none"])
def test_gradcheck_of_project_features(masks: bool, bias: bool, residual: bool, norm: str) -> None:
    inputs = feature_inputs(torch.float64, masks, bias)
    constants = [rand(5, seed=s, grad=False) if norm == "affine" else None for s in (7, 8)]
    trained = [t for t in inputs if t is not None and t.requires_grad]

    def function(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        values = [next(given) if t is not None and t.requires_grad else t for t in inputs]
        if norm == "none":
            return features(FeatureInputs(*values), residual)
        return _Features.apply(residual, *constants, *values)

    assert torch.autograd.gradcheck(function, trained)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [9, 16])
def test_opcheck_of_fold_convolution(dtype: torch.dtype, padded: int) -> None:
    weight, kernel = rand(3, 4, dtype=dtype), rand(1, 1, 2, 2, seed=1, dtype=dtype)
    torch.library.opcheck(OPS.fold_convolution, (weight, kernel, 3, 3, padded))
    grads = rand(3, padded, seed=2, dtype=dtype, grad=False), rand(3, dtype=dtype, grad=False)
    arguments = (weight.detach(), kernel.detach(), *grads, 3, 3)
    torch.library.opcheck(OPS.fold_convolution_backward, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_opcheck_of_mix_tokens(dtype: torch.dtype, affine: bool, summed: bool) -> None:
    x, mixing_weight = (
        rand(2, 5, 6, dtype=dtype, grad=False),
        rand(3, 4, seed=1, dtype=dtype, grad=False),
    )
    weight = rand(6, seed=2, dtype=dtype, grad=False) if affine else None
    mean, rstd = x.mean(2), x.var(2, correction=0).rsqrt()
    statistics = torch.stack([mean, rstd, rstd])
    torch.library.opcheck(OPS.mix_tokens, (x, mixing_weight, 4, statistics))
    grads = [rand(*shape, seed=4, dtype=dtype, grad=False) for shape in ((2, 5, 6), (2, 3, 6))]
    total = rand(2, 5, 6, seed=5, dtype=dtype, grad=False) if summed else None
    for needs_x, needs_mixing_weight in ((True, True), (True, False), (False, True)):
        arguments = (x, mixing_weight, 4, weight, statistics, *grads, total)
        torch.library.opcheck(OPS.mix_tokens_backward, (*arguments, needs_x, needs_mixing_weight))


@pytest.mark.parametrize(
    ("dtype", "masks", "bias", "affine"),
    [
        (torch.float32, False, False, False),
        (torch.float32, True, True, True),
        (torch.float64, True, False, True),
        (torch.float64, False, True, False),
    ],
)
def test_opcheck_of_project_features(
    dtype: torch.dtype, masks: bool, bias: bool, affine: bool
) -> None:
    inputs = feature_inputs(dtype, masks, bias)
    constants = [rand(5, seed=s, dtype=dtype, grad=False) if affine else None for s in (7, 8)]
    still = [None if t is None else t.detach() for t in inputs]
    torch.library.opcheck(OPS.project_features, (*still, bias, *constants, 1e-6, dtype))
    _, mean, rstd = OPS.project_features(*still, bias, *constants, 1e-6, dtype)
    grad = rand(2, 3, 5, seed=10, dtype=dtype, grad=False)
    torch.library.opcheck(
        OPS.project_features_backward, (*still, bias, constants[0], mean, rstd, grad)
    )


def test_the_result_has_the_dtype_that_is_asked_for() -> None:
    inputs = [None if t is None else t.detach() for t in feature_inputs(torch.float32, False, True)]
    for dtype in (torch.bfloat16, torch.float16):
        torch.library.opcheck(OPS.project_features, (*inputs, True, None, None, 1e-6, dtype))
        assert OPS.project_features(*inputs, True, None, None, 1e-6, dtype)[0].dtype == dtype
