"""Folds VAPT's convolution and token-wise projector into one matrix, and its gradient back.

The convolution z[i, j] = sum_ab k[a, b] y[i + a, j + b] and the projector sum_ij W[p, i, j] z[i, j]
are together M[p, u, v] = sum_ab k[a, b] W[p, u - a, v - b]. One program holds one prompt's row; the
prompts of several blocks, which have a convolution each, follow one another.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from ..runtime.launch import Launch, power_of_2_at_least


@triton.jit
def fold_kernel(
    weight_ptr,  # (blocks * P, INNER_ROWS * INNER_COLUMNS), contiguous
    kernel_ptr,  # (blocks, SIZE, SIZE), contiguous
    mix_ptr,  # (blocks * P, COLUMNS) fp32
    sum_ptr,  # (blocks * P,) fp32
    INNER_ROWS: tl.constexpr,
    INNER_COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    prompt = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    kernel_ptr += tl.program_id(1) * SIZE * SIZE
    weight_ptr += prompt * INNER_ROWS * INNER_COLUMNS
    mix_ptr += prompt * COLUMNS
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        patches = start + tl.arange(0, BLOCK)
        u = patches // (INNER_COLUMNS + SIZE - 1)
        v = patches % (INNER_COLUMNS + SIZE - 1)
        mix = tl.zeros([BLOCK], tl.float32)
        for tap in range(SIZE * SIZE):
            i = u - tap // SIZE
            j = v - tap % SIZE
            inside = (i >= 0) & (i < INNER_ROWS) & (j >= 0) & (j < INNER_COLUMNS)
            w = tl.load(weight_ptr + i * INNER_COLUMNS + j, mask=inside, other=0.0)
            mix += w.to(tl.float32) * tl.load(kernel_ptr + tap).to(tl.float32)
        tl.store(mix_ptr + patches, mix, mask=patches < COLUMNS)
        total += mix
    tl.store(sum_ptr + prompt, tl.sum(total, 0))


@triton.jit
def fold_backward_kernel(
    weight_ptr,  # (blocks * P, INNER_ROWS * INNER_COLUMNS), contiguous
    kernel_ptr,  # (blocks, SIZE, SIZE), contiguous
    grad_mix_ptr,  # (blocks * P, COLUMNS) fp32
    grad_sum_ptr,  # (blocks * P,) fp32
    grad_weight_ptr,  # as weight_ptr
    grad_kernel_ptr,  # (blocks * P, SIZE * SIZE) fp32
    INNER_ROWS: tl.constexpr,
    INNER_COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least INNER_ROWS * INNER_COLUMNS
):
    prompt = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    kernel_ptr += tl.program_id(1) * SIZE * SIZE
    inner = tl.arange(0, BLOCK)
    inside = inner < INNER_ROWS * INNER_COLUMNS
    # Where tap (0, 0) of an output of the convolution reads.
    first = inner // INNER_COLUMNS * (INNER_COLUMNS + SIZE - 1) + inner % INNER_COLUMNS
    offset = prompt * INNER_ROWS * INNER_COLUMNS
    weight = tl.load(weight_ptr + offset + inner, mask=inside, other=0.0).to(tl.float32)
    grad_sum = tl.load(grad_sum_ptr + prompt)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for tap in range(SIZE * SIZE):
        patches = first + tap // SIZE * (INNER_COLUMNS + SIZE - 1) + tap % SIZE
        grad = tl.load(grad_mix_ptr + prompt * COLUMNS + patches, mask=inside, other=0.0)
        grad = tl.where(inside, grad + grad_sum, 0.0)
        grad_weight += grad * tl.load(kernel_ptr + tap).to(tl.float32)
        tl.store(grad_kernel_ptr + prompt * SIZE * SIZE + tap, tl.sum(grad * weight, 0))
    grad_weight = grad_weight.to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + offset + inner, grad_weight, mask=inside)


def _programs(weight: torch.Tensor) -> tuple[int, int, int]:
    """Prompts, and blocks."""
    return weight.shape[-2], weight.shape[:-2].numel(), 1


def _meta(kernel: torch.Tensor, grid: tuple[int, int], columns: int) -> dict[str, int]:
    size = kernel.shape[-1]
    return {
        "INNER_ROWS": grid[0] - size + 1,
        "INNER_COLUMNS": grid[1] - size + 1,
        "SIZE": size,
        "COLUMNS": columns,
    }


def fold_launch(
    weight: torch.Tensor,
    kernel: torch.Tensor,
    grid: tuple[int, int],
    mix: torch.Tensor,
    mix_sum: torch.Tensor,
) -> Launch:
    """The launch that fills `mix` (..., p, columns) and its row sums (..., p), both fp32."""
    return Launch(
        name="fold",
        kernel=fold_kernel,
        grid=_programs(weight),
        arguments={
            "weight_ptr": weight, "kernel_ptr": kernel, "mix_ptr": mix, "sum_ptr": mix_sum,
        },
        constexprs={
            **_meta(kernel, grid, mix.shape[-1]),
            "BLOCK": min(1024, power_of_2_at_least(mix.shape[-1])),
        },
        num_warps=4,
        num_stages=1,
    )  # fmt: skip


def fold_backward_launch(
    weight: torch.Tensor,
    kernel: torch.Tensor,
    grid: tuple[int, int],
    grad_mix: torch.Tensor,
    grad_sum: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_kernel: torch.Tensor,
) -> Launch:
    """The launch that fills `grad_weight` (as weight) and `grad_kernel` (..., p, K * K)."""
    return Launch(
        name="fold_backward",
        kernel=fold_backward_kernel,
        grid=_programs(weight),
        arguments={
            "weight_ptr": weight, "kernel_ptr": kernel, "grad_mix_ptr": grad_mix,
            "grad_sum_ptr": grad_sum, "grad_weight_ptr": grad_weight,
            "grad_kernel_ptr": grad_kernel,
        },
        constexprs={
            **_meta(kernel, grid, grad_mix.shape[-1]),
            "BLOCK": power_of_2_at_least(weight.shape[-1]),
        },
        num_warps=4,
        num_stages=1,
    )  # fmt: skip
