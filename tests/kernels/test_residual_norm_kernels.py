"""Residual sum and LayerNorm: the kernels against fp64, and against eager PyTorch's own error.

A result may be one rounding away from fp64, and no further than eager PyTorch's in the same dtype.
LayerNorm is compared with that of the stored, rounded sum, which later passes read.
Without a GPU every launch runs under ttsem, which finds accesses out of bounds and races; outputs
are poisoned with NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.kernels.rowwise import residual_norm as kernels
from vpt_fast.ops.rowwise import residual_norm_reference as reference

pytest_plugins = ("support.kernels.kernel_device",)

EPS, EXPERT_EPS = 1e-6, 1e-5
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """One sum of (B, N, D) and its LayerNorm."""

    width: int = 192
    rows: tuple[int, int] = (2, 9)
    dtype: torch.dtype = BF16
    residual: torch.dtype | None = None  # that of the stream if it is another one: autocast
    branch: bool = True
    scale: bool = False
    affine: str = "both"  # or "weight", "none"
    experts: bool = False
    grad_sum: bool = True
    apart: bool = False  # whether the branch's gradient is asked for
    offset: float = 0.0
    massive: bool = False

    def __str__(self) -> str:
        rows = "x".join(map(str, self.rows))
        words = [f"D{self.width}", rows, str(self.dtype)[6:], f"affine_{self.affine}"]
        if self.residual is not None:
            words.append(f"residual_{str(self.residual)[6:]}")
        names = ("branch", "scale", "experts", "grad_sum", "apart", "massive")
        words += [name for name in names if getattr(self, name)]
        return "-".join(words + [f"offset{self.offset:g}"] * bool(self.offset))


@dataclass(frozen=True)
class Inputs:
    residual: Tensor
    branch: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    grad_y: Tensor
    grad_sum: Tensor | None


def draw(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(case.width)
    stream = case.residual or case.dtype

    def values(*shape: int, dtype: torch.dtype = case.dtype, on: bool = True) -> Tensor | None:
        drawn = torch.randn(*shape, generator=generator)
        return drawn.to(dtype).to(device) if on else None

    shape = (*case.rows, case.width)
    residual = torch.randn(*shape, generator=generator) + case.offset
    if case.massive:
        residual[..., 3::61] *= 1000
    grad_y = values(*shape)
    assert grad_y is not None
    return Inputs(
        residual.to(stream).to(device),
        values(*shape, on=case.branch),
        values(case.width, dtype=stream, on=case.scale),
        values(case.width, dtype=stream, on=case.affine != "none"),
        values(case.width, dtype=stream, on=case.affine == "both"),
        grad_y,
        values(*shape, dtype=stream, on=case.grad_sum),
    )


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double().cpu() for t in tensors]


def rounding(dtype: torch.dtype) -> float:
    """Return one rounding to `dtype`, or some of fp32."""
    return max(torch.finfo(dtype).eps, 2e-6)


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; infinity for NaN."""
    assert found.shape == expected.shape
    found, expected = found.double().cpu(), expected.double().cpu()
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    return float(error.nan_to_num(float("inf")))


def no_further(have: Tensor, eager: Tensor, exact: Tensor) -> bool:
    """Return whether the error's norm is at most that of eager PyTorch, or of fp32."""
    errors = [float((t.double().cpu() - exact).norm() / exact.norm()) for t in (have, eager)]
    return errors[0] <= 1.05 * errors[1] + 1e-6


def eager_gradient(case: Case, t: Inputs, x: Tensor) -> Tensor:
    """Return autograd's gradient of the stored sum in the same dtypes."""
    leaf = x.detach().cpu().requires_grad_()
    weight, bias = (None if v is None else v.cpu() for v in (t.weight, t.bias))
    y = F.layer_norm(leaf, (case.width,), weight, bias, EPS).to(case.dtype)
    roots, grads = [y], [t.grad_y.cpu()]
    if t.grad_sum is not None:
        roots, grads = [y, leaf * 1], [*grads, t.grad_sum.cpu()]
    return torch.autograd.grad(roots, leaf, grads)[0]


def check(case: Case, device: torch.device) -> None:
    t = draw(case, device)
    eps = EXPERT_EPS if case.experts else None
    bound, wide_bound = rounding(case.dtype), 2e-6 * (1 + case.offset / 4)
    total, y, statistics = kernels.residual_norm(
        t.residual, t.branch, t.scale, t.weight, t.bias, EPS, eps, case.dtype
    )
    x = total if case.branch else t.residual
    if case.branch:
        inputs = wide(t.residual, t.branch, t.scale)
        right = reference.residual_norm(*inputs, None, None, EPS, None, torch.float64)[0]
        assert total.dtype == (case.residual or case.dtype)
        assert distance(total, right) < rounding(total.dtype)
    else:
        assert total is t.residual
    _, right_y, right_statistics = reference.residual_norm(
        *wide(x), None, None, *wide(t.weight, t.bias), EPS, eps, torch.float64
    )
    assert y.dtype == case.dtype and statistics.dtype == FP32
    assert distance(y, right_y) < max(bound, wide_bound)
    affine = [None if v is None else v.cpu() for v in (t.weight, t.bias)]
    eager = F.layer_norm(x.cpu(), (case.width,), *affine, EPS).to(case.dtype)
    assert no_further(y, eager, right_y)
    assert statistics.shape == right_statistics.shape
    for have, want in zip(statistics, right_statistics, strict=True):
        assert distance(have, want) < wide_bound

    apart = case.dtype if case.apart else None
    found = kernels.residual_norm_backward(
        x, statistics, t.weight, t.scale, t.grad_y, t.grad_sum, apart
    )
    right = reference.residual_norm_backward(
        *wide(x), right_statistics, *wide(t.weight, t.scale, t.grad_y, t.grad_sum),
        torch.float64 if case.apart else None,
    )  # fmt: skip
    dtypes = [x.dtype, case.dtype][: len(right)]
    for have, want, dtype in zip(found, right, dtypes, strict=True):
        assert have.dtype == dtype
        assert distance(have, want) < max(rounding(dtype), wide_bound)
    assert no_further(found[0], eager_gradient(case, t, x), right[0])


QUICK = (
    Case(),
    Case(192, (1, 1), branch=False, grad_sum=False, affine="none"),
    Case(384, (1, 7), FP16, scale=True, apart=True, experts=True),
    Case(768, (1, 5), experts=True),
    Case(768, (1, 10), branch=False, grad_sum=False),
    Case(1024, (1, 3), residual=FP32, scale=True, apart=True),
    Case(1280, (1, 3), affine="weight"),
    Case(80, (3, 11), residual=FP32, apart=True, experts=True),
    Case(48, (2, 25), FP32, scale=True, affine="weight", apart=True),
    Case(96, (1, 13), affine="none", scale=True, apart=True, grad_sum=False),
    Case(1152, (1, 2), FP16, affine="none"),
    Case(1408, (1, 1), FP32, experts=True),
    Case(384, (1, 5), offset=50.0, experts=True),
    Case(192, (1, 5), FP32, offset=50.0),
    Case(768, (1, 3), massive=True),
    Case(192, (1, 9), FP16, massive=True, offset=5.0),
)
FULL = tuple(
    Case(
        width, (1 + index % 2, 1 + 2 * (index % 5)), dtype, residual,
        branch=index % 3 > 0, scale=index % 3 > 0 and index % 2 > 0,
        affine=("both", "weight", "none")[index % 4 % 3], experts=index % 5 > 2,
        grad_sum=index % 7 > 0, apart=index % 3 > 0 and (residual is not None or index % 2 > 0),
        offset=(0.0, 0.0, 50.0, 5.0)[index % 4], massive=index % 6 == 4,
    )
    for index, (width, (dtype, residual)) in enumerate(
        itertools.product(
            (192, 384, 768, 1024, 1280, 48, 80, 96, 1152, 1408, 20, 33),
            ((BF16, None), (FP16, None), (FP32, None), (BF16, FP32), (FP16, FP32)),
        )
    )
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.full) for case in FULL)], ids=str
)
def test_kernels_are_no_further_from_fp64_than_a_rounding_or_eager(
    case: Case, kernel_device: torch.device
) -> None:
    check(case, kernel_device)


def test_the_code_for_sm_80_gives_the_same(kernel_device_sm80: torch.device) -> None:
    check(Case(96, (1, 9), scale=True, apart=True, experts=True), kernel_device_sm80)


def run_all(t: Inputs) -> list[Tensor]:
    total, y, statistics = kernels.residual_norm(
        t.residual, t.branch, t.scale, t.weight, t.bias, EPS, EXPERT_EPS, t.residual.dtype
    )
    grads = kernels.residual_norm_backward(
        total, statistics, t.weight, t.scale, t.grad_y, t.grad_sum, t.residual.dtype
    )
    return [total, y, statistics.movedim(0, -1), *grads]


def test_neighbouring_rows_of_nan_and_infinity_change_nothing(kernel_device: torch.device) -> None:
    t = draw(Case(192, (1, 7), scale=True), kernel_device)
    before = [result[:, 3].clone() for result in run_all(t)]
    for row, value in ((2, float("nan")), (4, float("inf")), (5, float("-inf"))):
        t.residual[:, row], t.grad_y[:, row] = value, value
    after = run_all(t)
    assert all(torch.equal(a, b[:, 3]) for a, b in zip(before, after, strict=True))
    assert all(result[:, 2].isnan().all() for result in after)


def test_the_same_inputs_give_the_same_bits(kernel_device: torch.device) -> None:
    t = draw(Case(80, (2, 9), scale=True), kernel_device)
    assert all(torch.equal(a, b) for a, b in zip(run_all(t), run_all(t), strict=True))


def test_equal_rows_have_no_variance_and_stay_finite(kernel_device: torch.device) -> None:
    x = torch.full((1, 3, 96), 3.0, dtype=BF16, device=kernel_device)
    x[:, 1] = 0.0  # the prompts of a first step may be all zeros
    _, y, statistics = kernels.residual_norm(x, None, None, None, None, EPS, EXPERT_EPS, BF16)
    assert y.abs().max() < 1e-3 * 3.0
    rstd = torch.tensor([[EPS], [EXPERT_EPS]]).rsqrt().expand(2, 3)
    assert torch.allclose(statistics[1:, 0].cpu(), rstd, rtol=1e-4)
    grad = torch.ones_like(x)
    (grad_x,) = kernels.residual_norm_backward(x, statistics, None, None, grad, None, None)
    assert grad_x.isfinite().all()


def test_rows_need_not_be_contiguous_or_aligned(kernel_device: torch.device) -> None:
    case = Case(96, (3, 5), scale=True)
    t = draw(case, kernel_device)
    expected = run_all(t)
    flat = torch.zeros(3 * 5 * 96 + 1, dtype=BF16, device=kernel_device)
    flat[1:] = t.residual.flatten()
    apart = Inputs(
        flat[1:].view(3, 5, 96),
        None if t.branch is None else t.branch.transpose(0, 1).contiguous().transpose(0, 1),
        t.scale, t.weight, t.bias,
        t.grad_y.movedim(-1, 0).contiguous().movedim(0, -1),
        t.grad_sum,
    )  # fmt: skip
    # The code is another, and sums in another order.
    for have, want in zip(run_all(apart), expected, strict=True):
        assert distance(have, want) < rounding(BF16)


@pytest.mark.parametrize("shape", [(0, 5, 96), (2, 0, 96)])
def test_an_empty_batch_gives_empty_results(
    shape: tuple[int, int, int], kernel_device: torch.device
) -> None:
    t = draw(Case(96, shape[:2], scale=True), kernel_device)
    total, y, statistics, *grads = run_all(t)
    assert all(result.shape == shape for result in (total, y, *grads))
    assert statistics.shape == (*shape[:2], 3)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize(("width", "dtype"), [(192, BF16), (300, FP16), (1024, FP32), (33, BF16)])
def test_rms_norm(
    width: int, dtype: torch.dtype, branched: bool, scaled: bool, kernel_device: torch.device
) -> None:
    """Without a mean: against PyTorch's RMSNorm in fp64, and its own error."""
    case = Case(width, (2, 9), dtype, branch=branched, scale=branched and scaled, offset=1.0)
    t = draw(case, kernel_device)
    total, y, statistics = kernels.residual_norm(
        t.residual, t.branch, t.scale, t.weight, None, EPS, None, dtype, False
    )
    assert statistics[0].abs().max() == 0
    x = (total if branched else t.residual).cpu()
    leaf, narrow = x.double().requires_grad_(), x.clone().requires_grad_()
    (weight,) = wide(t.weight)
    exact = F.rms_norm(leaf, (width,), weight, EPS)
    eager = F.rms_norm(narrow, (width,), None if t.weight is None else t.weight.cpu(), EPS)
    assert distance(y, exact.detach()) < rounding(dtype)
    assert no_further(y, eager.detach(), exact.detach())
    assert t.grad_sum is not None
    grad_x, *others = kernels.residual_norm_backward(
        x.to(kernel_device), statistics, t.weight, t.scale, t.grad_y, t.grad_sum,
        dtype if scaled else None, False,
    )  # fmt: skip
    roots = [exact, leaf * 1]
    (right,) = torch.autograd.grad(
        roots, leaf, [t.grad_y.double().cpu(), t.grad_sum.double().cpu()]
    )
    roots = [eager, narrow * 1]
    (theirs,) = torch.autograd.grad(roots, narrow, [t.grad_y.cpu(), t.grad_sum.cpu()])
    assert distance(grad_x, right) < 2 * rounding(dtype) and no_further(grad_x, theirs, right)
    if scaled:
        scale = 1.0 if t.scale is None else t.scale.double().cpu()
        assert distance(others[0], right * scale) < 2 * rounding(dtype)
