"""Kernels that fold VAPT's convolution and token-wise projector into the mixing weight M.

The convolution z[i, j] = sum_ab k[a, b] y[i + a, j + b], followed by the token-wise projector
sum_ij W[p, i, j] z[i, j], is M[p, u, v] = sum_ab k[a, b] W[p, u - a, v - b]. A program computes the
row of one prompt. The prompts of several blocks follow one another; each block has its own k.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import Launch, power_of_2_at_least


@triton.jit
def fold_kernel(
    weight_ptr,  # (blocks * P, INNER_ROWS * INNER_COLUMNS), contiguous
    kernel_ptr,  # (blocks, SIZE, SIZE), contiguous
    mixing_weight_ptr,  # (blocks * P, COLUMNS) fp32
    mixing_sum_ptr,  # (blocks * P,) fp32
    INNER_ROWS: tl.constexpr, INNER_COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    prompt = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    kernel_ptr += tl.program_id(1) * SIZE * SIZE
    weight_ptr += prompt * INNER_ROWS * INNER_COLUMNS
    mixing_weight_ptr += prompt * COLUMNS
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        patches = start + tl.arange(0, BLOCK)
        u = patches // (INNER_COLUMNS + SIZE - 1)
        v = patches % (INNER_COLUMNS + SIZE - 1)
        mixing_weight = tl.zeros([BLOCK], tl.float32)
        for tap in range(SIZE * SIZE):
            i = u - tap // SIZE
            j = v - tap % SIZE
            inside = (i >= 0) & (i < INNER_ROWS) & (j >= 0) & (j < INNER_COLUMNS)
            w = tl.load(weight_ptr + i * INNER_COLUMNS + j, mask=inside, other=0.0)
            mixing_weight += w.to(tl.float32) * tl.load(kernel_ptr + tap).to(tl.float32)
        tl.store(mixing_weight_ptr + patches, mixing_weight, mask=patches < COLUMNS)
        total += mixing_weight
    tl.store(mixing_sum_ptr + prompt, tl.sum(total, 0))


@triton.jit
def fold_backward_kernel(
    weight_ptr,  # (blocks * P, INNER_ROWS * INNER_COLUMNS), contiguous
    kernel_ptr,  # (blocks, SIZE, SIZE), contiguous
    grad_mixing_weight_ptr,  # (blocks * P, COLUMNS) fp32
    grad_mixing_sum_ptr,  # (blocks * P,) fp32
    grad_weight_ptr,  # as weight_ptr
    grad_kernel_ptr,  # (blocks * P, SIZE * SIZE) fp32
    INNER_ROWS: tl.constexpr, INNER_COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least INNER_ROWS * INNER_COLUMNS
):  # fmt: skip
    prompt = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    kernel_ptr += tl.program_id(1) * SIZE * SIZE
    inner = tl.arange(0, BLOCK)
    inside = inner < INNER_ROWS * INNER_COLUMNS
    # The patch that tap (0, 0) reads for each output of the convolution.
    first = inner // INNER_COLUMNS * (INNER_COLUMNS + SIZE - 1) + inner % INNER_COLUMNS
    offset = prompt * INNER_ROWS * INNER_COLUMNS
    weight = tl.load(weight_ptr + offset + inner, mask=inside, other=0.0).to(tl.float32)
    grad_mixing_sum = tl.load(grad_mixing_sum_ptr + prompt)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for tap in range(SIZE * SIZE):
        patches = first + tap // SIZE * (INNER_COLUMNS + SIZE - 1) + tap % SIZE
        grad = tl.load(grad_mixing_weight_ptr + prompt * COLUMNS + patches, mask=inside, other=0.0)
        grad = tl.where(inside, grad + grad_mixing_sum, 0.0)
        grad_weight += grad * tl.load(kernel_ptr + tap).to(tl.float32)
        tl.store(grad_kernel_ptr + prompt * SIZE * SIZE + tap, tl.sum(grad * weight, 0))
    grad_weight = grad_weight.to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + offset + inner, grad_weight, mask=inside)


def _meta(kernel: Tensor, grid: tuple[int, int], columns: int, block: int) -> dict[str, int]:
    size = kernel.shape[-1]
    return {
        "INNER_ROWS": grid[0] - size + 1, "INNER_COLUMNS": grid[1] - size + 1, "SIZE": size,
        "COLUMNS": columns, "BLOCK": block,
    }  # fmt: skip


def fold_launch(
    weight: Tensor, kernel: Tensor, mixing_weight: Tensor, mixing_sum: Tensor, grid: tuple[int, int]
) -> Launch:
    """Return the launch that fills `mixing_weight` (..., p, columns) and its row sums, fp32."""
    columns = mixing_weight.shape[-1]
    return Launch(
        name="fold",
        kernel=fold_kernel,
        grid=(weight.shape[-2], weight.shape[:-2].numel(), 1),  # prompts, blocks
        arguments={
            "weight_ptr": weight, "kernel_ptr": kernel, "mixing_weight_ptr": mixing_weight,
            "mixing_sum_ptr": mixing_sum,
        },
        constexprs=_meta(kernel, grid, columns, min(1024, power_of_2_at_least(columns))),
        num_warps=4, num_stages=1,
    )  # fmt: skip


def fold_backward_launch(
    weight: Tensor,
    kernel: Tensor,
    grad_mixing_weight: Tensor,
    grad_mixing_sum: Tensor,
    grad_weight: Tensor,
    grad_kernel: Tensor,
    grid: tuple[int, int],
) -> Launch:
    """Return the launch that fills `grad_weight` and `grad_kernel` (..., p, K * K)."""
    columns, block = grad_mixing_weight.shape[-1], power_of_2_at_least(weight.shape[-1])
    return Launch(
        name="fold_backward",
        kernel=fold_backward_kernel,
        grid=(weight.shape[-2], weight.shape[:-2].numel(), 1),  # prompts, blocks
        arguments={
            "weight_ptr": weight, "kernel_ptr": kernel,
            "grad_mixing_weight_ptr": grad_mixing_weight, "grad_mixing_sum_ptr": grad_mixing_sum,
            "grad_weight_ptr": grad_weight, "grad_kernel_ptr": grad_kernel,
        },
        constexprs=_meta(kernel, grid, columns, block),
        num_warps=4, num_stages=1,
    )  # fmt: skip
