"""The prompt experts' kernels against the plain formulation in fp64, and eager PyTorch's own error.

A kernel may be as far from fp64 as one rounding of its result; what stays in fp32 has to be much
closer. Without a GPU every launch runs under ttsem, which finds accesses out of bounds and races;
outputs are poisoned with NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.kernels.experts import launches as kernels
from vpt_fast.kernels.experts.inputs import FeatureInputs
from vpt_fast.kernels.rowwise import residual_norm as norm_kernels
from vpt_fast.ops.experts import reference
from vpt_fast.ops.rowwise import residual_norm_reference as norm_reference

pytest_plugins = ("support.kernels.kernel_device",)

HIDDEN_DIM = 8
EPS, NORM_EPS = 1e-5, 1e-6


@dataclass(frozen=True)
class Case:
    """One problem: B images of `grid` patches after `prefix` tokens, D channels, p prompts."""

    prompts: int = 10
    width: int = 192
    grid: tuple[int, int] = (4, 4)
    size: int = 2
    dtype: torch.dtype = torch.bfloat16
    prefix: int = 1
    batch: int = 2
    offset: float = 0.0
    options: bool = True  # bias, residual, dropout masks and norm1's affine

    def __str__(self) -> str:
        name = f"p{self.prompts}-D{self.width}-{self.grid[0]}x{self.grid[1]}-K{self.size}"
        name += f"-{str(self.dtype)[6:]}-prefix{self.prefix}-B{self.batch}"
        return (
            name
            + (f"-offset{self.offset:g}" if self.offset else "")
            + "-plain" * (not self.options)
        )

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def padded(self) -> int:
        return -(-self.patches // 64) * 64


class Draw:
    """Seeded random tensors; the same for the same case on every device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(case.prompts * 10_000 + case.width)
        self.dtype, self.device = case.dtype, device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator)
        return values.to(dtype or self.dtype).to(self.device)

    def mask(self, *shape: int) -> Tensor:
        mask = torch.rand(*shape, generator=self.generator) > 0.1
        return (mask / 0.9).to(torch.float32).to(self.device)


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; infinity for NaN."""
    assert found.shape == expected.shape
    found, expected = found.double().cpu(), expected.double().cpu()
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    return float(error.nan_to_num(float("inf")))


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double().cpu() for t in tensors]


def rounding(dtype: torch.dtype) -> float:
    """Return one rounding to `dtype`, or some of fp32."""
    return max(torch.finfo(dtype).eps, 2e-6)


def folded(case: Case, draw: Draw) -> Tensor:
    """Return a mixing weight as `fold_forward` does, for inputs of order one."""
    mixing_weight = torch.zeros(case.prompts, case.padded, device=draw.device)
    mixing_weight[:, : case.patches] = draw(case.prompts, case.patches, dtype=torch.float32)
    return mixing_weight / case.patches**0.5


def check_fold(case: Case, device: torch.device) -> None:
    draw = Draw(case, device)
    inner = (case.grid[0] - case.size + 1) * (case.grid[1] - case.size + 1)
    weight, kernel = draw(case.prompts, inner), draw(1, 1, case.size, case.size)
    mixing_weight, mixing_sum = kernels.fold_forward(weight, kernel, case.grid, case.padded)
    right, right_sum = reference.fold_forward(*wide(weight, kernel), case.grid, case.padded)
    assert distance(mixing_weight, right) < 1e-6
    assert distance(mixing_sum, right_sum) < 1e-5
    assert not mixing_weight[:, case.patches :].any()
    grads = (
        draw(case.prompts, case.padded, dtype=torch.float32),
        draw(case.prompts, dtype=torch.float32),
    )
    found = kernels.fold_backward(weight, kernel, *grads, case.grid)
    expected = reference.fold_backward(*wide(weight, kernel, *grads), case.grid)
    for have, want in zip(found, expected, strict=True):
        assert have.dtype == case.dtype
        assert distance(have, want) < 4 * rounding(case.dtype)


def check_folds(case: Case, device: torch.device) -> None:
    """Fold the convolutions of three blocks in one launch."""
    draw = Draw(case, device)
    inner = (case.grid[0] - case.size + 1) * (case.grid[1] - case.size + 1)
    weight = draw(3, case.prompts, inner)
    kernel = draw(3, 1, 1, case.size, case.size)
    grads = (
        draw(3, case.prompts, case.patches, dtype=torch.float32),
        draw(3, case.prompts, dtype=torch.float32),
    )
    found = [
        *kernels.fold_forward(weight, kernel, case.grid, case.padded),
        *kernels.fold_backward(weight, kernel, *grads, case.grid),
    ]
    each = [
        [
            *kernels.fold_forward(weight[i], kernel[i], case.grid, case.padded),
            *kernels.fold_backward(weight[i], kernel[i], grads[0][i], grads[1][i], case.grid),
        ]
        for i in range(3)
    ]
    for together, apart in zip(found, zip(*each, strict=True), strict=True):
        assert torch.equal(together, torch.stack(apart))
        assert together.isfinite().all()
    right = reference.fold_forward(*wide(weight, kernel), case.grid, case.padded)
    assert distance(found[0], right[0]) < 1e-6


def norm_and_mix(
    x: Tensor, mixing_weight: Tensor, patches: int, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm1(x), the token mixing and row statistics; in fp64 by the reference."""
    exact = x.dtype == torch.float64
    norm, experts = (norm_reference, reference) if exact else (norm_kernels, kernels)
    _, y, statistics = norm.residual_norm(x, None, None, weight, bias, NORM_EPS, EPS, x.dtype)
    return y, experts.mix_forward(x, mixing_weight, patches, statistics), statistics


def check_mix(case: Case, device: torch.device) -> None:
    draw = Draw(case, device)
    shape = (case.batch, case.prefix + case.patches, case.width)
    x = draw(*shape) + case.offset
    weight, bias = (draw(case.width), draw(case.width)) if case.options else (None, None)
    mixing_weight = folded(case, draw)
    y, mixing, statistics = norm_and_mix(x, mixing_weight, case.patches, weight, bias)
    expected = norm_and_mix(*wide(x, mixing_weight), case.patches, *wide(weight, bias))
    assert y.dtype == case.dtype and mixing.dtype == statistics.dtype == torch.float32
    assert distance(y, expected[0]) < rounding(case.dtype)
    assert distance(mixing, expected[1]) < 2e-5
    assert distance(statistics, expected[2]) < 2e-6

    grads = (
        draw(*shape),
        draw(case.batch, case.prompts, case.width, dtype=torch.float32),
        draw(*shape) if case.options else None,
    )
    right = reference.mix_backward(
        *wide(x, mixing_weight), case.patches, *wide(weight), expected[2], *wide(*grads), True, True
    )
    eager = distance(eager_token_gradient(case, x, mixing_weight, weight, grads), right[0])
    bound = max(rounding(case.dtype), 1.5 * eager)
    for needs_x, needs_mixing_weight in ((True, True), (True, False), (False, True)):
        found = kernels.mix_backward(
            x, mixing_weight, case.patches, weight, statistics, *grads, needs_x, needs_mixing_weight
        )
        asked = [g for g, asks in zip(right, (needs_x, needs_mixing_weight), strict=True) if asks]
        for have, want in zip(found, asked, strict=True):
            assert distance(have, want) < bound


def eager_token_gradient(
    case: Case,
    x: Tensor,
    mixing_weight: Tensor,
    weight: Tensor | None,
    grads: tuple[Tensor | None, ...],
) -> Tensor:
    """Return the gradient of x by eager PyTorch in the case's dtype, on the CPU."""
    x, matrix = x.cpu().requires_grad_(), mixing_weight[:, : case.patches].cpu().to(case.dtype)
    affine = None if weight is None else weight.cpu()
    y = F.layer_norm(x, (case.width,), affine, None, NORM_EPS)
    mixing = matrix @ F.layer_norm(x[:, case.prefix :], (case.width,), eps=EPS)
    pairs = [(o, g) for o, g in zip((y, mixing, x * 1), grads, strict=True) if g is not None]
    outputs, given = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, x, [g.cpu().to(case.dtype) for g in given])[0]


def check_features(case: Case, device: torch.device) -> None:
    draw = Draw(case, device)
    batch, prompts, width = case.batch, case.prompts, case.width
    on = case.options
    mixing = draw(batch, prompts, width, dtype=torch.float32)
    inputs = FeatureInputs(
        mixing,
        draw(prompts, dtype=torch.float32),
        draw(width),
        draw(width),
        draw(prompts) if on else None,
        draw.mask(batch, width) if on else None,
        draw(HIDDEN_DIM, width) / width**0.5,
        draw(width, HIDDEN_DIM),
        draw.mask(batch, prompts, HIDDEN_DIM) if on else None,
    )
    exact = FeatureInputs(*wide(*inputs))
    norm = (draw(width), draw(width)) if on else (None, None)
    out, mean, rstd = kernels.features_forward(inputs, on, *norm, NORM_EPS, case.dtype)
    right = reference.features_forward(exact, on, *wide(*norm), NORM_EPS, torch.float64)
    assert out.dtype == case.dtype
    assert distance(out, right[0]) < rounding(case.dtype)
    assert distance(mean, right[1]) < 1e-5
    assert distance(rstd, right[2]) < 1e-5
    grad = draw(batch, prompts, width)
    found = kernels.features_backward(inputs, on, norm[0], mean, rstd, grad)
    expected = reference.features_backward(exact, on, *wide(norm[0]), *right[1:], *wide(grad))
    # A bias's gradient may nearly cancel: it is as exact as plain PyTorch in fp32 makes it.
    single = FeatureInputs(*(None if t is None else t.float().cpu() for t in inputs))
    affine = None if norm[0] is None else norm[0].float().cpu()
    plain = reference.features_backward(
        single, on, affine, *(t.float() for t in right[1:]), grad.float().cpu()
    )
    for index, (have, want, eager) in enumerate(zip(found, expected, plain, strict=True)):
        bound = 1e-5 if index < 2 else 2 * rounding(case.dtype)
        assert distance(have, want) < max(bound, 4 * distance(eager, want)), index


CHECKS = {"fold": check_fold, "folds": check_folds, "mix": check_mix, "features": check_features}

QUICK = (
    Case(),
    Case(prompts=1, dtype=torch.float32, prefix=0, batch=1, grid=(4, 5), size=1),
    Case(prompts=5, width=384, grid=(5, 3), size=3, dtype=torch.float16, prefix=5),
    Case(prompts=50, width=96, grid=(7, 7), offset=8.0, options=False),
    Case(prompts=100, width=64, grid=(3, 9), size=3, batch=3),
    Case(prompts=10, width=768, grid=(2, 2), size=2, batch=1, prefix=2),
    Case(prompts=20, width=80, grid=(6, 6), dtype=torch.float32, options=False),
    Case(prompts=3, width=1280, grid=(2, 3), size=1, batch=1),
    Case(prompts=200, width=48, grid=(3, 3), prefix=0, batch=1),
)
FULL = tuple(
    Case(prompts, width, grid, 1 + index % 3, dtype, batch=1 + (grid == (4, 4)))
    for index, (prompts, width, (grid, dtype)) in enumerate(
        itertools.product(
            (1, 5, 10, 50, 100),
            (192, 384, 768, 1024, 1280),
            (
                ((4, 4), torch.bfloat16),
                ((4, 4), torch.float16),
                ((4, 4), torch.float32),
                ((14, 14), torch.bfloat16),
            ),
        )
    )
    # More accesses than are stored to look for races: `test_the_largest_grids` has it.
    if (prompts, width, grid) != (100, 1280, (14, 14))
)
LARGE = tuple(
    Case(prompts, width, (37, 37), size, batch=1)
    for prompts, width, size in ((1, 384, 1), (10, 768, 2), (50, 1024, 2), (100, 192, 3))
)


def _is_quick(case: Case, part: str) -> bool:
    """Return whether a check is run by default; many prompts take long to fold at once."""
    return case in QUICK and not (part == "folds" and case.prompts > 50)


@pytest.mark.parametrize(
    ("case", "part"),
    [
        pytest.param(
            *(case, part),
            marks=() if _is_quick(case, part) else pytest.mark.full,
            id=f"{case}-{part}",
        )
        for case, part in itertools.product((*QUICK, *FULL), CHECKS)
    ],
)
def test_kernels_are_within_a_rounding_of_fp64(
    case: Case, part: str, kernel_device: torch.device
) -> None:
    CHECKS[part](case, kernel_device)


@pytest.mark.full
@pytest.mark.parametrize("part", CHECKS)
@pytest.mark.parametrize("case", [*LARGE, Case(100, 1280, (14, 14), 1, batch=1)], ids=str)
def test_the_largest_grids(case: Case, part: str, kernel_device_large: torch.device) -> None:
    CHECKS[part](case, kernel_device_large)


@pytest.mark.parametrize("part", CHECKS)
def test_the_code_for_sm_80_gives_the_same(part: str, kernel_device_sm80: torch.device) -> None:
    CHECKS[part](Case(width=96, grid=(5, 4)), kernel_device_sm80)


@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_the_mix_is_far_closer_to_fp64_than_eager_bf16(
    offset: float, kernel_device: torch.device
) -> None:
    case = Case(width=256, grid=(6, 6), offset=offset)
    draw = Draw(case, kernel_device)
    x = draw(case.batch, 1 + case.patches, case.width) + offset
    mixing_weight = folded(case, draw)
    _, found, _ = norm_and_mix(x, mixing_weight, case.patches, None, None)
    y = F.layer_norm(x.double().cpu(), (case.width,), eps=EPS)[:, 1:]
    right = mixing_weight[:, : case.patches].double().cpu() @ y
    rows = F.layer_norm(x.cpu(), (case.width,), eps=EPS)[:, 1:]
    eager = mixing_weight[:, : case.patches].cpu().bfloat16() @ rows

    def relative(value: Tensor) -> float:
        return float((value.double().cpu() - right).norm() / right.norm())

    assert relative(found) < 2e-5
    assert relative(found) < relative(eager) / 50


def test_a_neighbouring_image_of_nan_and_infinity_changes_nothing(
    kernel_device: torch.device,
) -> None:
    case = Case(width=96, grid=(3, 3), batch=3)
    draw = Draw(case, kernel_device)
    x = draw(3, 10, 96)
    mixing_weight, weight = folded(case, draw), draw(96)
    grads = draw(3, 10, 96), draw(3, 10, 96, dtype=torch.float32), draw(3, 10, 96)

    def run() -> list[Tensor]:
        y, mixing, statistics = norm_and_mix(x, mixing_weight, 9, weight, None)
        grad_x = kernels.mix_backward(x, mixing_weight, 9, weight, statistics, *grads, True, False)
        return [t[1].clone() for t in (y, mixing, *grad_x)]

    before = run()
    x[0], x[2] = float("nan"), float("inf")
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))


def test_the_same_inputs_give_the_same_bits(kernel_device: torch.device) -> None:
    case = Case(width=64, batch=34, grid=(2, 2), prompts=2)
    draw = Draw(case, kernel_device)
    x, mixing_weight = draw(34, 5, 64), folded(case, draw)
    grads = draw(34, 5, 64), draw(34, 2, 64, dtype=torch.float32), None
    statistics = norm_and_mix(x, mixing_weight, 4, None, None)[2]
    results = [
        kernels.mix_backward(x, mixing_weight, 4, None, statistics, *grads, True, True)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    right = reference.mix_backward(
        *wide(x, mixing_weight), 4, None, *wide(statistics, *grads), True, True
    )
    assert distance(results[0][1], right[1]) < rounding(case.dtype)


def test_an_empty_batch_gives_empty_results_and_zero_gradients(
    kernel_device: torch.device,
) -> None:
    case = Case(width=64, batch=0, grid=(2, 2), prompts=2)
    draw = Draw(case, kernel_device)
    x, mixing_weight, weight = draw(0, 5, 64), folded(case, draw), draw(64)
    _, mixing, statistics = norm_and_mix(x, mixing_weight, 4, weight, None)
    grads = x, mixing, None
    grad_x, grad_mixing_weight = kernels.mix_backward(
        x, mixing_weight, 4, weight, statistics, *grads, True, True
    )
    assert mixing.shape == (0, 2, 64) and grad_x.shape == x.shape
    assert grad_mixing_weight.shape == (2, 4) and not grad_mixing_weight.any()


def test_fp64_is_refused(kernel_device: torch.device) -> None:
    x = torch.zeros(1, 5, 16, dtype=torch.float64, device=kernel_device)
    mixing_weight = torch.zeros(1, 64, device=kernel_device)
    with pytest.raises(TypeError, match="float64"):
        kernels.mix_forward(x, mixing_weight, 4, torch.zeros(3, 1, 5, device=kernel_device))
