"""Rotation of queries and keys as an operator: on the CPU, against timm and autograd in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from vpt_fast.ops.rowwise.rotation import rotate, rotated

OPS = torch.ops.vpt_fast
FP64 = torch.float64


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=FP64).to(dtype)


def timms(heads: Tensor, table: Tensor, half: bool) -> Tensor:
    """Return what timm computes of heads (B, N, H, d) whose last rows the table is of."""
    first = heads.shape[1] - table.shape[-2]
    rows = apply_rot_embed_cat(heads[:, first:].transpose(1, 2), table, half=half)
    return torch.cat([heads[:, :first], rows.transpose(1, 2)], 1)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("rows", "count"), [(7, 4), (4, 4), (3, 1), (5, 0)])
@pytest.mark.parametrize(("packed", "parts"), [(3, 2), (2, 1), (1, 1), (3, 0)])
def test_rows_and_parts(
    half: bool, per_head: bool, rows: int, count: int, packed: int, parts: int
) -> None:
    heads = rand(2, rows, packed, 3, 8)
    table = rand(*((3,) if per_head else ()), count, 16, seed=1)
    found = heads.clone()
    assert rotate(found, table, parts, half, False) is None
    for part in range(packed):
        own = heads[:, :, part]
        expected = timms(own, table, half) if part < parts else own
        assert torch.allclose(found[:, :, part], expected, atol=1e-12)
        assert torch.allclose(rotated(own, table, half), timms(own, table, half), atol=1e-12)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_the_inverse_is_the_gradient(half: bool, per_head: bool) -> None:
    heads = rand(2, 6, 1, 3, 8).requires_grad_()
    table = rand(*((3,) if per_head else ()), 4, 16, seed=1)
    grad = rand(2, 6, 1, 3, 8, seed=2)
    (expected,) = torch.autograd.grad(timms(heads[:, :, 0], table, half), heads, grad[:, :, 0])
    found = grad.clone()
    rotate(found, table, 1, half, True)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("half", [False, True])
def test_derivatives_of_the_differentiable_form(half: bool) -> None:
    heads, table = rand(1, 3, 2, 4).requires_grad_(), rand(2, 2, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, t: rotated(h, t, half), (heads, table))
    batched = rand(2, 1, 3, 8, seed=3)
    heads = rand(2, 5, 3, 4)
    assert torch.allclose(rotated(heads, batched, half), timms(heads, batched, half), atol=1e-12)
    assert rotated(heads, None, half) is heads


@pytest.mark.parametrize("dtype", [torch.float32, FP64, torch.bfloat16])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(dtype: torch.dtype, half: bool, inverse: bool) -> None:
    table = rand(4, 16, seed=1, dtype=FP64 if dtype == FP64 else torch.float32)
    torch.library.opcheck(OPS.rotate, (rand(2, 6, 3, 3, 8, dtype=dtype), table, 2, half, inverse))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", [False, True])
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype, half: bool) -> None:
    heads, table = rand(2, 6, 3, 3, 8, dtype=dtype), rand(4, 16, seed=1, dtype=torch.float32)
    exact, found = heads.double(), heads.clone()
    rotate(exact, table.double(), 2, half, False)
    rotate(found, table, 2, half, False)
    bound = torch.finfo(dtype).eps / 2 * exact.abs().clamp_min(1) + 1e-6
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("shape", "parts", "message"),
    [
        ((4, 14), 2, "does not fit heads"),
        ((8, 16), 2, "does not fit heads"),
        ((2, 4, 16), 2, "does not fit heads"),
        ((2, 3, 4, 16), 2, "does not fit heads"),
        ((4, 16), 4, "parts is 4; the heads have 3"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], parts: int, message: str) -> None:
    heads: Any = rand(2, 7, 3, 3, 8)
    with pytest.raises(ValueError, match=message):
        rotate(heads, rand(*shape), parts, True, False)


def test_an_odd_head_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="even d"):
        rotate(rand(2, 7, 3, 3, 7), rand(4, 14), 2, True, False)
    with pytest.raises(ValueError, match="a table of 4 rows, but there are 3"):
        rotated(rand(2, 3, 3, 8), rand(4, 16), True)
