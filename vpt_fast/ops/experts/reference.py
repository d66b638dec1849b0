"""VAPT's prompt experts in plain PyTorch: the CPU path, and what the kernels are held against.

`operator` says what is computed. Nothing is unfolded here either.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.kernels.experts.inputs import FeatureInputs
from vpt_fast.ops.backend import statistics_dtype


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _taps(kernel: Tensor, grid: tuple[int, int]) -> Iterator[tuple[int, int, slice, slice]]:
    """Each tap of the convolution, and the part of the grid that it reads."""
    size = kernel.shape[-1]
    for a, b in product(range(size), repeat=2):
        yield a, b, slice(a, a + grid[0] - size + 1), slice(b, b + grid[1] - size + 1)


def _inner(weight: Tensor, kernel: Tensor, grid: tuple[int, int]) -> Tensor:
    """The projector (..., p, gh', gw'), fp32 at least."""
    rows, columns = (n - kernel.shape[-1] + 1 for n in grid)
    wide = weight.to(statistics_dtype(weight.dtype))
    return wide.view(*weight.shape[:-1], rows, columns)


def fold_forward(
    weight: Tensor, kernel: Tensor, grid: tuple[int, int], padded: int
) -> tuple[Tensor, Tensor]:
    """The folded matrix (..., p, padded) and its row sums (..., p).

    Args:
        weight: (..., p, gh' * gw'); leading dimensions are of blocks that are folded together.
        kernel: (..., 1, 1, K, K).
        grid: (gh, gw).
        padded: columns of the matrix.
    """
    # A few slices take a fraction of the time of a library's convolution this small.
    inner = _inner(weight, kernel, grid)
    mix = inner.new_zeros(*weight.shape[:-1], padded)
    on_grid = mix[..., : grid[0] * grid[1]].unflatten(-1, grid)
    taps = kernel.to(inner.dtype)  # one K x K kernel for all the p rows of a block
    for a, b, rows, columns in _taps(kernel, grid):
        on_grid[..., rows, columns].addcmul_(inner, taps[..., a, b, None])
    return mix, mix.sum(-1)


def fold_backward(
    weight: Tensor, kernel: Tensor, grad_mix: Tensor, grad_sum: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients of the projector and of the convolution; leading dimensions as above."""
    inner, taps = _inner(weight, kernel, grid), kernel.to(grad_mix.dtype)
    grad = (grad_mix[..., : grid[0] * grid[1]] + grad_sum[..., None]).unflatten(-1, grid)
    grad_inner, grad_taps = torch.zeros_like(inner), torch.empty_like(taps)
    for a, b, rows, columns in _taps(kernel, grid):
        part = grad[..., rows, columns]
        grad_inner.addcmul_(part, taps[..., a, b, None])
        torch.sum(part * inner, (-3, -2, -1), out=grad_taps[..., 0, 0, a, b])
    return grad_inner.view(weight.shape).to(weight.dtype), grad_taps.to(kernel.dtype)


def _full(mix: Tensor, rows: int, patches: int) -> Tensor:
    """The matrix (p, N) with zeros for the prefix tokens."""
    return F.pad(mix[:, :patches], (rows - patches, 0))


def mix_forward(x: Tensor, mix: Tensor, patches: int, statistics: Tensor) -> Tensor:
    """The mix (B, p, D) from row statistics (3, B, N): mean, norm1's rstd, the experts' rstd."""
    mean, _, rstd = statistics
    scaled = _full(mix, x.shape[1], patches) * rstd[:, None]
    return torch.baddbmm(-(scaled @ mean[..., None]), scaled, x.to(mix.dtype))


def mix_backward(
    x: Tensor,
    mix: Tensor,
    patches: int,
    weight: Tensor | None,
    statistics: Tensor,
    grad_y: Tensor,
    grad_mixed: Tensor,
    grad_sum: Tensor | None,
    needs_x: bool,
    needs_mix: bool,
) -> list[Tensor]:
    """Gradients of x, norm1's and its own included, and of the matrix: those asked for.

    With e the normalised patches, dM = dG e^T, summed over the images, and de = M^T dG. The two row
    means that LayerNorm's backward takes of de are M^T (dG 1) and M^T (dG e^T): they come from the
    p columns of dG e^T, and de is never read again.
    """
    wide, (_, rows, width) = mix.dtype, x.shape
    rows_x, full = x.to(wide), _full(mix, rows, patches)
    mean, rstd, expert_rstd = statistics
    sums = grad_mixed.sum(-1)  # (B, p)
    products = torch.baddbmm(-(sums[..., None] * mean[:, None]), grad_mixed, rows_x.mT)
    products *= expert_rstd[:, None]  # dG e^T, (B, p, N)
    result = []
    if needs_x:
        grad = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(wide), rows_x, [width], mean[..., None], rstd[..., None],
            _to(weight, wide), None, [True, False, False],
        )[0]  # fmt: skip
        slope = (full * products).sum(1) * expert_rstd**2 / width  # (B, N)
        shift = slope * mean - (sums @ full) * expert_rstd / width
        # One more row of dG, of ones, brings the shift along.
        factors = torch.cat([full * expert_rstd[:, None], shift[:, None]], 1)
        ones = grad_mixed.new_ones(len(x), 1, width)
        if grad_sum is not None:
            grad += grad_sum
        grad.baddbmm_(factors.mT, torch.cat([grad_mixed, ones], 1))
        result.append(grad.addcmul_(rows_x, slope[..., None], value=-1).to(x.dtype))
    if needs_mix:
        result.append(products.sum(0)[:, rows - patches :].contiguous())
    return result


def _before_projector(inputs: FeatureInputs) -> Tensor:
    """g (B, p, D); what does not depend on the image is added up for one image first."""
    constant = inputs.mix_sum[:, None] * inputs.shift
    bias = None if inputs.bias is None else inputs.bias[:, None]
    if inputs.channels is None:
        constant = constant if bias is None else constant + bias
        return torch.addcmul(constant, inputs.mixed, inputs.weight)
    g = torch.addcmul(constant, inputs.mixed, inputs.weight).mul_(inputs.channels[:, None])
    return g if bias is None else g.add_(bias)


def _prompts(g: Tensor, h: Tensor, up: Tensor, residual: bool) -> Tensor:
    product = h.flatten(0, 1), up.mT
    rows = torch.addmm(g.flatten(0, 1), *product) if residual else torch.mm(*product)
    return rows.view(g.shape)


def _widened(inputs: FeatureInputs) -> FeatureInputs:
    widened: Any = (_to(t, inputs.mixed.dtype) for t in inputs)
    return FeatureInputs(*widened)


def features(inputs: FeatureInputs, residual: bool) -> Tensor:
    """The prompts P (B, p, D), before norm1, in the mix's dtype."""
    inputs = _widened(inputs)
    g = _before_projector(inputs)
    h = (g @ inputs.down.mT).relu()
    h = h if inputs.hidden is None else h * inputs.hidden
    return _prompts(g, h, inputs.up, residual)


def features_forward(
    inputs: FeatureInputs,
    residual: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm1 of the prompts (B, p, D) in `dtype`, and each row's mean and rstd (B, p)."""
    prompts = features(inputs, residual)
    wide = prompts.dtype
    out, mean, rstd = torch.native_layer_norm(
        prompts, prompts.shape[-1:], _to(norm_weight, wide), _to(norm_bias, wide), norm_eps
    )
    return out.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


def features_backward(
    inputs: FeatureInputs,
    residual: bool,
    norm_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    """Gradients of mixed, mix_sum, weight, shift, bias if there is one, down and up."""
    given, inputs = inputs, _widened(inputs)
    mixed, channels, hidden = inputs.mixed, inputs.channels, inputs.hidden
    wide = mixed.dtype
    g = _before_projector(inputs)
    before = g @ inputs.down.mT
    h = before.relu() if hidden is None else before.relu() * hidden
    prompts = _prompts(g, h, inputs.up, residual)
    grad_p = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), prompts, [prompts.shape[-1]], mean[..., None], rstd[..., None],
        _to(norm_weight, wide), None, [True, False, False],
    )[0]  # fmt: skip
    grad_h = (grad_p @ inputs.up) * (before > 0)
    grad_h = grad_h if hidden is None else grad_h * hidden
    hidden_rows = grad_h.flatten(0, 1)
    grads = {
        "up": grad_p.flatten(0, 1).mT @ h.flatten(0, 1),
        "down": hidden_rows.mT @ g.flatten(0, 1),
    }
    # Every pass over (B, p, D) counts here: g and the prompts' gradient are used up in place.
    grad_g = grad_p.flatten(0, 1).addmm_(hidden_rows, inputs.down, beta=float(residual))
    grad_g = grad_g.view(g.shape)
    if given.bias is not None:
        grads["bias"] = grad_g.sum((0, 2))
    if channels is not None:
        grad_g.mul_(channels[:, None])
    over_images = grad_g.sum(0)  # (p, D)
    grads["mix_sum"] = over_images @ inputs.shift
    grads["shift"] = inputs.mix_sum @ over_images
    grads["weight"] = torch.mul(grad_g, mixed, out=g).sum((0, 1))
    grads["mixed"] = grad_g.mul_(inputs.weight)
    return [
        grads[name].to(tensor.dtype)
        for name, tensor in given._asdict().items()
        if name in grads and tensor is not None
    ]
