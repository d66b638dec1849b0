"""Bias and activation: the kernels against fp64, and against eager PyTorch's own error.

A result may be one rounding away from fp64, and no further than eager PyTorch's in the same dtype,
which rounds the hidden layer after the bias; the kernel does not. Without a GPU every launch runs
under ttsem, which finds accesses out of bounds and races; outputs are poisoned with NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vpt_fast.kernels.rowwise import activation as kernels
from vpt_fast.ops.rowwise.activation import KINDS, reference, reference_backward

pytest_plugins = ("support.kernels.kernel_device",)

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32

INFINITY = float("inf")


@dataclass(frozen=True)
class Case:
    """One hidden layer (rows, C), with values from -30 to 30."""

    kind: str = "gelu"
    width: int = 768
    rows: int = 3
    dtype: torch.dtype = BF16
    bias: bool = True
    bias_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        name = f"{self.kind}-C{self.width}-rows{self.rows}-{str(self.dtype)[6:]}"
        name += "" if self.bias else "-no_bias"
        return name if self.bias_dtype is None else f"{name}-bias_{str(self.bias_dtype)[6:]}"


def draw(case: Case, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return h, bias and the gradient of the result."""
    generator = torch.Generator().manual_seed(case.width)
    shape = (case.rows, case.width)
    h = torch.randn(shape, generator=generator) * 2
    h[-1] = torch.linspace(-30, 30, case.width)
    bias, grad = (torch.randn(s, generator=generator) for s in (shape[1:], shape))
    bias_dtype = case.bias_dtype or case.dtype
    return (
        h.to(case.dtype).to(device),
        bias.to(bias_dtype).to(device) if case.bias else None,
        grad.to(case.dtype).to(device),
    )


def derivative(h: Tensor, kind: str) -> Tensor:
    ones = torch.ones_like(h)
    reference_backward(h, ones, kind)
    return ones


def hidden(h: Tensor, bias: Tensor | None) -> Tensor:
    return h if bias is None else h + bias


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Return differences over the larger of 1 and the value."""
    assert found.shape == exact.shape
    return (found.double().cpu() - exact).abs() / exact.abs().clamp_min(1)


def check(case: Case, device: torch.device) -> None:
    h, bias, grad = draw(case, device)
    exact_h = hidden(h.double().cpu(), None if bias is None else bias.double().cpu())
    eager_h = hidden(h.cpu(), None if bias is None else bias.cpu().to(case.dtype))
    # Each unit in the last place of the argument is one of h + bias, which fp32 rounds.
    bound = max(torch.finfo(case.dtype).eps / 2, 2e-6) + 1e-6

    out = kernels.activation(h, bias, case.kind)
    exact = reference(exact_h, case.kind)
    assert out.dtype == case.dtype
    written = h.clone()
    assert kernels.activation(written, bias, case.kind, in_place=True) is written
    assert torch.equal(written, out)
    have = errors(out, exact)
    assert float(have.max().nan_to_num(INFINITY)) <= bound
    eager = errors(reference(eager_h, case.kind), exact)
    assert have.norm() <= 1.05 * eager.norm() + 1e-6 * have.numel() ** 0.5

    given, exact = grad.clone(), grad.double().cpu() * derivative(exact_h, case.kind)
    kernels.activation_backward(h, bias, grad, case.kind)
    have = errors(grad, exact)
    assert float(have.max().nan_to_num(INFINITY)) <= bound + 4e-6
    eager_grad = given.cpu().clone()
    reference_backward(eager_h, eager_grad, case.kind)
    eager = errors(eager_grad, exact)
    assert have.norm() <= 1.05 * eager.norm() + 1e-6 * have.numel() ** 0.5


QUICK = (
    *(Case(kind) for kind in KINDS),
    *(Case(kind, 80, 9, FP32) for kind in KINDS),
    *(Case(kind, 50, 17, FP16, bias=False) for kind in KINDS),
    Case("gelu", 1536, 1),
    Case("gelu_tanh", 3072, 1, FP16),
    Case("quick_gelu", 4096, 1),
    Case("silu", 5120, 1),
    Case("gelu", 33, 70),
    Case("gelu", 300, 11, BF16, bias_dtype=FP32),
    Case("gelu", 16, 129),
)
FULL = tuple(
    Case(kind, width, 1 + 2 * (index % 4), dtype, bias=index % 3 > 0)
    for index, (kind, width, dtype) in enumerate(
        itertools.product(KINDS, (768, 1536, 3072, 4096, 5120, 37, 520, 1000), (BF16, FP16, FP32))
    )
)


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.full) for case in FULL)], ids=str
)
def test_kernels_are_no_further_from_fp64_than_a_rounding_or_eager(
    case: Case, kernel_device: torch.device
) -> None:
    check(case, kernel_device)


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_for_sm_80_gives_the_same(kind: str, kernel_device_sm80: torch.device) -> None:
    check(Case(kind, 96, 5), kernel_device_sm80)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_infinity_nan_and_zero_give_what_the_formula_gives(
    kind: str, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    values = [INFINITY, -INFINITY, float("nan"), 0.0, -0.0, 1e4, -1e4, 3e18, -3e18, 1.0]
    h = torch.tensor([values], dtype=dtype)
    grad = torch.ones_like(h)
    on_device, grad_on_device = h.to(kernel_device), grad.to(kernel_device)
    out = kernels.activation(on_device, None, kind).cpu()
    kernels.activation_backward(on_device, None, grad_on_device, kind)
    reference_backward(h, grad, kind)
    # PyTorch's vectorised GELU on the CPU is NaN at +infinity, that on CUDA follows the formula.
    wide = h.double()
    formula = wide * torch.special.ndtr(wide) if kind == "gelu" else reference(wide, kind)
    expected = formula.to(dtype)
    for have, right in ((out, expected), (grad_on_device.cpu(), grad)):
        assert torch.equal(have.isnan(), right.isnan())
        assert torch.allclose(have, right, rtol=1e-6, atol=1e-6, equal_nan=True)


def run_all(h: Tensor, bias: Tensor | None, grad: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    grad = grad.clone()
    kernels.activation_backward(h, bias, grad, kind)
    return kernels.activation(h, bias, kind), grad


def test_neighbouring_rows_of_nan_and_infinity_change_nothing(kernel_device: torch.device) -> None:
    h, bias, grad = draw(Case(width=100, rows=5), kernel_device)
    before = [result[2].clone() for result in run_all(h, bias, grad, "gelu")]
    h[1], grad[1], h[3], grad[3] = float("nan"), float("nan"), INFINITY, -INFINITY
    after = run_all(h, bias, grad, "gelu")
    assert all(torch.equal(a, b[2]) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_inputs_give_the_same_bits(kind: str, kernel_device: torch.device) -> None:
    inputs = draw(Case(kind, 100, 9), kernel_device)
    first, second = (run_all(*inputs, kind) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_hidden_layers_of_any_shape_and_layout(kernel_device: torch.device) -> None:
    h, bias, grad = draw(Case(width=96, rows=6), kernel_device)
    expected = run_all(h, bias, grad, "gelu")
    turned = h.view(2, 3, 96).transpose(0, 1).contiguous().transpose(0, 1)
    found = run_all(turned, bias, grad.view(2, 3, 96), "gelu")
    assert all(torch.equal(a, b.view(6, 96)) for a, b in zip(expected, found, strict=True))


def test_an_empty_batch_gives_empty_results(kernel_device: torch.device) -> None:
    h = torch.zeros(0, 5, 96, dtype=BF16, device=kernel_device)
    out, grad = run_all(h, h.new_zeros(96), h, "gelu")
    assert out.shape == grad.shape == h.shape
