"""The residual sum and its LayerNorm in one pass, forward and backward.

    residual_norm_kernel           x = residual + scale * branch; y = LayerNorm(x); row statistics
    residual_norm_backward_kernel  LayerNorm's gradient of x + the gradient of the sum itself

Both read every row once and hold it in registers. The LayerNorm is frozen: its weight and bias have
no gradient. The statistics are those of the stored, rounded sum. RMSNorm (arXiv 1910.07467) is a
LayerNorm that does not subtract the mean: its mean is stored as 0.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.allocate import empty
from ..runtime.channels import load_channels
from ..runtime.launch import Launch
from ..runtime.launch_plan import Launcher, contiguous, launcher, layout_of
from ..runtime.row_tiles import row_gradient_tiles, row_tiles


@triton.jit(do_not_specialize=("num_rows",))
def residual_norm_kernel(
    residual_ptr,  # (rows, D), contiguous
    branch_ptr,  # (rows, D), contiguous
    scale_ptr,  # (D,), LayerScale of the branch
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    sum_ptr,  # (rows, D), contiguous
    y_ptr,  # (rows, D), contiguous
    statistics_ptr,  # (2 or 3, rows) fp32: mean, rstd, rstd of the experts
    num_rows, norm_eps, expert_eps, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EXPERTS: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    exists = rows < num_rows
    channel = (dims < WIDTH)[None, :]
    mask = exists[:, None] & channel
    offsets = rows.to(tl.int64)[:, None] * WIDTH + dims[None, :]
    x = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            branch *= load_channels(scale_ptr, dims, mask)
        stored = (x + branch).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, stored, mask=mask)
        x = stored.to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, 1) * (1.0 / WIDTH)
        centred = x - tl.where(channel, mean[:, None], 0.0)  # 0 past WIDTH
    else:
        mean = tl.zeros([BLOCK_M], tl.float32)
        centred = x
    variance = tl.sum(centred * centred, 1) * (1.0 / WIDTH)
    rstd = tl.rsqrt(variance + norm_eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= load_channels(weight_ptr, dims, mask)
    if HAS_BIAS:
        y += load_channels(bias_ptr, dims, mask)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(statistics_ptr + rows, mean, mask=exists)
    tl.store(statistics_ptr + num_rows + rows, rstd, mask=exists)
    if HAS_EXPERTS:
        expert_rstd = tl.rsqrt(variance + expert_eps)
        tl.store(statistics_ptr + 2 * num_rows + rows, expert_rstd, mask=exists)


@triton.jit(do_not_specialize=("num_rows",))
def residual_norm_backward_kernel(
    x_ptr,  # (rows, D), contiguous: the sum
    statistics_ptr,  # (2 or 3, rows) fp32
    weight_ptr,  # (D,)
    scale_ptr,  # (D,), LayerScale of the branch that was added
    grad_y_ptr,  # (rows, D), contiguous
    grad_sum_ptr,  # (rows, D), contiguous: the sum's own gradient
    grad_x_ptr,  # (rows, D)
    grad_branch_ptr,  # (rows, D): scale * grad_x
    num_rows, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr, HAS_SCALE: tl.constexpr,
    NEEDS_BRANCH: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    exists = rows < num_rows
    mask = exists[:, None] & (dims < WIDTH)[None, :]
    offsets = rows.to(tl.int64)[:, None] * WIDTH + dims[None, :]
    mean = tl.load(statistics_ptr + rows, mask=exists, other=0.0)
    rstd = tl.load(statistics_ptr + num_rows + rows, mask=exists, other=0.0)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_SUM:  # loaded before the row sums, so that all loads share one wait
        grad_sum = tl.load(grad_sum_ptr + offsets, mask=mask, other=0.0)
    if HAS_WEIGHT:
        dy *= load_channels(weight_ptr, dims, mask)
    # dy is 0 past WIDTH: x needs no second mask.
    normalised = (x - mean[:, None]) * rstd[:, None]
    slope = tl.sum(dy * normalised, 1) * (1.0 / WIDTH)
    if CENTRED:
        dy -= (tl.sum(dy, 1) * (1.0 / WIDTH))[:, None]
    dx = (dy - normalised * slope[:, None]) * rstd[:, None]
    if HAS_SUM:
        dx += grad_sum.to(tl.float32)
    tl.store(grad_x_ptr + offsets, dx.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if NEEDS_BRANCH:
        if HAS_SCALE:
            dx *= load_channels(scale_ptr, dims, mask)
        tl.store(grad_branch_ptr + offsets, dx.to(grad_branch_ptr.dtype.element_ty), mask=mask)


def residual_norm_launch(
    residual: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor | None,
    y: Tensor,
    statistics: Tensor,
    norm_eps: float,
    expert_eps: float | None,
    centred: bool = True,
) -> Launch:
    """Return the launch that fills `total`, `y` (B, N, D) and `statistics` (2 or 3, B, N) fp32.

    Without a branch the residual is normalised, and `total` is None.
    """
    rows, width = residual.shape[:-1].numel(), residual.shape[-1]
    tiles = row_tiles(width)
    return Launch(
        name="residual_norm",
        kernel=residual_norm_kernel,
        grid=(triton.cdiv(rows, tiles.rows), 1, 1),
        arguments={
            "residual_ptr": residual, "branch_ptr": residual if branch is None else branch,
            "scale_ptr": residual if scale is None else scale,
            "weight_ptr": residual if weight is None else weight,
            "bias_ptr": residual if bias is None else bias,
            "sum_ptr": y if total is None else total, "y_ptr": y, "statistics_ptr": statistics,
            "num_rows": rows, "norm_eps": norm_eps,
            "expert_eps": norm_eps if expert_eps is None else expert_eps,
        },
        constexprs={
            "WIDTH": width, "BLOCK_D": tiles.width, "BLOCK_M": tiles.rows,
            "HAS_BRANCH": branch is not None, "HAS_SCALE": scale is not None,
            "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
            "HAS_EXPERTS": expert_eps is not None, "CENTRED": centred,
        },
        num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip


def residual_norm_backward_launch(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    grad_y: Tensor,
    grad_sum: Tensor | None,
    grad_x: Tensor,
    grad_branch: Tensor | None,
    centred: bool = True,
) -> Launch:
    """Return the launch that fills `grad_x` (B, N, D) and `grad_branch` = scale * grad_x."""
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    tiles = row_gradient_tiles(width)
    return Launch(
        name="residual_norm_backward",
        kernel=residual_norm_backward_kernel,
        grid=(triton.cdiv(rows, tiles.rows), 1, 1),
        arguments={
            "x_ptr": x, "statistics_ptr": statistics, "weight_ptr": x if weight is None else weight,
            "scale_ptr": x if scale is None else scale, "grad_y_ptr": grad_y,
            "grad_sum_ptr": grad_y if grad_sum is None else grad_sum, "grad_x_ptr": grad_x,
            "grad_branch_ptr": grad_x if grad_branch is None else grad_branch, "num_rows": rows,
        },
        constexprs={
            "WIDTH": width, "BLOCK_D": tiles.width, "BLOCK_M": tiles.rows,
            "HAS_WEIGHT": weight is not None, "HAS_SUM": grad_sum is not None,
            "HAS_SCALE": scale is not None, "NEEDS_BRANCH": grad_branch is not None,
            "CENTRED": centred,
        },
        num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip


def residual_norm(
    residual: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_eps: float,
    expert_eps: float | None,
    dtype: torch.dtype,
    centred: bool = True,
    launch: Launcher | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum (the residual without a branch), its LayerNorm in `dtype`, row statistics.

    With `launch`, a launcher of this layout, tensors must be contiguous. `out` are earlier results
    of this layout, to be overwritten.
    """
    if launch is None:
        residual, branch, scale, weight, bias = contiguous(residual, branch, scale, weight, bias)
        layouts = map(layout_of, (residual, branch, scale, weight, bias))
        launch = launcher("residual_norm", norm_eps, expert_eps, dtype, centred, *layouts)
    total: Tensor | None = None
    if out is not None:
        total, y, statistics = out if branch is not None else (None, *out[1:])
    else:
        if branch is not None:
            wide = residual.dtype
            if branch.dtype != wide:
                wide = torch.promote_types(wide, branch.dtype)
            total = torch.empty_like(residual, dtype=wide)
        y = torch.empty_like(residual, dtype=dtype)
        shape = (2 if expert_eps is None else 3, *residual.shape[:-1])
        statistics = empty(shape, torch.float32, residual.device)
    tensors = (residual, branch, scale, weight, bias, total, y, statistics)
    launch(tensors, residual_norm_launch, norm_eps, expert_eps, centred)
    return residual if total is None else total, y, statistics


def residual_norm_backward(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    grad_y: Tensor,
    grad_sum: Tensor | None,
    branch_dtype: torch.dtype | None,
    centred: bool = True,
    launch: Launcher | None = None,
) -> list[Tensor]:
    """Return the gradient of the sum x and, if its dtype is given, of the branch.

    With `launch`, a launcher of this layout, tensors must be contiguous.
    """
    if launch is None:
        x, weight, scale, grad_y, grad_sum = contiguous(x, weight, scale, grad_y, grad_sum)
        layouts = map(layout_of, (x, statistics, weight, scale, grad_y, grad_sum))
        launch = launcher("residual_norm_backward", branch_dtype, centred, *layouts)
    grad_x = torch.empty_like(x)
    grad_branch = None if branch_dtype is None else torch.empty_like(x, dtype=branch_dtype)
    tensors = (x, statistics, weight, scale, grad_y, grad_sum, grad_x, grad_branch)
    launch(tensors, residual_norm_backward_launch, centred)
    return [grad_x] if grad_branch is None else [grad_x, grad_branch]
