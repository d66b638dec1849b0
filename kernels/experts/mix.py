"""VAPT's token mixing, forward: the mixing weight M times the normalised patches.

    mixing[b, p] = sum_n M[p, n] (x[b, n] - mean[b, n]) * rstd[b, n]

norm1's pass has computed the row statistics. Normalised patches are not stored: M * rstd is
multiplied by raw x on the tensor cores, and the means are subtracted from the p sums. Rounded to
bf16, M * rstd would lose 8 bits: it is split into two bf16 parts, whose products are exact.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from ..runtime.launch import Launch, Target, exact_precision, power_of_2_at_least
from .tiles import mix_tiles


@triton.jit
def _add_product(acc, scaled, x, PARTS: tl.constexpr, EXACT: tl.constexpr):
    """Return acc [P, D] + scaled [P, T] @ x [T, D], with `scaled` split into PARTS of x's dtype.

    With PARTS = 0 the products are fp32's, of input precision EXACT.
    """
    if PARTS == 0:
        return tl.dot(scaled, x.to(tl.float32), acc, input_precision=EXACT)
    else:
        for _ in tl.static_range(PARTS):
            part = scaled.to(x.dtype)
            acc = tl.dot(part, x, acc)
            scaled -= part.to(tl.float32)
        return acc


@triton.jit
def _mix_step(
    x_rows,  # [BLOCK_T, BLOCK_D] pointers
    mixing_rows,  # [BLOCK_P, BLOCK_T] pointers
    mean_ptr, rstd_ptr,
    means,  # [BLOCK_P, BLOCK_T] fp32
    acc,  # [BLOCK_P, BLOCK_D] fp32
    count,  # patches left
    channel,  # [BLOCK_D]
    prompt,  # [BLOCK_P]
    MASKED: tl.constexpr, ALL_CHANNELS: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add one tile of patches to `acc`, and the products of their means to `means`."""
    tile = tl.arange(0, x_rows.shape[0])
    if MASKED:
        # The matrix is 0 past the last patch, but 0 times another image's NaN is NaN.
        exists = tile < count
        x = tl.load(x_rows, mask=exists[:, None] & channel[None, :], other=0.0)
        mean = tl.load(mean_ptr + tile, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + tile, mask=exists, other=0.0)
    else:
        if ALL_CHANNELS:  # noqa: SIM108
            x = tl.load(x_rows)
        else:
            x = tl.load(x_rows, mask=channel[None, :], other=0.0)
        mean = tl.load(mean_ptr + tile)
        rstd = tl.load(rstd_ptr + tile)
    scaled = tl.load(mixing_rows, mask=prompt[:, None], other=0.0) * rstd[None, :]
    means += scaled * mean[None, :]
    return _add_product(acc, scaled, x, PARTS, EXACT), means


@triton.jit(do_not_specialize=("num_images", "num_rows", "num_patches", "num_prompts"))
def mix_kernel(
    x_ptr,  # (B, N, D), contiguous
    mixing_weight_ptr,  # (P, COLUMNS) fp32; columns past the patches are 0
    statistics_ptr,  # (3, B * N) fp32
    mixing_ptr,  # (B, P, D) fp32, contiguous
    num_images,
    num_rows,  # N
    num_patches, num_prompts, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    prompts = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = dims < WIDTH
    prompt = prompts < num_prompts
    prefix = num_rows - num_patches
    x_ptr += (image * num_rows + prefix) * WIDTH
    mean_ptr = statistics_ptr + image * num_rows + prefix
    rstd_ptr = mean_ptr + 2 * tl.cast(num_images, tl.int64) * num_rows

    tile = tl.arange(0, BLOCK_T)
    x_rows = x_ptr + tile[:, None] * WIDTH + dims[None, :]
    mixing_rows = mixing_weight_ptr + prompts[:, None] * COLUMNS + tile[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    means = tl.zeros([BLOCK_P, BLOCK_T], tl.float32)
    full = num_patches // BLOCK_T * BLOCK_T
    for _ in range(0, full, BLOCK_T):
        acc, means = _mix_step(
            x_rows, mixing_rows, mean_ptr, rstd_ptr, means, acc, 0, channel, prompt,
            False, WIDTH % BLOCK_D == 0, PARTS, EXACT,
        )  # fmt: skip
        x_rows += BLOCK_T * WIDTH
        mixing_rows += BLOCK_T
        mean_ptr += BLOCK_T
        rstd_ptr += BLOCK_T
    offset = tl.sum(means, 1)
    tile = tl.arange(0, BLOCK_TAIL)
    left = num_patches - full
    if left > 0:
        acc, tail_means = _mix_step(
            x_ptr + (full + tile)[:, None] * WIDTH + dims[None, :],
            mixing_weight_ptr + prompts[:, None] * COLUMNS + (full + tile)[None, :],
            mean_ptr, rstd_ptr, tl.zeros([BLOCK_P, BLOCK_TAIL], tl.float32), acc, left,
            channel, prompt, True, False, PARTS, EXACT,
        )  # fmt: skip
        offset += tl.sum(tail_means, 1)
    out_rows = mixing_ptr + (image * num_prompts + prompts[:, None]) * WIDTH
    mask = prompt[:, None] & channel[None, :]
    tl.store(out_rows + dims[None, :], acc - offset[:, None], mask=mask)


def mix_launch(
    x: torch.Tensor,
    mixing_weight: torch.Tensor,
    statistics: torch.Tensor,
    mixing: torch.Tensor,
    patches: int,
    target: Target,
) -> Launch:
    """Return the launch that fills `mixing` (B, p, D) fp32."""
    batch, rows, width = x.shape
    prompts, columns = len(mixing_weight), mixing_weight.stride(0)  # rows may be padded
    tiles = mix_tiles(prompts, width, x.dtype, target)
    return Launch(
        name="mix",
        kernel=mix_kernel,
        grid=(triton.cdiv(width, tiles.width), batch, triton.cdiv(prompts, tiles.prompts)),
        arguments={
            "x_ptr": x, "mixing_weight_ptr": mixing_weight, "statistics_ptr": statistics,
            "mixing_ptr": mixing, "num_images": batch, "num_rows": rows, "num_patches": patches,
            "num_prompts": prompts,
        },
        constexprs={
            "WIDTH": width, "COLUMNS": columns, "BLOCK_P": tiles.prompts, "BLOCK_T": tiles.rows,
            "BLOCK_TAIL": power_of_2_at_least(patches % tiles.rows), "BLOCK_D": tiles.width,
            "PARTS": 2 if x.dtype == torch.bfloat16 else 0, "EXACT": exact_precision(target),
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips={"patches": patches // tiles.rows},
    )  # fmt: skip
