"""VAPT's prompt experts in plain PyTorch: the CPU path, and the reference of the kernels.

`operator` has the formulas. No patch is unfolded here either.
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
    """Yield the row and column of each tap of the convolution, and the slices that it reads."""
    size = kernel.shape[-1]
    for a, b in product(range(size), repeat=2):
        yield a, b, slice(a, a + grid[0] - size + 1), slice(b, b + grid[1] - size + 1)


def _inner(weight: Tensor, kernel: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the token-wise projector as (..., p, gh', gw'), fp32 at least."""
    rows, columns = (n - kernel.shape[-1] + 1 for n in grid)
    wide = weight.to(statistics_dtype(weight.dtype))
    return wide.view(*weight.shape[:-1], rows, columns)


def fold_forward(
    weight: Tensor, kernel: Tensor, grid: tuple[int, int], padded_columns: int
) -> tuple[Tensor, Tensor]:
    """Return the mixing weight (..., p, padded_columns) and its row sums (..., p).

    Args:
        weight: Token-wise projector (..., p, gh' * gw'); leading dimensions are blocks that are
            folded together.
        kernel: Convolution kernel (..., 1, 1, K, K).
        grid: Rows gh and columns gw of patches.
        padded_columns: Columns of the mixing weight, at least gh * gw.
    """
    # For kernels this small a few slices are faster than a library's convolution.
    inner = _inner(weight, kernel, grid)
    mixing_weight = inner.new_zeros(*weight.shape[:-1], padded_columns)
    on_grid = mixing_weight[..., : grid[0] * grid[1]].unflatten(-1, grid)
    taps = kernel.to(inner.dtype)
    for a, b, rows, columns in _taps(kernel, grid):
        on_grid[..., rows, columns].addcmul_(inner, taps[..., a, b, None])
    return mixing_weight, mixing_weight.sum(-1)


def fold_backward(
    weight: Tensor,
    kernel: Tensor,
    grad_mixing_weight: Tensor,
    grad_mixing_sum: Tensor,
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the token-wise projector and of the convolution."""
    inner, taps = _inner(weight, kernel, grid), kernel.to(grad_mixing_weight.dtype)
    grad = grad_mixing_weight[..., : grid[0] * grid[1]] + grad_mixing_sum[..., None]
    grad = grad.unflatten(-1, grid)
    grad_inner, grad_taps = torch.zeros_like(inner), torch.empty_like(taps)
    for a, b, rows, columns in _taps(kernel, grid):
        part = grad[..., rows, columns]
        grad_inner.addcmul_(part, taps[..., a, b, None])
        torch.sum(part * inner, (-3, -2, -1), out=grad_taps[..., 0, 0, a, b])
    return grad_inner.view(weight.shape).to(weight.dtype), grad_taps.to(kernel.dtype)


def _full(mixing_weight: Tensor, rows: int, patches: int) -> Tensor:
    """Return the mixing weight as (p, N), with zeros for the prefix tokens."""
    return F.pad(mixing_weight[:, :patches], (rows - patches, 0))


def mix_forward(x: Tensor, mixing_weight: Tensor, patches: int, statistics: Tensor) -> Tensor:
    """Return the token mixing (B, p, D).

    The row statistics (3, B, N) are the mean, norm1's rstd and the experts' rstd.
    """
    mean, _, rstd = statistics
    scaled = _full(mixing_weight, x.shape[1], patches) * rstd[:, None]
    return torch.baddbmm(-(scaled @ mean[..., None]), scaled, x.to(mixing_weight.dtype))


def mix_backward(
    x: Tensor,
    mixing_weight: Tensor,
    patches: int,
    norm1_weight: Tensor | None,
    statistics: Tensor,
    grad_y: Tensor,
    grad_mixing: Tensor,
    grad_sum: Tensor | None,
    needs_x: bool,
    needs_mixing_weight: bool,
) -> list[Tensor]:
    """Return the gradients of x, norm1's and `grad_sum` included, and of the mixing weight.

    With e the normalised patches, M the mixing weight and dG the gradient of the token mixing,
    dM = dG e^T, summed over the images, and de = M^T dG. The two row means of de in LayerNorm's
    backward pass, M^T (dG 1) and M^T (dG e^T), follow from the p columns of dG e^T.
    """
    wide, (_, rows, width) = mixing_weight.dtype, x.shape
    rows_x, full = x.to(wide), _full(mixing_weight, rows, patches)
    mean, rstd, expert_rstd = statistics
    sums = grad_mixing.sum(-1)  # (B, p)
    products = torch.baddbmm(-(sums[..., None] * mean[:, None]), grad_mixing, rows_x.mT)
    products *= expert_rstd[:, None]  # dG e^T, (B, p, N)
    result = []
    if needs_x:
        grad = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(wide), rows_x, [width], mean[..., None], rstd[..., None],
            _to(norm1_weight, wide), None, [True, False, False],
        )[0]  # fmt: skip
        slope = (full * products).sum(1) * expert_rstd**2 / width  # (B, N)
        offset = slope * mean - (sums @ full) * expert_rstd / width
        # One more row of dG, of ones, adds the offset in the same product.
        factors = torch.cat([full * expert_rstd[:, None], offset[:, None]], 1)
        ones = grad_mixing.new_ones(len(x), 1, width)
        if grad_sum is not None:
            grad += grad_sum
        grad.baddbmm_(factors.mT, torch.cat([grad_mixing, ones], 1))
        result.append(grad.addcmul_(rows_x, slope[..., None], value=-1).to(x.dtype))
    if needs_mixing_weight:
        result.append(products.sum(0)[:, rows - patches :].contiguous())
    return result


def _projector_output(inputs: FeatureInputs) -> Tensor:
    """Return g (B, p, D); the terms that all images share are added up once."""
    constant = inputs.mixing_sum[:, None] * inputs.norm_bias
    projector_bias = None if inputs.projector_bias is None else inputs.projector_bias[:, None]
    if inputs.channel_mask is None:
        constant = constant if projector_bias is None else constant + projector_bias
        return torch.addcmul(constant, inputs.mixing, inputs.norm_weight)
    g = torch.addcmul(constant, inputs.mixing, inputs.norm_weight).mul_(
        inputs.channel_mask[:, None]
    )
    return g if projector_bias is None else g.add_(projector_bias)


def _prompts(g: Tensor, h: Tensor, up: Tensor, residual: bool) -> Tensor:
    product = h.flatten(0, 1), up.mT
    rows = torch.addmm(g.flatten(0, 1), *product) if residual else torch.mm(*product)
    return rows.view(g.shape)


def _widened(inputs: FeatureInputs) -> FeatureInputs:
    widened: Any = (_to(t, inputs.mixing.dtype) for t in inputs)
    return FeatureInputs(*widened)


def features(inputs: FeatureInputs, residual: bool) -> Tensor:
    """Return the prompts P (B, p, D), before norm1, in the dtype of the token mixing."""
    inputs = _widened(inputs)
    g = _projector_output(inputs)
    h = (g @ inputs.down.mT).relu()
    h = h if inputs.hidden_mask is None else h * inputs.hidden_mask
    return _prompts(g, h, inputs.up, residual)


def features_forward(
    inputs: FeatureInputs,
    residual: bool,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    norm1_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm1 of the prompts (B, p, D) in `dtype`, and each row's mean and rstd (B, p)."""
    prompts = features(inputs, residual)
    wide = prompts.dtype
    out, mean, rstd = torch.native_layer_norm(
        prompts, prompts.shape[-1:], _to(norm1_weight, wide), _to(norm1_bias, wide), norm1_eps
    )
    return out.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


def features_backward(
    inputs: FeatureInputs,
    residual: bool,
    norm1_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    """Return the gradients of `FeatureInputs` but the masks, of those tensors that there are."""
    given, inputs = inputs, _widened(inputs)
    mixing, channel_mask, hidden_mask = inputs.mixing, inputs.channel_mask, inputs.hidden_mask
    wide = mixing.dtype
    g = _projector_output(inputs)
    before = g @ inputs.down.mT
    h = before.relu() if hidden_mask is None else before.relu() * hidden_mask
    prompts = _prompts(g, h, inputs.up, residual)
    grad_p = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), prompts, [prompts.shape[-1]], mean[..., None], rstd[..., None],
        _to(norm1_weight, wide), None, [True, False, False],
    )[0]  # fmt: skip
    grad_h = (grad_p @ inputs.up) * (before > 0)
    grad_h = grad_h if hidden_mask is None else grad_h * hidden_mask
    hidden_rows = grad_h.flatten(0, 1)
    grads = {
        "up": grad_p.flatten(0, 1).mT @ h.flatten(0, 1),
        "down": hidden_rows.mT @ g.flatten(0, 1),
    }
    # Passes over (B, p, D) take most of the time: g and the prompts' gradient are overwritten.
    grad_g = grad_p.flatten(0, 1).addmm_(hidden_rows, inputs.down, beta=float(residual))
    grad_g = grad_g.view(g.shape)
    if given.projector_bias is not None:
        grads["projector_bias"] = grad_g.sum((0, 2))
    if channel_mask is not None:
        grad_g.mul_(channel_mask[:, None])
    over_images = grad_g.sum(0)  # (p, D)
    grads["mixing_sum"] = over_images @ inputs.norm_bias
    grads["norm_bias"] = inputs.mixing_sum @ over_images
    grads["norm_weight"] = torch.mul(grad_g, mixing, out=g).sum((0, 1))
    grads["mixing"] = grad_g.mul_(inputs.norm_weight)
    return [
        grads[name].to(tensor.dtype)
        for name, tensor in given._asdict().items()
        if name in grads and tensor is not None
    ]
