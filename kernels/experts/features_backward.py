"""VAPT's feature projector, backward: from the gradient of normalised prompts to its inputs'.

One kernel works on rows: it recomputes g and P and computes the gradient of the token mixing. The
other sums the gradients of the trained weights over rows. `features` has the formulas.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.chunks import chunk_size
from ..runtime.launch import Launch, Target, exact_precision
from .features import feature_arguments, hidden_unit, projector_output
from .inputs import FeatureInputs
from .tiles import feature_tiles, weight_gradient_tiles


@triton.jit(do_not_specialize=("num_rows", "num_prompts"))
def features_backward_kernel(
    mixing_ptr, mixing_sum_ptr, norm_weight_ptr, norm_bias_ptr, projector_bias_ptr,
    channel_mask_ptr, down_ptr, up_ptr, hidden_mask_ptr, norm1_weight_ptr,
    mean_ptr,  # (B * P,) fp32
    rstd_ptr,  # (B * P,) fp32
    grad_ptr,  # (B, P, D), contiguous
    grad_mixing_ptr,  # (B, P, D) fp32
    units_ptr,  # (2, B * P, HIDDEN_DIM) fp32: hidden units, and their gradients before relu
    sums_ptr,  # (4, B * P) fp32: gradients of mixing_sum, projector_bias; norm1's row means
    num_rows, num_prompts, WIDTH: tl.constexpr, HIDDEN_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_PROJECTOR_BIAS: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr,
    HAS_HIDDEN_MASK: tl.constexpr, RESIDUAL: tl.constexpr, HAS_NORM1_WEIGHT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    exists = rows < num_rows
    image, prompt = rows // num_prompts, rows % num_prompts
    rows = rows.to(tl.int64)
    channel = dims < WIDTH
    mask = exists[:, None] & channel[None, :]
    g, mixing, norm_weight, norm_bias, mixing_sum, channel_mask = projector_output(
        mixing_ptr, mixing_sum_ptr, norm_weight_ptr, norm_bias_ptr, projector_bias_ptr,
        channel_mask_ptr, rows, image, prompt, dims, exists, WIDTH, HAS_PROJECTOR_BIAS,
        HAS_CHANNEL_MASK,
    )  # fmt: skip
    prompts = g if RESIDUAL else tl.zeros_like(g)
    units = units_ptr + rows * HIDDEN_DIM
    grad_units = units + tl.cast(num_rows, tl.int64) * HIDDEN_DIM
    for j in range(HIDDEN_DIM):
        before, factor, _ = hidden_unit(
            g, j, rows, dims, exists, down_ptr, hidden_mask_ptr, HIDDEN_DIM, WIDTH, HAS_HIDDEN_MASK
        )
        up = tl.load(up_ptr + dims * HIDDEN_DIM + j, mask=channel, other=0.0).to(tl.float32)
        prompts += (before * factor)[:, None] * up[None, :]
        tl.store(units + j, before * factor, mask=exists)

    mean = tl.load(mean_ptr + rows, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=exists, other=0.0)
    grad = tl.load(grad_ptr + rows[:, None] * WIDTH + dims[None, :], mask=mask, other=0.0)
    grad = grad.to(tl.float32)
    if HAS_NORM1_WEIGHT:
        grad *= tl.load(norm1_weight_ptr + dims, mask=channel, other=0.0).to(tl.float32)[None, :]
    normal = tl.where(mask, (prompts - mean[:, None]) * rstd[:, None], 0.0)
    grad_mean = tl.sum(grad, 1) / WIDTH
    grad_slope = tl.sum(grad * normal, 1) / WIDTH
    grad = (grad - grad_mean[:, None] - normal * grad_slope[:, None]) * rstd[:, None]
    grad = tl.where(mask, grad, 0.0)  # of P

    grad_g = grad if RESIDUAL else tl.zeros_like(grad)
    for j in range(HIDDEN_DIM):
        _, factor, down = hidden_unit(
            g, j, rows, dims, exists, down_ptr, hidden_mask_ptr, HIDDEN_DIM, WIDTH, HAS_HIDDEN_MASK
        )
        up = tl.load(up_ptr + dims * HIDDEN_DIM + j, mask=channel, other=0.0).to(tl.float32)
        grad_unit = tl.sum(grad * up[None, :], 1) * factor
        grad_g += grad_unit[:, None] * down[None, :]
        tl.store(grad_units + j, grad_unit, mask=exists)
    masked = grad_g * channel_mask
    out = grad_mixing_ptr + rows[:, None] * WIDTH + dims[None, :]
    tl.store(out, masked * norm_weight[None, :], mask=mask)
    tl.store(sums_ptr + rows, tl.sum(masked * norm_bias[None, :], 1), mask=exists)
    tl.store(sums_ptr + num_rows + rows, tl.sum(grad_g, 1), mask=exists)
    tl.store(sums_ptr + 2 * num_rows + rows, grad_mean, mask=exists)
    tl.store(sums_ptr + 3 * num_rows + rows, grad_slope, mask=exists)


@triton.jit(do_not_specialize=("num_rows", "num_prompts", "rows_per_chunk"))
def weight_gradient_kernel(
    mixing_ptr, mixing_sum_ptr, norm_weight_ptr, norm_bias_ptr, projector_bias_ptr,
    channel_mask_ptr, down_ptr, up_ptr, norm1_weight_ptr, mean_ptr, rstd_ptr,
    grad_ptr,  # (B, P, D), contiguous
    units_ptr,  # (2, B * P, HIDDEN_DIM) fp32
    sums_ptr,  # (4, B * P) fp32
    out_ptr,  # (CHUNKS, 2 * HIDDEN_DIM + 2, D) fp32: of down, up^T, norm_weight, norm_bias
    num_rows, num_prompts, rows_per_chunk, WIDTH: tl.constexpr, HIDDEN_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_PROJECTOR_BIAS: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, RESIDUAL: tl.constexpr,
    HAS_NORM1_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = tl.program_id(1)
    unit = tl.arange(0, BLOCK_H)
    channel = dims < WIDTH
    unit_exists = unit < HIDDEN_DIM
    part = unit_exists[:, None] & channel[None, :]
    down = tl.load(down_ptr + unit[:, None] * WIDTH + dims[None, :], mask=part, other=0.0)
    up = tl.load(up_ptr + dims[None, :] * HIDDEN_DIM + unit[:, None], mask=part, other=0.0)
    down, up = down.to(tl.float32), up.to(tl.float32)  # [BLOCK_H, BLOCK_D]
    grad_down = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    grad_up = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    grad_norm_weight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad_norm_bias = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = chunk * rows_per_chunk
    last = min(first + rows_per_chunk, num_rows)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        exists = rows < last
        image, prompt = rows // num_prompts, rows % num_prompts
        rows = rows.to(tl.int64)
        mask = exists[:, None] & channel[None, :]
        g, mixing, norm_weight, norm_bias, mixing_sum, channel_mask = projector_output(
            mixing_ptr, mixing_sum_ptr, norm_weight_ptr, norm_bias_ptr, projector_bias_ptr,
            channel_mask_ptr, rows, image, prompt, dims, exists, WIDTH, HAS_PROJECTOR_BIAS,
            HAS_CHANNEL_MASK,
        )  # fmt: skip
        units = units_ptr + rows[:, None] * HIDDEN_DIM + unit[None, :]
        units_mask = exists[:, None] & unit_exists[None, :]
        h = tl.load(units, mask=units_mask, other=0.0)  # [BLOCK_M, BLOCK_H]
        units += tl.cast(num_rows, tl.int64) * HIDDEN_DIM
        grad_h = tl.load(units, mask=units_mask, other=0.0)
        base = g if RESIDUAL else tl.zeros_like(g)
        prompts = tl.dot(h, up, base, input_precision=PRECISION)
        mean = tl.load(mean_ptr + rows, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=exists, other=0.0)
        grad_mean = tl.load(sums_ptr + 2 * num_rows + rows, mask=exists, other=0.0)
        grad_slope = tl.load(sums_ptr + 3 * num_rows + rows, mask=exists, other=0.0)
        grad = tl.load(grad_ptr + rows[:, None] * WIDTH + dims[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        if HAS_NORM1_WEIGHT:
            scale = tl.load(norm1_weight_ptr + dims, mask=channel, other=0.0).to(tl.float32)
            grad *= scale[None, :]
        normal = (prompts - mean[:, None]) * rstd[:, None]
        grad = (grad - grad_mean[:, None] - normal * grad_slope[:, None]) * rstd[:, None]
        grad = tl.where(mask, grad, 0.0)
        base = grad if RESIDUAL else tl.zeros_like(grad)
        masked = tl.dot(grad_h, down, base, input_precision=PRECISION) * channel_mask
        grad_down = tl.dot(tl.trans(grad_h), g, grad_down, input_precision=PRECISION)
        grad_up = tl.dot(tl.trans(h), grad, grad_up, input_precision=PRECISION)
        grad_norm_weight += masked * mixing
        grad_norm_bias += masked * mixing_sum[:, None]
    out_ptr += chunk.to(tl.int64) * (2 * HIDDEN_DIM + 2) * WIDTH
    out = out_ptr + unit[:, None] * WIDTH + dims[None, :]
    tl.store(out, grad_down, mask=part)
    tl.store(out + HIDDEN_DIM * WIDTH, grad_up, mask=part)
    out = out_ptr + 2 * HIDDEN_DIM * WIDTH + dims
    tl.store(out, tl.sum(grad_norm_weight, 0), mask=channel)
    tl.store(out + WIDTH, tl.sum(grad_norm_bias, 0), mask=channel)


def features_backward_launches(
    inputs: FeatureInputs,
    norm1_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
    grad_mixing: Tensor,
    units: Tensor,
    sums: Tensor,
    weights: Tensor,
    residual: bool,
    target: Target,
) -> list[Launch]:
    """Return the launches that fill the gradients, in order.

    Args:
        inputs: Inputs of the feature projector.
        norm1_weight: Weight of norm1, (D,) or None.
        mean, rstd: Statistics of the prompts' rows, (B, p) fp32.
        grad: Gradient of the normalised prompts, (B, p, D).
        grad_mixing: Gradient of the token mixing, (B, p, D) fp32; written.
        units: Hidden units and their gradients, (2, B * p, r) fp32; written for the second launch.
        sums: Gradients of mixing_sum and projector_bias by row, and norm1's two row means of the
            gradient, (4, B * p) fp32; written.
        weights: Partial gradients of down, up^T, norm_weight and norm_bias,
            (chunks, 2 r + 2, D) fp32; written.
        residual: Whether g was added to the feature projector's output.
        target: Target to tune for.
    """
    batch, prompts, width = inputs.mixing.shape
    rows, hidden_dim = batch * prompts, units.shape[2]
    tiles = feature_tiles(width, target)
    inner = weight_gradient_tiles(hidden_dim, width, target)
    pointers, flags = feature_arguments(inputs, norm1_weight=norm1_weight, mean=mean, rstd=rstd)
    shape = {"num_rows": rows, "num_prompts": prompts}
    meta = {**flags, "WIDTH": width, "HIDDEN_DIM": hidden_dim, "RESIDUAL": residual}
    by_row = Launch(
        name="features_backward",
        kernel=features_backward_kernel,
        grid=(triton.cdiv(rows, tiles.rows), 1, 1),
        arguments={
            **pointers, "grad_ptr": grad, "grad_mixing_ptr": grad_mixing, "units_ptr": units,
            "sums_ptr": sums, **shape,
        },
        constexprs={**meta, "BLOCK_M": tiles.rows, "BLOCK_D": tiles.width},
        num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip
    without = {name: t for name, t in pointers.items() if name != "hidden_mask_ptr"}
    summed = Launch(
        name="weight_gradient",
        kernel=weight_gradient_kernel,
        grid=(triton.cdiv(width, inner.width), weights.shape[0], 1),
        arguments={
            **without, "grad_ptr": grad, "units_ptr": units, "sums_ptr": sums,
            "out_ptr": weights, **shape, "rows_per_chunk": chunk_size(rows),
        },
        constexprs={
            **{name: flag for name, flag in meta.items() if name != "HAS_HIDDEN_MASK"},
            "BLOCK_H": inner.prompts, "BLOCK_M": inner.rows, "BLOCK_D": inner.width,
            # tf32 has 11 bits, at least as many as a 16-bit gradient.
            "PRECISION": exact_precision(target) if grad.dtype == torch.float32 else "tf32",
        },
        num_warps=inner.num_warps, num_stages=inner.num_stages,
        trips={"rows": -(-chunk_size(rows) // inner.rows)},
    )  # fmt: skip
    return [by_row, summed]
