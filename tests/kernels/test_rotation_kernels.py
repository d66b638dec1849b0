"""Rotation of queries and keys: the kernel against fp64, and against timm's own error.

A result may be one rounding away from fp64, and no further than timm's in the same dtype. Without a
GPU every launch runs under ttsem, which finds accesses out of bounds and races; what must not be
written is compared bit by bit.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from vpt_fast.kernels.rowwise import rotation as kernels

pytest_plugins = ("support.kernels.kernel_device",)

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
INFINITY = float("inf")


@dataclass(frozen=True)
class Case:
    """Heads (B, N, P, H, d), of which the last N' rows of the first parts are rotated."""

    head_dim: int = 64
    half: bool = True
    dtype: torch.dtype = BF16
    rows: int = 9
    rotated: int = 4
    batch: int = 2
    heads: int = 2
    packed: int = 3
    parts: int = 2
    per_head: bool = False

    def __str__(self) -> str:
        layout = "half" if self.half else "interleaved"
        shape = f"B{self.batch}-N{self.rows}of{self.rotated}-P{self.parts}of{self.packed}"
        name = f"d{self.head_dim}-{layout}-{str(self.dtype)[6:]}-{shape}-H{self.heads}"
        return f"{name}-per_head" if self.per_head else name


def draw(case: Case) -> tuple[Tensor, Tensor]:
    """Return heads and a table, whose pairs of channels differ, as no embedding's do."""
    generator = torch.Generator().manual_seed(case.head_dim)
    shape = (case.batch, case.rows, case.packed, case.heads, case.head_dim)
    heads = torch.randn(shape, generator=generator).to(case.dtype)
    size = (case.heads,) if case.per_head else ()
    angles = torch.randn((*size, case.rotated, case.head_dim), generator=generator) * 3
    return heads, torch.cat([angles.sin(), angles.cos()], -1)


def expected(heads: Tensor, table: Tensor, case: Case, inverse: bool) -> Tensor:
    """Return what timm computes of the rotated rows; its gradient with `inverse`."""
    first = case.rows - case.rotated
    rows = heads[:, first:, : case.parts].permute(0, 2, 3, 1, 4)
    start = rows.clone().requires_grad_()
    found = apply_rot_embed_cat(start, table, half=case.half)
    if inverse:
        (found,) = torch.autograd.grad(found, start, rows)
    result = heads.clone()
    result[:, first:, : case.parts] = found.permute(0, 3, 1, 2, 4)
    return result.detach()


def check(case: Case, device: torch.device) -> None:
    heads, table = draw(case)
    for inverse in (False, True):
        exact = expected(heads.double(), table.double(), case, inverse)
        eager = expected(heads, table, case, inverse)
        found = heads.clone().to(device)
        kernels.rotate(found, table.to(device), case.parts, case.half, inverse)
        found = found.cpu()
        first = case.rows - case.rotated
        assert torch.equal(found[:, :first], heads[:, :first])
        assert torch.equal(found[:, :, case.parts :], heads[:, :, case.parts :])
        error, others = ((t.double() - exact).abs() for t in (found, eager))
        bound = max(torch.finfo(case.dtype).eps / 2, 2e-7) * exact.abs().clamp_min(1)
        assert float((error - bound).max().nan_to_num(INFINITY)) <= 1e-6
        assert error.norm() <= 1.05 * others.norm() + 1e-7 * error.numel() ** 0.5


QUICK = (
    Case(),
    Case(half=False),
    Case(32, False, FP32, rows=70, rotated=66, heads=5),
    Case(96, True, FP16, rows=5, rotated=5, batch=1),
    Case(88, False, BF16, rows=40, rotated=37, per_head=True, parts=1, packed=2),
    Case(112, True, FP32, rows=3, rotated=1, heads=1, parts=1, packed=1),
    Case(128, False, FP16, rows=3, rotated=2),
    Case(4, False, FP32, rows=6, rotated=5, heads=9),
    Case(20, True, BF16, rows=33, rotated=33, per_head=True),
    Case(64, rotated=0),
    Case(64, parts=0),
)
FULL = tuple(
    Case(dim, half, dtype, 2 + index % 5, 1 + index % 2, 1 + index % 3, 1 + index % 6,
         per_head=index % 2 == 0)
    for index, (dim, half, dtype) in enumerate(
        itertools.product((8, 16, 24, 32, 40, 48, 64, 72, 80, 88, 96, 104, 112, 120, 128),
                          (False, True), (BF16, FP16, FP32))
    )
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.full) for case in FULL)], ids=str
)
def test_against_fp64_and_timm(case: Case, kernel_device: torch.device) -> None:
    check(case, kernel_device)


def test_on_an_a100(kernel_device_sm80: torch.device) -> None:
    check(Case(half=False), kernel_device_sm80)


@pytest.mark.parametrize("half", [True, False])
def test_a_rotation_and_its_inverse(half: bool, kernel_device: torch.device) -> None:
    angles = torch.randn(5, 32).repeat_interleave(2, -1)
    if half:
        angles = torch.cat([angles[..., ::2]] * 2, -1)
    table = torch.cat([angles.sin(), angles.cos()], -1).to(kernel_device)
    heads = torch.randn(2, 7, 3, 2, 64).to(kernel_device)
    found = heads.clone()
    kernels.rotate(found, table, 2, half, False)
    assert not torch.allclose(found[:, 2:, :2], heads[:, 2:, :2])
    kernels.rotate(found, table, 2, half, True)
    assert torch.allclose(found, heads, atol=1e-5)
