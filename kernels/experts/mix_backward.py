"""VAPT's token mixing, backward: the gradients of norm1 and of the token mixing in one pass.

With e the normalised patches, M the mixing weight and dG the gradient of the token mixing,
dM = dG e^T and de = M^T dG. LayerNorm's backward needs two means of de over the channels,
M^T (dG 1) and M^T (dG e^T), which follow from the p columns of dG e^T. So de is not stored, and
tokens are read twice: for the row sums of both norms, and for the result.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from ..runtime.chunks import chunk_count, chunk_size
from ..runtime.launch import Launch, Target, exact_precision
from .tiles import mix_gradient_tiles


@triton.jit
def _product(a, b, acc, LIKE: tl.constexpr, EXACT: tl.constexpr):
    """Return acc + a @ b in the precision that suits tokens of dtype LIKE; see `_operand`.

    tf32 has as many bits as fp16 tokens.
    """
    if LIKE == tl.bfloat16:  # noqa: SIM300
        return tl.dot(a, b, acc)
    elif LIKE == tl.float32:  # noqa: SIM300
        return tl.dot(a, b, acc, input_precision=EXACT)
    else:
        return tl.dot(a, b, acc, input_precision="tf32")


@triton.jit
def _operand(tile, LIKE: tl.constexpr):
    """Round to bf16 where tokens are bf16, else to fp32: gradients overflow fp16's exponents."""
    if LIKE == tl.bfloat16:  # noqa: SIM300
        return tile.to(tl.bfloat16)
    else:
        return tile.to(tl.float32)


@triton.jit(
    do_not_specialize=("num_images", "num_rows", "num_patches", "num_prompts", "images_per_chunk")
)
def mix_backward_kernel(
    x_ptr,  # (B, N, D), contiguous
    mixing_weight_ptr,  # (P, COLUMNS) fp32
    statistics_ptr,  # (3, B * N) fp32
    norm1_weight_ptr,  # (D,)
    grad_y_ptr,  # (B, N, D), contiguous
    grad_mixing_ptr,  # (B, P, D) fp32, contiguous
    grad_sum_ptr,  # (B, N, D), contiguous: gradient of the residual stream
    grad_x_ptr,  # (B, N, D)
    grad_mixing_weight_ptr,  # (CHUNKS, P, patches) fp32
    num_images,
    num_rows,  # N
    num_patches, num_prompts, images_per_chunk, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_NORM1_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr, NEEDS_X: tl.constexpr,
    NEEDS_MIXING_WEIGHT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    LIKE: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = rows < num_rows
    prompts = tl.arange(0, BLOCK_P)
    prompt = prompts < num_prompts
    dims = tl.arange(0, BLOCK_D)
    prefix = num_rows - num_patches
    is_patch = exists & (rows >= prefix)
    mixing_weight = tl.load(
        mixing_weight_ptr + prompts[None, :] * COLUMNS + (rows - prefix)[:, None],
        mask=is_patch[:, None] & prompt[None, :],
        other=0.0,
    )  # [BLOCK_T, BLOCK_P]
    grad_mixing_weight = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    statistics_rows = tl.cast(num_images, tl.int64) * num_rows
    chunk = tl.program_id(1)
    first = chunk * images_per_chunk
    for image in tl.range(first, min(first + images_per_chunk, num_images), num_stages=1):
        start = image.to(tl.int64) * num_rows
        mean = tl.load(statistics_ptr + start + rows, mask=exists, other=0.0)
        norm_rstd = tl.load(statistics_ptr + statistics_rows + start + rows, mask=exists, other=0.0)
        rstd = tl.load(statistics_ptr + 2 * statistics_rows + start + rows, mask=exists, other=0.0)
        token = (start + rows)[:, None] * WIDTH + dims[None, :]
        row = (image.to(tl.int64) * num_prompts + prompts)[:, None] * WIDTH + dims[None, :]

        products = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
        sums = tl.zeros([16, BLOCK_P], tl.float32)  # equal rows
        dy_sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        dy_products = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for d in range(0, WIDTH, BLOCK_D):
            channel = (d + dims < WIDTH)[None, :]
            x = tl.load(x_ptr + token + d, mask=exists[:, None] & channel, other=0.0)
            g = tl.load(grad_mixing_ptr + row + d, mask=prompt[:, None] & channel, other=0.0)
            g = tl.trans(_operand(g, LIKE))
            products = _product(_operand(x, LIKE), g, products, LIKE, EXACT)
            # Sums of the rounded dG, so that the mean cancels.
            ones = _operand(tl.full([16, BLOCK_D], 1.0, tl.float32), LIKE)
            sums = _product(ones, g, sums, LIKE, EXACT)
            if NEEDS_X:
                dy = tl.load(grad_y_ptr + token + d, mask=exists[:, None] & channel, other=0.0)
                dy = dy.to(tl.float32)
                if HAS_NORM1_WEIGHT:
                    factor = tl.load(norm1_weight_ptr + d + dims, mask=d + dims < WIDTH, other=0.0)
                    dy *= factor.to(tl.float32)[None, :]
                dy_sums += dy
                dy_products += dy * x.to(tl.float32)
        total = tl.max(sums, 0)  # [BLOCK_P]
        products = (products - mean[:, None] * total[None, :]) * rstd[:, None]
        grad_mixing_weight += products
        if NEEDS_X:
            dy_sum = tl.sum(dy_sums, 1)
            dy_product = (tl.sum(dy_products, 1) - mean * dy_sum) * norm_rstd
            slope = (
                norm_rstd * norm_rstd * dy_product
                + rstd * rstd * tl.sum(mixing_weight * products, 1)
            ) / WIDTH
            offset = norm_rstd * dy_sum + rstd * tl.sum(mixing_weight * total[None, :], 1)
            offset = slope * mean - offset / WIDTH
            scaled = _operand(mixing_weight * rstd[:, None], LIKE)
            for d in range(0, WIDTH, BLOCK_D):
                channel = (d + dims < WIDTH)[None, :]
                mask = exists[:, None] & channel
                x = tl.load(x_ptr + token + d, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(grad_y_ptr + token + d, mask=mask, other=0.0).to(tl.float32)
                if HAS_NORM1_WEIGHT:
                    factor = tl.load(norm1_weight_ptr + d + dims, mask=d + dims < WIDTH, other=0.0)
                    dy *= factor.to(tl.float32)[None, :]
                g = tl.load(grad_mixing_ptr + row + d, mask=prompt[:, None] & channel, other=0.0)
                dx = dy * norm_rstd[:, None] - x * slope[:, None] + offset[:, None]
                dx = _product(scaled, _operand(g, LIKE), dx, LIKE, EXACT)
                if HAS_SUM:
                    dx += tl.load(grad_sum_ptr + token + d, mask=mask, other=0.0).to(tl.float32)
                tl.store(grad_x_ptr + token + d, dx.to(LIKE), mask=mask)
    if NEEDS_MIXING_WEIGHT:
        columns = (chunk * num_prompts + prompts).to(tl.int64)[None, :] * num_patches
        tl.store(
            grad_mixing_weight_ptr + columns + (rows - prefix)[:, None],
            grad_mixing_weight,
            mask=is_patch[:, None] & prompt[None, :],
        )


def mix_backward_launch(
    x: torch.Tensor,
    mixing_weight: torch.Tensor,
    norm1_weight: torch.Tensor | None,
    statistics: torch.Tensor,
    grad_y: torch.Tensor,
    grad_mixing: torch.Tensor,
    grad_sum: torch.Tensor | None,
    grad_x: torch.Tensor | None,
    grad_mixing_weight: torch.Tensor | None,
    patches: int,
    target: Target,
) -> Launch:
    """Return the launch that fills `grad_x` (B, N, D) and `grad_mixing_weight`, fp32 by chunk."""
    batch, rows, width = x.shape
    prompts, columns = len(mixing_weight), mixing_weight.stride(0)  # rows may be padded
    tiles = mix_gradient_tiles(prompts, width, x.dtype, target)
    no_weight_grad = grad_mixing_weight is None
    return Launch(
        name="mix_backward",
        kernel=mix_backward_kernel,
        grid=(triton.cdiv(rows, tiles.rows), chunk_count(batch), 1),
        arguments={
            "x_ptr": x, "mixing_weight_ptr": mixing_weight, "statistics_ptr": statistics,
            "norm1_weight_ptr": x if norm1_weight is None else norm1_weight, "grad_y_ptr": grad_y,
            "grad_mixing_ptr": grad_mixing,
            "grad_sum_ptr": grad_y if grad_sum is None else grad_sum,
            "grad_x_ptr": grad_y if grad_x is None else grad_x,
            "grad_mixing_weight_ptr": mixing_weight if no_weight_grad else grad_mixing_weight,
            "num_images": batch, "num_rows": rows, "num_patches": patches, "num_prompts": prompts,
            "images_per_chunk": chunk_size(batch),
        },
        constexprs={
            "WIDTH": width, "COLUMNS": columns, "BLOCK_P": tiles.prompts, "BLOCK_T": tiles.rows,
            "BLOCK_D": tiles.width, "HAS_NORM1_WEIGHT": norm1_weight is not None,
            "HAS_SUM": grad_sum is not None, "NEEDS_X": grad_x is not None,
            "NEEDS_MIXING_WEIGHT": not no_weight_grad, "EXACT": exact_precision(target),
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips={"sums": -(-width // tiles.width), "gradient": -(-width // tiles.width)},
    )  # fmt: skip
