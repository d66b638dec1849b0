"""Gated activation: the kernels against fp64, and against eager PyTorch's own error.

A result may be one rounding away from fp64, and no further than eager PyTorch's in the same dtype,
which rounds the hidden layer, the activation and the product. Without a GPU every launch runs under
ttsem, which finds accesses out of bounds and races; outputs are poisoned with NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vpt_fast.kernels.rowwise import gated_activation as kernels
from vpt_fast.ops.rowwise.activation import KINDS
from vpt_fast.ops.rowwise.gated_activation import gated_backward_reference, gated_reference

pytest_plugins = ("support.kernels.kernel_device",)

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
INFINITY = float("inf")


@dataclass(frozen=True)
class Case:
    """One hidden layer (rows, 2 C)."""

    kind: str = "silu"
    width: int = 512
    rows: int = 3
    dtype: torch.dtype = BF16
    bias: bool = True
    last: bool = False

    def __str__(self) -> str:
        name = f"{self.kind}-C{self.width}-rows{self.rows}-{str(self.dtype)[6:]}"
        return name + ("" if self.bias else "-no_bias") + ("-last" if self.last else "")


def check(case: Case, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(case.width)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    h, grad = 2 * drawn(case.rows, 2 * case.width), drawn(case.rows, case.width)
    biases: list[Any] = [drawn(case.width), drawn(case.width)] if case.bias else [None, None]
    settings = case.kind, case.last
    wide = [None if b is None else b.double() for b in biases]
    exact = gated_reference(h.double(), *wide, *settings)
    exact_grad = gated_backward_reference(h.double(), *wide, grad.double(), *settings)
    eager = gated_reference(h, *biases, *settings)
    eager_grad = gated_backward_reference(h, *biases, grad, *settings)
    here = [None if t is None else t.to(device) for t in (h, *biases)]
    out = kernels.gated(*here, *settings)
    again = kernels.gated(*here, *settings, out=torch.full_like(out, float("nan")))
    assert torch.equal(out, again)
    grad_h = kernels.gated_backward(*here, grad.to(device), *settings)
    for found, right, others in ((out, exact, eager), (grad_h, exact_grad, eager_grad)):
        assert found.dtype == case.dtype and found.shape == right.shape
        error, theirs = ((t.double().cpu() - right).abs() for t in (found, others))
        bound = max(torch.finfo(case.dtype).eps / 2, 4e-6) * right.abs().clamp_min(1)
        assert float((error - bound).max().nan_to_num(INFINITY)) <= 1e-5
        assert error.norm() <= 1.05 * theirs.norm() + 2e-6 * error.numel() ** 0.5


QUICK = (
    *(Case(kind) for kind in KINDS),
    *(Case(kind, 40, 9, FP32, last=True) for kind in KINDS),
    Case(width=50, rows=17, dtype=FP16, bias=False),
    Case(width=1365, rows=2),
    Case(width=16, rows=129, last=True),
    Case(width=1, rows=1, dtype=FP32),
    Case(width=2048, rows=1, dtype=FP16, bias=False, last=True),
)
FULL = tuple(
    Case(kind, width, 1 + 2 * (index % 4), dtype, index % 3 > 0, index % 2 > 0)
    for index, (kind, width, dtype) in enumerate(
        itertools.product(KINDS, (192, 512, 1024, 1536, 2048, 4096, 37, 520), (BF16, FP16, FP32))
    )
)


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.full) for case in FULL)], ids=str
)
def test_against_fp64_and_eager(case: Case, kernel_device: torch.device) -> None:
    check(case, kernel_device)


def test_on_an_a100(kernel_device_sm80: torch.device) -> None:
    check(Case(), kernel_device_sm80)


def test_halves_of_one_bias(kernel_device: torch.device) -> None:
    """The biases may lie in one tensor, as those of a packed fc1 do."""
    h, bias = torch.randn(4, 64).to(kernel_device), torch.randn(64).to(kernel_device)
    first, second = bias.chunk(2)
    found = kernels.gated(h, first, second, "silu", False)
    exact = gated_reference(h.double(), first.double(), second.double(), "silu", False)
    assert torch.allclose(found.double(), exact, atol=1e-5)
