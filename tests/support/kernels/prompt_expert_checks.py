"""Problems of the prompt experts' kernels, and checks of their results against fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.kernels.experts import launches as kernels
from vpt_fast.kernels.experts.inputs import FeatureInputs
from vpt_fast.kernels.rowwise import residual_norm as norm_kernels
from vpt_fast.ops.experts import reference
from vpt_fast.ops.rowwise import residual_norm_reference as norm_reference

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
